/* Addressed random numbers, and the exponential race of a row of float32 probabilities. set.c includes this file after vectors.h.

   Token t arrives at the time -log(u) / p. The time is at least (1 - u) / p, because -log(u) >= 1 - u. If this bound exceeds the
   latest arrival that is kept, the token cannot be among the first, and its logarithm is not computed. */

static const uint64_t GOLDEN = 0x9E3779B97F4A7C15, MIX1 = 0xBF58476D1CE4E5B9, MIX2 = 0x94D049BB133111EB;

/* Applies the finaliser of splitmix64. */
INLINE uint64_t mix(uint64_t word) {
    word = (word ^ word >> 30) * MIX1;
    word = (word ^ word >> 27) * MIX2;
    return word ^ word >> 31;
}

/* Maps the upper 53 bits of a hash to the middle of one of 2^53 equal parts of (0, 1). */
INLINE double uniform(uint64_t word) { return ((double)(int64_t)(mix(word) >> 11) + 0.5) * 0x1p-53; }

/* Computes the numbers that `Draws.uniform` gives for every node of packed trees, for one purpose after another; see `uniforms` in
   kernels/uniforms.py. Returns 0, or 1 if there is not enough memory. */
int EXPORT(uniforms)(
    const uint64_t *starts, int64_t trees, const int64_t *offsets, const int64_t *parents, const uint64_t *words, int64_t purposes,
    double *numbers
) {
    const int64_t nodes = offsets[trees];
    uint64_t *addresses = malloc((size_t)(2 * nodes + 1) * sizeof *addresses), *children = addresses + nodes;
    for (int64_t purpose = 0; purpose < purposes && addresses; purpose++, numbers += nodes) {
        memset(children, 0, (size_t)nodes * sizeof *children);
        for (int64_t tree = 0; tree < trees; tree++)
            for (int64_t begin = offsets[tree], i = begin; i < offsets[tree + 1]; i++) {
                const int64_t parent = begin + parents[i];
                const int is_root = parents[i] < 0 || parent >= i; /* a child stands after its parent */
                addresses[i] = is_root ? words[purpose] : mix(addresses[parent] + ++children[parent] * GOLDEN);
                numbers[i] = (double)(int64_t)(mix(mix(starts[tree] ^ addresses[i]) + GOLDEN) >> 11) * 0x1p-53;
            }
    }
    free(addresses);
    return addresses == NULL;
}

/* Replaces the latest of `count` arrivals in a heap. The latest arrival is at the front of the heap. */
static void replace_latest(double time, int64_t entry, double *times, int64_t *entries, int64_t count) {
    int64_t at = 0;
    for (int64_t child = 1; child < count; child = 2 * at + 1) {
        if (child + 1 < count && times[child + 1] > times[child]) child++;
        if (times[child] <= time) break;
        times[at] = times[child], entries[at] = entries[child], at = child;
    }
    times[at] = time, entries[at] = entry;
}

/* Finds the first `count` arrivals: their times in ascending order and their entries. Times beyond the last are infinite. */
void EXPORT(race)(
    uint64_t start, const float *probs, const int64_t *token_ids, int64_t size, int64_t count, double *times, int64_t *entries
) {
    for (int64_t i = 0; i < count; i++) times[i] = INFINITY, entries[i] = 0;
    for (int64_t i = 0; i < size && count; i += GROUP) {
        const int64_t there = least(GROUP, size - i);
        double u[GROUP], p[GROUP] = {0};
        for (int64_t lane = 0; lane < GROUP; lane++) {
            const int64_t id = token_ids == NULL ? i + lane : lane < there ? token_ids[i + lane] : 0;
            u[lane] = uniform(start + (uint64_t)(id + 1) * GOLDEN);
        }
        for (int64_t lane = 0; lane < there; lane++) p[lane] = probs[i + lane];
        /* slightly above the bound, so that rounding excludes no arrival; infinity times 0 is NaN, which compares as false */
        const double latest = times[0];
        int maybe = 0;
        for (int lane = 0; lane < GROUP; lane++) maybe |= 1 - u[lane] <= p[lane] * latest * (1 + 1e-12);
        if (!maybe) continue;
        for (int64_t lane = 0; lane < there; lane++) {
            if (!(1 - u[lane] <= p[lane] * times[0] * (1 + 1e-12))) continue;
            const double time = -log(u[lane]) / p[lane];
            if (time < times[0]) replace_latest(time, i + lane, times, entries, count);
        }
    }
    for (int64_t left = count - 1; left > 0; left--) { /* heap sort: moves the latest remaining arrival to the end */
        double time = times[left];
        int64_t entry = entries[left];
        times[left] = times[0], entries[left] = entries[0];
        replace_latest(time, entry, times, entries, left);
    }
}
