/* A team of threads that runs the phases of a forward. All instruction sets share it. */

#include <stdint.h>

/* Runs one piece of a phase on thread `id`. The result does not depend on the thread. */
typedef void Piece(const void *given, int64_t piece, int id);

/* Reserves the team for a forward and starts missing threads. Returns the number of threads, at most `wanted`. */
int64_t enlist(int64_t wanted);

/* Runs the pieces 0 to count - 1 of a phase. The whole team helps if `threads` is above 1. */
void parallel(int64_t threads, Piece *piece, const void *given, int64_t count);

/* Ends a forward. */
void dismiss(void);

/* Returns the number of threads of the team, the caller included. */
int team_size(void);
