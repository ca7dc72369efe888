/* A team of threads that runs the phases of a forward. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#include "numbers.h"
#include "team.h"

enum { MOST_THREADS = 64, MOST_TURNS = 128, SPINS_BEFORE_YIELD = 4000, SPINS_BEFORE_SLEEP = 40000 };

/* Tells the processor that a thread waits. */
static void rest(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The caller runs the phases of a forward one by one. The other threads help with pieces of the current phase. So a phase waits
   only for pieces that a thread has started, never for a thread that the system has not scheduled. */
static struct {
    pthread_mutex_t busy, lock;
    pthread_cond_t wake;
    int size;               /* number of threads, the caller included */
    atomic_int sleeping;
    atomic_ulong offer;     /* pieces of the current phase << 32 | pieces taken; equal when there is nothing to do */
    atomic_long done;
    Piece *piece;
    const void *given;
} team = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .size = 1};

/* The child of a fork has only the thread that forked. The others are gone, but the locks are as they held them, and `wake` still
   counts those that slept: a broadcast would wait for them. So the child starts a new team. */
static void start_anew(void) {
    pthread_mutex_init(&team.busy, NULL);
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.wake, NULL);
    team.size = 1;
    atomic_store(&team.sleeping, 0);
    atomic_store(&team.offer, 0);
}

__attribute__((constructor)) static void expect_forks(void) { pthread_atfork(NULL, NULL, start_anew); }

INLINE int has_more(uint64_t offer) { return (uint32_t)offer < offer >> 32; }

/* Runs pieces until all are taken, and takes several at once where there are many. The phase does not end while a piece runs, so
   the data of the piece stays valid. */
static void help(int id) {
    for (uint64_t offer; has_more(offer = atomic_load(&team.offer));) {
        const uint64_t some = 1 + (offer >> 32) / MOST_TURNS, taken = atomic_fetch_add(&team.offer, some);
        if (!has_more(taken)) return;
        const int64_t first = (uint32_t)taken, end = least(first + (int64_t)some, (int64_t)(taken >> 32));
        for (int64_t i = first; i < end; i++) team.piece(team.given, i, id);
        atomic_fetch_add(&team.done, end - first);
    }
}

static void *stand_by(void *id) {
    for (;;) {
        for (int spins = 0; !has_more(atomic_load(&team.offer)) && spins < SPINS_BEFORE_SLEEP; spins++) spins < SPINS_BEFORE_YIELD ? rest() : (void)sched_yield();
        if (!has_more(atomic_load(&team.offer))) {
            pthread_mutex_lock(&team.lock);
            atomic_fetch_add(&team.sleeping, 1);
            while (!has_more(atomic_load(&team.offer))) pthread_cond_wait(&team.wake, &team.lock);
            atomic_fetch_sub(&team.sleeping, 1);
            pthread_mutex_unlock(&team.lock);
        }
        help((int)(intptr_t)id);
    }
    return NULL;
}

void parallel(int64_t threads, Piece *piece, const void *given, int64_t count) {
    if (threads == 1 || count == 1) {
        for (int64_t i = 0; i < count; i++) piece(given, i, 0);
        return;
    }
    team.piece = piece, team.given = given;
    atomic_store(&team.done, 0);
    atomic_store(&team.offer, (uint64_t)count << 32);
    if (atomic_load(&team.sleeping)) {
        pthread_mutex_lock(&team.lock);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.lock);
    }
    help(0);
    for (long spins = 0; atomic_load(&team.done) < count; spins++) spins < SPINS_BEFORE_YIELD ? rest() : (void)sched_yield();
}

int64_t enlist(int64_t wanted) {
    pthread_mutex_lock(&team.busy);
    if (wanted > MOST_THREADS) wanted = MOST_THREADS;
    for (pthread_t thread; team.size < wanted; team.size++) {
        if (pthread_create(&thread, NULL, stand_by, (void *)(intptr_t)team.size)) break;
        pthread_detach(thread);
    }
    return wanted < team.size ? wanted : team.size;
}

void dismiss(void) { pthread_mutex_unlock(&team.busy); }

int team_size(void) { return team.size; }
