/* The exponential race of draws.py for a row of float32 probabilities, for CPUs with AVX-512. Called by draws.py.

   Token t arrives at the time -log(u) / p. The time is at least (1 - u) / p, because -log(u) >= 1 - u. If this bound exceeds the
   latest arrival that is kept, the token cannot be among the first, and its logarithm is not computed. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

static const uint64_t GOLDEN = 0x9E3779B97F4A7C15, MIX1 = 0xBF58476D1CE4E5B9, MIX2 = 0x94D049BB133111EB;

/* Applies the finaliser of splitmix64. Maps its upper 53 bits to the middle of one of 2^53 equal parts of (0, 1). */
static __m512d uniform(__m512i words) {
    words = _mm512_mullo_epi64(_mm512_xor_si512(words, _mm512_srli_epi64(words, 30)), _mm512_set1_epi64((long long)MIX1));
    words = _mm512_mullo_epi64(_mm512_xor_si512(words, _mm512_srli_epi64(words, 27)), _mm512_set1_epi64((long long)MIX2));
    words = _mm512_srli_epi64(_mm512_xor_si512(words, _mm512_srli_epi64(words, 31)), 11);
    return _mm512_mul_pd(_mm512_add_pd(_mm512_cvtepu64_pd(words), _mm512_set1_pd(0.5)), _mm512_set1_pd(0x1p-53));
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
void foredraft_race(
    uint64_t start, const float *probs, const int64_t *token_ids, int64_t size, int64_t count, double *times, int64_t *entries
) {
    for (int64_t i = 0; i < count; i++) times[i] = INFINITY, entries[i] = 0;
    const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), one = _mm512_set1_epi64(1);
    for (int64_t i = 0; i < size && count; i += 8) {
        const __mmask8 there = (__mmask8)(size - i >= 8 ? 255 : (1 << (size - i)) - 1);
        __m512i ids = token_ids ? _mm512_maskz_loadu_epi64(there, token_ids + i) : _mm512_add_epi64(_mm512_set1_epi64(i), lanes);
        ids = _mm512_mullo_epi64(_mm512_add_epi64(ids, one), _mm512_set1_epi64((long long)GOLDEN));
        __m512d u = uniform(_mm512_add_epi64(_mm512_set1_epi64((long long)start), ids));
        __m512d p = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(there, probs + i));
        /* slightly above the bound, so that rounding excludes no arrival; infinity times 0 is NaN, which compares as false */
        __m512d most = _mm512_mul_pd(_mm512_mul_pd(p, _mm512_set1_pd(times[0])), _mm512_set1_pd(1 + 1e-12));
        __mmask8 maybe = _mm512_mask_cmp_pd_mask(there, _mm512_sub_pd(_mm512_set1_pd(1.0), u), most, _CMP_LE_OQ);
        if (!maybe) continue;
        double us[8], ps[8];
        _mm512_storeu_pd(us, u), _mm512_storeu_pd(ps, p);
        for (int lane = 0; lane < 8; lane++) {
            double time = maybe >> lane & 1 ? -log(us[lane]) / ps[lane] : INFINITY;
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
