/* The sets with AVX-512 (F, BW, VL, DQ): vectors of 16 numbers. USE_VNNI adds integer dot products, USE_BF16 products of pairs. */

#include <immintrin.h>

#define UNROLL _Pragma("GCC unroll 32")
#ifdef USE_BF16
#define PAIRED 1
#else
#define PAIRED 0
#endif
#define MOST_ROWS 12
enum {
    LANES = 16, UNPACKED_ROWS = MOST_ROWS, MANY_ROWS = 40, PACKED_ROWS = 48,
    WIDE_ROWS = MOST_ROWS, SUMS = 24, PAIR_ROWS = 5, AHEAD = 6144,
};

typedef __m512 V;
typedef __m256i C;

INLINE __mmask16 first_of(int64_t count) { return (__mmask16)(count >= LANES ? 0xFFFF : (1 << (count > 0 ? count : 0)) - 1); }

INLINE V v_set(float x) { return _mm512_set1_ps(x); }
INLINE V v_load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void v_store(float *to, V x) { _mm512_storeu_ps(to, x); }
INLINE V v_load_some(const float *x, int64_t count) { return _mm512_maskz_loadu_ps(first_of(count), x); }
INLINE void v_store_some(float *to, V x, int64_t count) { _mm512_mask_storeu_ps(to, first_of(count), x); }
INLINE V v_first(V x, int64_t count) { return _mm512_maskz_mov_ps(first_of(count), x); }
INLINE V v_add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V v_sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V v_div(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V v_fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE V v_fms(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }
INLINE V v_max(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V v_round(V x) { return _mm512_roundscale_ps(x, 0); }
INLINE unsigned v_above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE unsigned v_below(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE V v_keep(V x, unsigned lanes) { return _mm512_maskz_mov_ps((__mmask16)lanes, x); }
/* scalef makes NaN times 2^infinity infinite. So n is cut at 254, as in the other sets. */
INLINE V v_scale(V x, V n) { return _mm512_scalef_ps(x, _mm512_min_ps(n, v_set(254))); }

INLINE C c_load(const uint16_t *x) { return _mm256_loadu_si256((const __m256i *)x); }
INLINE void c_store(uint16_t *to, C x) { _mm256_storeu_si256((__m256i *)to, x); }
INLINE V v_of_bf16(C x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE V v_of_half(C x) { return _mm512_cvtph_ps(x); }
INLINE C half_of_v(V x) { return _mm512_cvtps_ph(x, 0); }

INLINE __m512i four_bytes(const void *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

/* The first or the second input of every lane, of pairs of bf16. */
INLINE V even_of(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
INLINE V odd_of(__m512i words) { return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536))); }
INLINE V v_even(const uint16_t *x) { return even_of(_mm512_loadu_si512(x)); }
INLINE V v_odd(const uint16_t *x) { return odd_of(_mm512_loadu_si512(x)); }

#ifdef USE_BF16
INLINE C bf16_of_v(V x) { return (C)_mm512_cvtneps_pbh(x); }

/* Two inputs of every lane, and their products with two inputs of a row. */
typedef __m512bh P;

INLINE P p_load(const uint16_t *x) { return (P)_mm512_loadu_si512(x); }
INLINE V p_dot(V sum, P w, const uint16_t *x) { return _mm512_dpbf16_ps(sum, w, (P)four_bytes(x)); }
#else
INLINE C bf16_of_v(V x) {
    const __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_or_si512(upper, _mm512_set1_epi32(0x40))));
}

#endif

typedef __m512i B, Q;

INLINE B b_load(const uint8_t *x) { return _mm512_loadu_si512(x); }
INLINE B b_low(B x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE B b_high(B x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
INLINE Q q_zero(void) { return _mm512_setzero_si512(); }

#ifdef USE_VNNI
INLINE Q q_dot(Q sum, B w, const int8_t *x) { return _mm512_dpbusd_epi32(sum, w, four_bytes(x)); }
INLINE V q_sum(Q sum, int32_t more) { return _mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_set1_epi32(more))); }
INLINE Q wide_dot(Q sum, B w, const int8_t *x) { return q_dot(sum, w, x); }
INLINE V wide_sum(Q sum, int32_t more) { return q_sum(sum, more); }
#else
/* Sums of products stay in 16 bits: a block adds at most 8 pairs of 2 x 15 x 128, which is below 32768. */
INLINE Q q_dot(Q sum, B w, const int8_t *x) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, four_bytes(x))); }
INLINE V q_sum(Q sum, int32_t more) {
    const __m512i whole = _mm512_madd_epi16(sum, _mm512_set1_epi16(1));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(whole, _mm512_set1_epi32(more)));
}

/* The same for bytes above 15: the even and the odd inputs of a lane are multiplied in 16 bits, and added in 32. */
INLINE Q wide_dot(Q sum, B w, const int8_t *x) {
    const __m512i four = four_bytes(x), even = _mm512_and_si512(w, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16(w, 8);
    const __m512i first = _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8), second = _mm512_srai_epi16(four, 8);
    return _mm512_add_epi32(_mm512_add_epi32(sum, _mm512_madd_epi16(even, first)), _mm512_madd_epi16(odd, second));
}
INLINE V wide_sum(Q sum, int32_t more) { return _mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_set1_epi32(more))); }
#endif

/* Bytes: some of their bits; the lower and the upper half joined; byte k of every lane; signed bytes as numbers. */
INLINE B b_bits(B x, int shift, int mask) {
    return _mm512_and_si512(_mm512_srl_epi16(x, _mm_cvtsi32_si128(shift)), _mm512_set1_epi8((char)mask));
}
INLINE B b_join(B low, B high) { return _mm512_or_si512(low, _mm512_slli_epi16(high, 4)); }
INLINE __m512i byte_of(B x, int k) { return _mm512_and_si512(_mm512_srlv_epi32(x, _mm512_set1_epi32(8 * k)), _mm512_set1_epi32(255)); }
INLINE V v_of_byte(B x, int k) { return _mm512_cvtepi32_ps(byte_of(x, k)); }
INLINE V v_of_s8(const int8_t *x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x))); }

#ifdef USE_BF16
/* Lower and upper halves of bytes from 0 to 15, less 8, as bf16. Bit 4 of an index belongs to the next half, so the table holds every
   number twice. out[v][0] has bytes 0 and 2 of every lane, out[v][1] has bytes 1 and 3; v is 1 for the upper halves. */
INLINE void p_nibbles(B x, P out[][2]) {
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        (short)0xC100, (short)0xC0E0, (short)0xC0C0, (short)0xC0A0, (short)0xC080, (short)0xC040, (short)0xC000, (short)0xBF80,
        0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0));
    out[0][0] = (P)_mm512_permutexvar_epi16(x, table);
    out[1][0] = (P)_mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4), table);
    out[0][1] = (P)_mm512_permutexvar_epi16(_mm512_srli_epi16(x, 8), table);
    out[1][1] = (P)_mm512_permutexvar_epi16(_mm512_srli_epi16(x, 12), table);
}

/* Bytes less `zero` as bf16, which holds whole numbers up to 256: bytes 0 and 2 of every lane, then bytes 1 and 3. */
INLINE void p_bytes(B x, int zero, P out[2]) {
    UNROLL
    for (int k = 0; k < 2; k++) {
        const __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(byte_of(x, k), _mm512_set1_epi32(zero))));
        const __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(byte_of(x, k + 2), _mm512_set1_epi32(zero))));
        out[k] = (P)_mm512_or_si512(_mm512_srli_epi32(low, 16), high);
    }
}
#endif

/* Transposes 16 vectors of 16 words. */
INLINE void i_transpose(__m512i *x) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2)
        a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i c = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), d = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        __m512i e = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xDD), f = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xDD);
        x[i] = _mm512_shuffle_i32x4(c, d, 0x88), x[i + 8] = _mm512_shuffle_i32x4(c, d, 0xDD);
        x[i + 4] = _mm512_shuffle_i32x4(e, f, 0x88), x[i + 12] = _mm512_shuffle_i32x4(e, f, 0xDD);
    }
}

INLINE void v_transpose(V *x) {
    __m512i words[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) words[i] = _mm512_castps_si512(x[i]);
    i_transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[i] = _mm512_castsi512_ps(words[i]);
}

#ifdef USE_BF16
/* Pairs stay together: out[i] holds the numbers d + 2 i and d + 2 i + 1 of every row. */
INLINE void w_transpose(const uint16_t *const *rows, int64_t d, P *out) {
    __m512i words[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) words[i] = _mm512_loadu_si512(rows[i] + d);
    i_transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) out[i] = (P)words[i];
}
#else
INLINE void w_transpose(const uint16_t *const *rows, int64_t d, V *out) {
    __m512i words[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) words[i] = _mm512_loadu_si512(rows[i] + d);
    i_transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        out[2 * i] = even_of(words[i]), out[2 * i + 1] = odd_of(words[i]);
    }
}
#endif
