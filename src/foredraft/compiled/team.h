/* A team of threads that work through the phases of a forward. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

enum { MOST_THREADS = 64, SPINS_BEFORE_YIELD = 4000, SPINS_BEFORE_SLEEP = 40000 };

/* One piece of a phase, on thread `id`. Which thread that is changes no result. */
typedef void Piece(const void *given, int64_t piece, int id);

/* The caller works through the phases of a forward one by one; the others only ever help with the pieces of the current one. So a
   phase waits for pieces that someone has begun, never for a thread that the system gave no processor. */
static struct {
    pthread_mutex_t busy, lock;
    pthread_cond_t wake;
    pid_t owner;            /* threads do not survive a fork */
    int size;               /* threads there are, the caller's own included */
    atomic_int sleeping;
    atomic_ulong offer;     /* pieces of the current phase << 32 | those taken; all taken: nothing to do */
    atomic_long done;
    Piece *piece;
    const void *given;
} team = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

INLINE int has_more(uint64_t offer) { return (uint32_t)offer < offer >> 32; }

/* Takes pieces while there are any. Whoever holds one keeps the phase from ending, so that what it reads stays what it is. */
static void help(int id) {
    while (has_more(atomic_load(&team.offer))) {
        uint64_t taken = atomic_fetch_add(&team.offer, 1);
        if (!has_more(taken)) return;
        team.piece(team.given, (uint32_t)taken, id);
        atomic_fetch_add(&team.done, 1);
    }
}

static void *stand_by(void *id) {
    for (;;) {
        for (int spins = 0; !has_more(atomic_load(&team.offer)) && spins < SPINS_BEFORE_SLEEP; spins++) _mm_pause();
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

/* Runs the pieces 0 to count - 1 of a phase, with the help of the whole team if `threads` is more than one. */
static void parallel(int64_t threads, Piece *piece, const void *given, int64_t count) {
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
    for (long spins = 0; atomic_load(&team.done) < count; spins++) spins < SPINS_BEFORE_YIELD ? _mm_pause() : (void)sched_yield();
}

/* Takes the team for a forward. Returns how many threads there are for it: as many as asked for and can be had. */
static int64_t enlist(int64_t wanted) {
    pthread_mutex_lock(&team.busy);
    if (team.owner != getpid()) {
        team.owner = getpid(), team.size = 1;
        atomic_store(&team.sleeping, 0), atomic_store(&team.offer, 0);
    }
    if (wanted > MOST_THREADS) wanted = MOST_THREADS;
    for (pthread_t thread; team.size < wanted; team.size++) {
        if (pthread_create(&thread, NULL, stand_by, (void *)(intptr_t)team.size)) break;
        pthread_detach(thread);
    }
    return wanted < team.size ? wanted : team.size;
}

static void dismiss(void) { pthread_mutex_unlock(&team.busy); }
