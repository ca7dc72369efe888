/* Plain-C stand-ins for the intrinsics of the kernels, so that every instruction set runs on every machine. A build finds this file
   before the compiler's by -I, and gives no -m flag.

   Every function is written from the operation in Intel's "64 and IA-32 Architectures Software Developer's Manual", volume 2, under
   the name of its instruction, with the rounding mode and the masks that a process starts with (nearest even; denormal numbers
   count). Only the intrinsics that the kernels use are here, with the operands that they use: other operands abort. */

#ifndef FOREDRAFT_STAND_INS
#define FOREDRAFT_STAND_INS

#include "lanes.h"

typedef struct { float f[8]; } __m256;
typedef struct { float f[16]; } __m512;
#define WORDS_OF(BYTES) \
    union { \
        uint8_t u8[BYTES]; int8_t i8[BYTES]; uint16_t u16[BYTES / 2]; int16_t i16[BYTES / 2]; \
        uint32_t u32[BYTES / 4]; int32_t i32[BYTES / 4]; uint64_t u64[BYTES / 8]; \
    }
typedef WORDS_OF(16) __m128i;
typedef WORDS_OF(32) __m256i;
typedef WORDS_OF(64) __m512i;
typedef __m256i __m256bh;
typedef __m512i __m512bh;
typedef uint16_t __mmask16;

enum { _CMP_UNORD_Q = 3, _CMP_LT_OQ = 17, _CMP_GT_OQ = 30 };
enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };

/* ---- numbers --------------------------------------------------------------------------------------------------------------- */

/* A denormal number becomes a zero of its sign: DAZ for an operand, FTZ for a result. */
STAND_IN float si_flushed(float x) { return (si_bits(x) & 0x7F800000) == 0 ? si_float(si_bits(x) & 0x80000000) : x; }

/* MAXPS, MINPS: the second operand if either is NaN or both are zero. */
STAND_IN float si_max(float a, float b) { return a > b ? a : b; }
STAND_IN float si_min(float a, float b) { return a < b ? a : b; }

/* ROUNDPS, VRNDSCALEPS to a whole number: nearest even; NaN becomes quiet. */
STAND_IN float si_round(float x, int mode) {
    if (mode & 7) abort();
    return si_is_nan(x) ? si_quiet(x) : rintf(x);
}

/* CVTPS2DQ: a number out of range, or NaN, becomes the "integer indefinite". */
STAND_IN int32_t si_whole(float x) { return x >= -0x1p31f && x < 0x1p31f ? (int32_t)rintf(x) : INT32_MIN; }

/* CMPPS. */
STAND_IN int si_compare(float a, float b, int predicate) {
    switch (predicate) {
    case _CMP_UNORD_Q: return si_is_nan(a) || si_is_nan(b);
    case _CMP_LT_OQ: return a < b;
    case _CMP_GT_OQ: return a > b;
    default: abort();
    }
}

/* VSCALEFPS: a 2^floor(b), rounded once, and the table of its special cases. */
STAND_IN float si_scale(float a, float b) {
    const uint32_t indefinite = 0xFFC00000;
    if (si_is_nan(a)) {
        const int is_quiet = si_bits(a) >> 22 & 1;
        return is_quiet && isinf(b) ? (b > 0 ? INFINITY : 0) : si_quiet(a);
    }
    if (si_is_nan(b)) return si_quiet(b);
    if (isinf(b) && (b > 0 ? a == 0 : isinf(a))) return si_float(indefinite);
    const float n = floorf(b);
    return ldexpf(a, n > 1000 ? 1000 : n < -1000 ? -1000 : (int)n);
}

/* VCVTNEPS2BF16, "convert_fp32_to_bfloat16": denormal numbers become zero, NaN quiet; nearest even whatever the mode. */
STAND_IN uint16_t si_bf16(float x) {
    const uint32_t bits = si_bits(si_flushed(x));
    if (si_is_nan(x)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((isinf(x) ? bits : bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* a b + c, with DAZ, FTZ and one rounding to nearest even, for bf16 factors. A result is tiny if it is below 2^-126 after rounding
   to 24 bits without a least exponent (volume 1, "Numeric Underflow Exception"), which numbers 2^24 times as large tell. */
STAND_IN float si_flushed_fma(float a, float b, float c) {
    a = si_flushed(a), b = si_flushed(b), c = si_flushed(c);
    const float sum = fmaf(a, b, c);
    if (!(fabsf(sum) == 0x1p-126f)) return si_flushed(sum);
    const float larger = fabsf(a) < fabsf(b) ? fmaf(a * 0x1p24f, b, c * 0x1p24f) : fmaf(a, b * 0x1p24f, c * 0x1p24f);
    return fabsf(larger) < 0x1p-102f ? copysignf(0, sum) : sum;
}

STAND_IN float si_of_bf16(uint16_t x) { return si_float((uint32_t)x << 16); }

/* One lane of VDPBF16PS. Volume 2, VDPBF16PS, "Operation": first the product of the odd, then of the even numbers is added. "DAZ,
   FTZ, RNE rounding regardless of MXCSR"; each accumulation is a fused multiply-add, and no exception is raised. */
STAND_IN float si_pair(float sum, uint32_t a, uint32_t b) {
    sum = si_flushed_fma(si_of_bf16((uint16_t)(a >> 16)), si_of_bf16((uint16_t)(b >> 16)), sum);
    return si_flushed_fma(si_of_bf16((uint16_t)a), si_of_bf16((uint16_t)b), sum);
}

STAND_IN int16_t si_saturated(int32_t x) { return (int16_t)(x > INT16_MAX ? INT16_MAX : x < INT16_MIN ? INT16_MIN : x); }

/* ---- loads and stores. Masked lanes are not touched. ----------------------------------------------------------------------- */

#define LOADED(RESULT, NAME) \
    STAND_IN RESULT NAME(const void *from) { \
        RESULT out; \
        memcpy(&out, from, sizeof out); \
        return out; \
    }
LOADED(__m128i, _mm_loadu_si128)
LOADED(__m256i, _mm256_loadu_si256)
LOADED(__m256, _mm256_loadu_ps)
LOADED(__m512i, _mm512_loadu_si512)
LOADED(__m512, _mm512_loadu_ps)

STAND_IN __m128i _mm_loadl_epi64(const void *from) {
    __m128i out = {.u64 = {0, 0}};
    memcpy(&out, from, 8);
    return out;
}

STAND_IN void _mm_storeu_si128(void *to, __m128i x) { memcpy(to, &x, sizeof x); }
STAND_IN void _mm256_storeu_si256(void *to, __m256i x) { memcpy(to, &x, sizeof x); }
STAND_IN void _mm256_storeu_ps(void *to, __m256 x) { memcpy(to, &x, sizeof x); }
STAND_IN void _mm512_storeu_ps(void *to, __m512 x) { memcpy(to, &x, sizeof x); }

LANES_OF(__m256, _mm256_maskload_ps, (const float *from, __m256i mask), 8, f, mask.i32[i] < 0 ? from[i] : 0)
LANES_OF(__m512, _mm512_maskz_loadu_ps, (__mmask16 mask, const float *from), 16, f, mask >> i & 1 ? from[i] : 0)

STAND_IN void _mm256_maskstore_ps(float *to, __m256i mask, __m256 x) {
    for (int i = 0; i < 8; i++)
        if (mask.i32[i] < 0) to[i] = x.f[i];
}

STAND_IN void _mm512_mask_storeu_ps(float *to, __mmask16 mask, __m512 x) {
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) to[i] = x.f[i];
}

/* ---- constants and casts --------------------------------------------------------------------------------------------------- */

LANES_OF(__m256, _mm256_set1_ps, (float x), 8, f, x)
LANES_OF(__m512, _mm512_set1_ps, (float x), 16, f, x)
LANES_OF(__m256i, _mm256_set1_epi8, (char x), 32, i8, (int8_t)x)
LANES_OF(__m512i, _mm512_set1_epi8, (char x), 64, i8, (int8_t)x)
LANES_OF(__m256i, _mm256_set1_epi16, (short x), 16, i16, x)
LANES_OF(__m512i, _mm512_set1_epi16, (short x), 32, i16, x)
LANES_OF(__m256i, _mm256_set1_epi32, (int x), 8, i32, x)
LANES_OF(__m512i, _mm512_set1_epi32, (int x), 16, i32, x)
LANES_OF(__m256i, _mm256_setzero_si256, (void), 8, i32, 0)
LANES_OF(__m512i, _mm512_setzero_si512, (void), 16, i32, 0)

STAND_IN __m256i _mm256_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h) {
    return (__m256i){.i32 = {a, b, c, d, e, f, g, h}};
}

STAND_IN __m128i _mm_cvtsi32_si128(int x) { return (__m128i){.i32 = {x, 0, 0, 0}}; }

#define SIXTEEN(TYPE, n) TYPE n##0, TYPE n##1, TYPE n##2, TYPE n##3, TYPE n##4, TYPE n##5, TYPE n##6, TYPE n##7
STAND_IN __m256i _mm256_setr_epi16(SIXTEEN(short, a), SIXTEEN(short, b)) {
    return (__m256i){.i16 = {a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7}};
}

LANES_OF(__m512i, _mm512_broadcast_i64x4, (__m256i x), 8, u64, x.u64[i & 3])
LANES_OF(__m256, _mm256_castsi256_ps, (__m256i x), 8, f, si_float(x.u32[i]))
LANES_OF(__m256i, _mm256_castps_si256, (__m256 x), 8, u32, si_bits(x.f[i]))
LANES_OF(__m512, _mm512_castsi512_ps, (__m512i x), 16, f, si_float(x.u32[i]))
LANES_OF(__m512i, _mm512_castps_si512, (__m512 x), 16, u32, si_bits(x.f[i]))
LANES_OF(__m128i, _mm256_castsi256_si128, (__m256i x), 4, u32, x.u32[i])

/* ---- arithmetic ------------------------------------------------------------------------------------------------------------ */

#define FLOATS(NAME, VALUE) \
    LANES_OF(__m256, _mm256_##NAME##_ps, (__m256 a, __m256 b), 8, f, VALUE) \
    LANES_OF(__m512, _mm512_##NAME##_ps, (__m512 a, __m512 b), 16, f, VALUE)
FLOATS(add, a.f[i] + b.f[i])
FLOATS(sub, a.f[i] - b.f[i])
FLOATS(mul, a.f[i] * b.f[i])
FLOATS(div, a.f[i] / b.f[i])
FLOATS(max, si_max(a.f[i], b.f[i]))
FLOATS(min, si_min(a.f[i], b.f[i]))

#define THREE_FLOATS(NAME, VALUE) \
    LANES_OF(__m256, _mm256_##NAME##_ps, (__m256 a, __m256 b, __m256 c), 8, f, VALUE) \
    LANES_OF(__m512, _mm512_##NAME##_ps, (__m512 a, __m512 b, __m512 c), 16, f, VALUE)
THREE_FLOATS(fmadd, fmaf(a.f[i], b.f[i], c.f[i]))
THREE_FLOATS(fnmadd, fmaf(-a.f[i], b.f[i], c.f[i]))
THREE_FLOATS(fmsub, fmaf(a.f[i], b.f[i], -c.f[i]))

LANES_OF(__m256, _mm256_round_ps, (__m256 x, int mode), 8, f, si_round(x.f[i], mode))
LANES_OF(__m512, _mm512_roundscale_ps, (__m512 x, int mode), 16, f, si_round(x.f[i], mode | (mode & 0xF0 ? 1 : 0)))
LANES_OF(__m512, _mm512_scalef_ps, (__m512 a, __m512 b), 16, f, si_scale(a.f[i], b.f[i]))
LANES_OF(__m256, _mm256_and_ps, (__m256 a, __m256 b), 8, f, si_float(si_bits(a.f[i]) & si_bits(b.f[i])))
LANES_OF(__m256, _mm256_cmp_ps, (__m256 a, __m256 b, int predicate), 8, f, si_float(si_compare(a.f[i], b.f[i], predicate) ? ~0u : 0))

STAND_IN int _mm256_movemask_ps(__m256 x) {
    int mask = 0;
    for (int i = 0; i < 8; i++) mask |= (int)(si_bits(x.f[i]) >> 31) << i;
    return mask;
}

STAND_IN __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    int mask = 0;
    for (int i = 0; i < 16; i++) mask |= si_compare(a.f[i], b.f[i], predicate) << i;
    return (__mmask16)mask;
}

LANES_OF(__m512, _mm512_maskz_mov_ps, (__mmask16 mask, __m512 x), 16, f, mask >> i & 1 ? x.f[i] : 0)
LANES_OF(__m512i, _mm512_mask_mov_epi32, (__m512i other, __mmask16 mask, __m512i x), 16, i32, (mask >> i & 1 ? x : other).i32[i])

/* Whole numbers wrap around. */
LANES_OF(__m256i, _mm256_add_epi16, (__m256i a, __m256i b), 16, u16, (uint16_t)(a.u16[i] + b.u16[i]))
LANES_OF(__m512i, _mm512_add_epi16, (__m512i a, __m512i b), 32, u16, (uint16_t)(a.u16[i] + b.u16[i]))
LANES_OF(__m256i, _mm256_add_epi32, (__m256i a, __m256i b), 8, u32, a.u32[i] + b.u32[i])
LANES_OF(__m512i, _mm512_add_epi32, (__m512i a, __m512i b), 16, u32, a.u32[i] + b.u32[i])
LANES_OF(__m256i, _mm256_sub_epi32, (__m256i a, __m256i b), 8, u32, a.u32[i] - b.u32[i])
LANES_OF(__m512i, _mm512_sub_epi32, (__m512i a, __m512i b), 16, u32, a.u32[i] - b.u32[i])
LANES_OF(__m256i, _mm256_and_si256, (__m256i a, __m256i b), 4, u64, a.u64[i] & b.u64[i])
LANES_OF(__m512i, _mm512_and_si512, (__m512i a, __m512i b), 8, u64, a.u64[i] & b.u64[i])
LANES_OF(__m256i, _mm256_or_si256, (__m256i a, __m256i b), 4, u64, a.u64[i] | b.u64[i])
LANES_OF(__m512i, _mm512_or_si512, (__m512i a, __m512i b), 8, u64, a.u64[i] | b.u64[i])
LANES_OF(__m256i, _mm256_cmpeq_epi32, (__m256i a, __m256i b), 8, i32, -(a.i32[i] == b.i32[i]))
LANES_OF(__m256i, _mm256_cmpgt_epi32, (__m256i a, __m256i b), 8, i32, -(a.i32[i] > b.i32[i]))

/* A shift by the width or more leaves zero, or the sign. */
STAND_IN int32_t si_divided(int32_t x, unsigned by) { return x < 0 ? ~(~x >> by) : x >> by; }
LANES_OF(__m256i, _mm256_slli_epi32, (__m256i x, unsigned by), 8, u32, by > 31 ? 0 : x.u32[i] << by)
LANES_OF(__m512i, _mm512_slli_epi32, (__m512i x, unsigned by), 16, u32, by > 31 ? 0 : x.u32[i] << by)
LANES_OF(__m256i, _mm256_srli_epi32, (__m256i x, unsigned by), 8, u32, by > 31 ? 0 : x.u32[i] >> by)
LANES_OF(__m512i, _mm512_srli_epi32, (__m512i x, unsigned by), 16, u32, by > 31 ? 0 : x.u32[i] >> by)
LANES_OF(__m256i, _mm256_srli_epi16, (__m256i x, unsigned by), 16, u16, (uint16_t)(by > 15 ? 0 : x.u16[i] >> by))
LANES_OF(__m512i, _mm512_srli_epi16, (__m512i x, unsigned by), 32, u16, (uint16_t)(by > 15 ? 0 : x.u16[i] >> by))
LANES_OF(__m256i, _mm256_srai_epi32, (__m256i x, unsigned by), 8, i32, si_divided(x.i32[i], by > 31 ? 31 : by))

LANES_OF(__m256i, _mm256_slli_epi16, (__m256i x, unsigned by), 16, u16, (uint16_t)(by > 15 ? 0 : x.u16[i] << by))
LANES_OF(__m512i, _mm512_slli_epi16, (__m512i x, unsigned by), 32, u16, (uint16_t)(by > 15 ? 0 : x.u16[i] << by))
LANES_OF(__m256i, _mm256_srai_epi16, (__m256i x, unsigned by), 16, i16, (int16_t)si_divided(x.i16[i], by > 15 ? 15 : by))
LANES_OF(__m512i, _mm512_srai_epi16, (__m512i x, unsigned by), 32, i16, (int16_t)si_divided(x.i16[i], by > 15 ? 15 : by))
LANES_OF(__m256i, _mm256_srl_epi16, (__m256i x, __m128i by), 16, u16, (uint16_t)(by.u64[0] > 15 ? 0 : x.u16[i] >> by.u64[0]))
LANES_OF(__m512i, _mm512_srl_epi16, (__m512i x, __m128i by), 32, u16, (uint16_t)(by.u64[0] > 15 ? 0 : x.u16[i] >> by.u64[0]))
LANES_OF(__m256i, _mm256_srlv_epi32, (__m256i x, __m256i by), 8, u32, by.u32[i] > 31 ? 0 : x.u32[i] >> by.u32[i])
LANES_OF(__m512i, _mm512_srlv_epi32, (__m512i x, __m512i by), 16, u32, by.u32[i] > 31 ? 0 : x.u32[i] >> by.u32[i])

/* PMADDUBSW: unsigned times signed bytes; pairs of products are added and saturated. PMADDWD: pairs of words, which wrap around. */
#define BYTE_PAIR si_saturated(a.u8[2 * i] * b.i8[2 * i] + a.u8[2 * i + 1] * b.i8[2 * i + 1])
LANES_OF(__m256i, _mm256_maddubs_epi16, (__m256i a, __m256i b), 16, i16, BYTE_PAIR)
LANES_OF(__m512i, _mm512_maddubs_epi16, (__m512i a, __m512i b), 32, i16, BYTE_PAIR)
#define WORD_PAIR (uint32_t)(a.i16[2 * i] * b.i16[2 * i]) + (uint32_t)(a.i16[2 * i + 1] * b.i16[2 * i + 1])
LANES_OF(__m256i, _mm256_madd_epi16, (__m256i a, __m256i b), 8, u32, WORD_PAIR)
LANES_OF(__m512i, _mm512_madd_epi16, (__m512i a, __m512i b), 16, u32, WORD_PAIR)

/* VPDPBUSD: four products of unsigned and signed bytes are added to the lane, without saturation. */
#define BYTE(j) (uint32_t)(a.u8[4 * i + j] * b.i8[4 * i + j])
#define FOUR_BYTES BYTE(0) + BYTE(1) + BYTE(2) + BYTE(3)
LANES_OF(__m512i, _mm512_dpbusd_epi32, (__m512i sum, __m512i a, __m512i b), 16, u32, sum.u32[i] + FOUR_BYTES)

/* ---- conversions ----------------------------------------------------------------------------------------------------------- */

LANES_OF(__m256i, _mm256_cvtps_epi32, (__m256 x), 8, i32, si_whole(x.f[i]))
LANES_OF(__m256, _mm256_cvtepi32_ps, (__m256i x), 8, f, (float)x.i32[i])
LANES_OF(__m512, _mm512_cvtepi32_ps, (__m512i x), 16, f, (float)x.i32[i])
LANES_OF(__m256i, _mm256_cvtepu16_epi32, (__m128i x), 8, u32, x.u16[i])
LANES_OF(__m512i, _mm512_cvtepu16_epi32, (__m256i x), 16, u32, x.u16[i])
LANES_OF(__m256i, _mm256_cvtepi8_epi32, (__m128i x), 8, i32, x.i8[i])
LANES_OF(__m512i, _mm512_cvtepi8_epi32, (__m128i x), 16, i32, x.i8[i])
LANES_OF(__m256i, _mm512_cvtepi32_epi16, (__m512i x), 16, u16, (uint16_t)x.u32[i])
LANES_OF(__m256, _mm256_cvtph_ps, (__m128i x), 8, f, si_of_half(x.u16[i]))
LANES_OF(__m512, _mm512_cvtph_ps, (__m256i x), 16, f, si_of_half(x.u16[i]))
LANES_OF(__m128i, _mm256_cvtps_ph, (__m256 x, int mode), 8, u16, si_half(x.f[i], mode))
LANES_OF(__m256i, _mm512_cvtps_ph, (__m512 x, int mode), 16, u16, si_half(x.f[i], mode))
LANES_OF(__m256bh, _mm512_cvtneps_pbh, (__m512 x), 16, u16, si_bf16(x.f[i]))
LANES_OF(__m512, _mm512_dpbf16_ps, (__m512 sum, __m512bh a, __m512bh b), 16, f, si_pair(sum.f[i], a.u32[i], b.u32[i]))

/* ---- moves. Most stay within lanes of 128 bits. ---------------------------------------------------------------------------- */

LANES_OF(__m256i, _mm256_blendv_epi8, (__m256i a, __m256i b, __m256i mask), 32, u8, mask.i8[i] < 0 ? b.u8[i] : a.u8[i])

/* PACKUSDW: each half holds four numbers of a, then four of b, cut to 16 bits without a sign. */
STAND_IN uint16_t si_packed(int32_t x) { return (uint16_t)(x < 0 ? 0 : x > UINT16_MAX ? UINT16_MAX : x); }
LANES_OF(__m256i, _mm256_packus_epi32, (__m256i a, __m256i b), 16, u16, si_packed((i & 4 ? b : a).i32[(i & 8) / 2 + (i & 3)]))

LANES_OF(__m256i, _mm256_permute4x64_epi64, (__m256i x, int order), 4, u64, x.u64[order >> 2 * i & 3])

LANES_OF(__m512i, _mm512_permutexvar_epi16, (__m512i places, __m512i x), 32, u16, x.u16[places.u16[i] & 31])

/* VPERM2F128: for each half two bits that select a half of a or b, or bit 3 for zeros. */
STAND_IN float si_half_of(__m256 a, __m256 b, int select, int i) {
    return select & 8 ? 0 : (select & 2 ? b : a).f[4 * (select & 1) + i];
}
LANES_OF(__m256, _mm256_permute2f128_ps, (__m256 a, __m256 b, int order), 8, f, si_half_of(a, b, order >> (i & 4), i & 3))

LANES_OF(__m256, _mm256_shuffle_ps, (__m256 a, __m256 b, int order), 8, f, (i & 2 ? b : a).f[(i & 4) + (order >> 2 * (i & 3) & 3)])
LANES_OF(__m256, _mm256_unpacklo_ps, (__m256 a, __m256 b), 8, f, (i & 1 ? b : a).f[(i & 4) + (i & 3) / 2])
LANES_OF(__m256, _mm256_unpackhi_ps, (__m256 a, __m256 b), 8, f, (i & 1 ? b : a).f[(i & 4) + 2 + (i & 3) / 2])
LANES_OF(__m512i, _mm512_unpacklo_epi32, (__m512i a, __m512i b), 16, u32, (i & 1 ? b : a).u32[(i & 12) + (i & 3) / 2])
LANES_OF(__m512i, _mm512_unpackhi_epi32, (__m512i a, __m512i b), 16, u32, (i & 1 ? b : a).u32[(i & 12) + 2 + (i & 3) / 2])
LANES_OF(__m512i, _mm512_unpacklo_epi64, (__m512i a, __m512i b), 8, u64, (i & 1 ? b : a).u64[i & 6])
LANES_OF(__m512i, _mm512_unpackhi_epi64, (__m512i a, __m512i b), 8, u64, (i & 1 ? b : a).u64[(i & 6) + 1])

/* VSHUFI32X4: the lower two lanes of 128 bits come from a, the upper two from b. */
LANES_OF(__m512i, _mm512_shuffle_i32x4, (__m512i a, __m512i b, int order), 16, u32,
         (i & 8 ? b : a).u32[4 * (order >> i / 4 * 2 & 3) + (i & 3)])

#ifdef USE_AMX
#include "amx.h"
#endif

#endif
