/* The AVX2 set, with FMA and F16C: vectors of 8 numbers. */

#include <immintrin.h>

#define PAIRED 0
#define UNROLL _Pragma("GCC unroll 32")
#define MOST_ROWS 6
enum { LANES = 8, UNPACKED_ROWS = 5, MANY_ROWS = 1 << 30, PACKED_ROWS = 16, WIDE_ROWS = 2, SUMS = 12, PAIR_ROWS = 0, AHEAD = 6144 };

typedef __m256 V;
typedef __m128i C;

/* All bits set in the first `count` lanes. */
INLINE __m256i first_of(int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(count < LANES ? count : LANES)), lanes);
}

INLINE V v_set(float x) { return _mm256_set1_ps(x); }
INLINE V v_load(const float *x) { return _mm256_loadu_ps(x); }
INLINE void v_store(float *to, V x) { _mm256_storeu_ps(to, x); }
INLINE V v_load_some(const float *x, int64_t count) { return _mm256_maskload_ps(x, first_of(count)); }
INLINE void v_store_some(float *to, V x, int64_t count) { _mm256_maskstore_ps(to, first_of(count), x); }
INLINE V v_first(V x, int64_t count) { return _mm256_and_ps(x, _mm256_castsi256_ps(first_of(count))); }
INLINE V v_add(V a, V b) { return _mm256_add_ps(a, b); }
INLINE V v_sub(V a, V b) { return _mm256_sub_ps(a, b); }
INLINE V v_mul(V a, V b) { return _mm256_mul_ps(a, b); }
INLINE V v_div(V a, V b) { return _mm256_div_ps(a, b); }
INLINE V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V v_fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE V v_fms(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }
INLINE V v_max(V a, V b) { return _mm256_max_ps(a, b); }
INLINE V v_round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE unsigned v_above(V a, V b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
INLINE unsigned v_below(V a, V b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }

INLINE V v_keep(V x, unsigned lanes) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)lanes), bits), bits);
    return _mm256_and_ps(x, _mm256_castsi256_ps(kept));
}

INLINE V power_of_two(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }

INLINE V v_scale(V x, V n) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(n, v_set(254))), half = _mm256_srai_epi32(whole, 1);
    return v_mul(v_mul(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

INLINE C c_load(const uint16_t *x) { return _mm_loadu_si128((const __m128i *)x); }
INLINE void c_store(uint16_t *to, C x) { _mm_storeu_si128((__m128i *)to, x); }
INLINE V v_of_bf16(C x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
INLINE V v_of_half(C x) { return _mm256_cvtph_ps(x); }
INLINE C half_of_v(V x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

INLINE C bf16_of_v(V x) {
    const __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i cells = _mm256_blendv_epi8(rounded, _mm256_or_si256(upper, _mm256_set1_epi32(0x40)), is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(cells, cells), 0x08);
    return _mm256_castsi256_si128(packed);
}

INLINE V even_of(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
INLINE V odd_of(__m256i words) { return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536))); }
INLINE V v_even(const uint16_t *x) { return even_of(_mm256_loadu_si256((const __m256i *)x)); }
INLINE V v_odd(const uint16_t *x) { return odd_of(_mm256_loadu_si256((const __m256i *)x)); }

/* Sums of products stay in 16 bits: a block adds at most 8 pairs of 2 x 15 x 128, which is below 32768. */
typedef __m256i B, Q;

INLINE B b_load(const uint8_t *x) { return _mm256_loadu_si256((const __m256i *)x); }
INLINE B b_low(B x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE B b_high(B x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
INLINE Q q_zero(void) { return _mm256_setzero_si256(); }

INLINE __m256i four_bytes(const void *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

INLINE Q q_dot(Q sum, B w, const int8_t *x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, four_bytes(x))); }

INLINE V q_sum(Q sum, int32_t more) {
    const __m256i whole = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(whole, _mm256_set1_epi32(more)));
}

/* The same for bytes above 15: the even and the odd inputs of a lane are multiplied in 16 bits, and added in 32. */
INLINE Q wide_dot(Q sum, B w, const int8_t *x) {
    const __m256i four = four_bytes(x), even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    const __m256i first = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), second = _mm256_srai_epi16(four, 8);
    return _mm256_add_epi32(_mm256_add_epi32(sum, _mm256_madd_epi16(even, first)), _mm256_madd_epi16(odd, second));
}
INLINE V wide_sum(Q sum, int32_t more) { return _mm256_cvtepi32_ps(_mm256_add_epi32(sum, _mm256_set1_epi32(more))); }

/* Bytes: some of their bits; the lower and the upper half joined; byte k of every lane; signed bytes as numbers. */
INLINE B b_bits(B x, int shift, int mask) {
    return _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8((char)mask));
}
INLINE B b_join(B low, B high) { return _mm256_or_si256(low, _mm256_slli_epi16(high, 4)); }
INLINE __m256i byte_of(B x, int k) { return _mm256_and_si256(_mm256_srlv_epi32(x, _mm256_set1_epi32(8 * k)), _mm256_set1_epi32(255)); }
INLINE V v_of_byte(B x, int k) { return _mm256_cvtepi32_ps(byte_of(x, k)); }
INLINE V v_of_s8(const int8_t *x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x))); }

INLINE void v_transpose(V *x) {
    V a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44), b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44), b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20), x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

INLINE void w_transpose(const uint16_t *const *rows, int64_t d, V *out) {
    V words[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) words[i] = _mm256_loadu_ps((const float *)(rows[i] + d));
    v_transpose(words);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m256i pairs = _mm256_castps_si256(words[i]);
        out[2 * i] = even_of(pairs), out[2 * i + 1] = odd_of(pairs);
    }
}
