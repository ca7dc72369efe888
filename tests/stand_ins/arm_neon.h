/* Plain-C stand-ins for the intrinsics of NEON, as immintrin.h has them for x86-64.

   Every function is written from the operation of its instruction in the "Arm Architecture Reference Manual for A-profile
   architecture", chapter C7, with the FPCR that a process starts with: nearest even, denormal numbers count, NaN keep their
   payload. Only the intrinsics that the kernels use are here. */

#ifndef FOREDRAFT_NEON
#define FOREDRAFT_NEON

#include "lanes.h"

typedef float float32_t;
typedef struct { float f[4]; } float32x4_t;
typedef struct { uint16_t u16[4]; } float16x4_t, uint16x4_t;
typedef struct { uint16_t u16[8]; } uint16x8_t;
typedef struct { uint32_t u32[4]; } uint32x4_t;
typedef struct { uint64_t u64[2]; } uint64x2_t;
typedef struct { uint8_t u8[8]; } uint8x8_t;
typedef struct { uint8_t u8[16]; } uint8x16_t;
typedef struct { int8_t i8[8]; } int8x8_t;
typedef struct { int8_t i8[16]; } int8x16_t;
typedef struct { int16_t i16[4]; } int16x4_t;
typedef struct { int16_t i16[8]; } int16x8_t;
typedef struct { int32_t i32[4]; } int32x4_t;

/* ---- loads, stores, constants, casts --------------------------------------------------------------------------------------- */

/* Defines a function that copies the bytes at the address FROM. */
#define COPIED(RESULT, NAME, ARGUMENT, FROM) \
    STAND_IN RESULT NAME(ARGUMENT) { \
        RESULT out; \
        memcpy(&out, FROM, sizeof out); \
        return out; \
    }
COPIED(float32x4_t, vld1q_f32, const float *from, from)
COPIED(int32x4_t, vld1q_s32, const int32_t *from, from)
COPIED(uint32x4_t, vld1q_u32, const uint32_t *from, from)
COPIED(uint16x8_t, vld1q_u16, const uint16_t *from, from)
COPIED(uint16x4_t, vld1_u16, const uint16_t *from, from)
COPIED(uint8x16_t, vld1q_u8, const uint8_t *from, from)
COPIED(float32x4_t, vreinterpretq_f32_u32, uint32x4_t x, &x)
COPIED(float32x4_t, vreinterpretq_f32_s32, int32x4_t x, &x)
COPIED(uint32x4_t, vreinterpretq_u32_f32, float32x4_t x, &x)
COPIED(uint32x4_t, vreinterpretq_u32_u16, uint16x8_t x, &x)
COPIED(uint32x4_t, vreinterpretq_u32_u64, uint64x2_t x, &x)
COPIED(uint64x2_t, vreinterpretq_u64_u32, uint32x4_t x, &x)
COPIED(int8x16_t, vreinterpretq_s8_s32, int32x4_t x, &x)
COPIED(int8x16_t, vreinterpretq_s8_u8, uint8x16_t x, &x)
COPIED(uint32x4_t, vreinterpretq_u32_u8, uint8x16_t x, &x)
COPIED(int16x8_t, vreinterpretq_s16_u16, uint16x8_t x, &x)
COPIED(float16x4_t, vreinterpret_f16_u16, uint16x4_t x, &x)
COPIED(uint16x4_t, vreinterpret_u16_f16, float16x4_t x, &x)
COPIED(int8x8_t, vget_low_s8, int8x16_t x, &x)
COPIED(int16x4_t, vget_low_s16, int16x8_t x, &x)
COPIED(int16x4_t, vget_high_s16, int16x8_t x, x.i16 + 4)
COPIED(uint8x8_t, vget_low_u8, uint8x16_t x, &x)
COPIED(uint8x8_t, vget_high_u8, uint8x16_t x, x.u8 + 8)

STAND_IN void vst1q_f32(float *to, float32x4_t x) { memcpy(to, &x, sizeof x); }
STAND_IN void vst1_u16(uint16_t *to, uint16x4_t x) { memcpy(to, &x, sizeof x); }

LANES_OF(float32x4_t, vdupq_n_f32, (float x), 4, f, x)
LANES_OF(int8x16_t, vdupq_n_s8, (int8_t x), 16, i8, x)
LANES_OF(uint8x16_t, vdupq_n_u8, (uint8_t x), 16, u8, x)
LANES_OF(int32x4_t, vdupq_n_s32, (int32_t x), 4, i32, x)
LANES_OF(uint32x4_t, vdupq_n_u32, (uint32_t x), 4, u32, x)

/* ---- operations lane by lane ----------------------------------------------------------------------------------------------- */

/* FMIN: NaN if either operand is NaN; -0 is less than 0. */
STAND_IN float si_least(float a, float b) {
    if (si_is_nan(a)) return si_quiet(a);
    if (si_is_nan(b)) return si_quiet(b);
    return a < b || (a == b && si_bits(a) >> 31) ? a : b;
}

/* FCVTZS: towards zero; a number out of range becomes the nearest whole number, NaN becomes 0. */
STAND_IN int32_t si_cut(float x) { return si_is_nan(x) ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : (int32_t)x; }

#define ALL(condition) (condition) ? UINT32_MAX : 0
LANES_OF(float32x4_t, vaddq_f32, (float32x4_t a, float32x4_t b), 4, f, a.f[i] + b.f[i])
LANES_OF(float32x4_t, vsubq_f32, (float32x4_t a, float32x4_t b), 4, f, a.f[i] - b.f[i])
LANES_OF(float32x4_t, vmulq_f32, (float32x4_t a, float32x4_t b), 4, f, a.f[i] * b.f[i])
LANES_OF(float32x4_t, vdivq_f32, (float32x4_t a, float32x4_t b), 4, f, a.f[i] / b.f[i])
LANES_OF(float32x4_t, vfmaq_f32, (float32x4_t sum, float32x4_t a, float32x4_t b), 4, f, fmaf(a.f[i], b.f[i], sum.f[i]))
LANES_OF(float32x4_t, vfmsq_f32, (float32x4_t sum, float32x4_t a, float32x4_t b), 4, f, fmaf(-a.f[i], b.f[i], sum.f[i]))
LANES_OF(float32x4_t, vminq_f32, (float32x4_t a, float32x4_t b), 4, f, si_least(a.f[i], b.f[i]))
LANES_OF(float32x4_t, vnegq_f32, (float32x4_t x), 4, f, si_float(si_bits(x.f[i]) ^ 0x80000000))
LANES_OF(float32x4_t, vrndnq_f32, (float32x4_t x), 4, f, si_is_nan(x.f[i]) ? si_quiet(x.f[i]) : rintf(x.f[i]))
LANES_OF(uint32x4_t, vceqq_f32, (float32x4_t a, float32x4_t b), 4, u32, ALL(a.f[i] == b.f[i]))
LANES_OF(uint32x4_t, vcgtq_f32, (float32x4_t a, float32x4_t b), 4, u32, ALL(a.f[i] > b.f[i]))
LANES_OF(uint32x4_t, vcltq_f32, (float32x4_t a, float32x4_t b), 4, u32, ALL(a.f[i] < b.f[i]))
LANES_OF(uint32x4_t, vcgtq_s32, (int32x4_t a, int32x4_t b), 4, u32, ALL(a.i32[i] > b.i32[i]))
LANES_OF(uint32x4_t, vtstq_u32, (uint32x4_t a, uint32x4_t b), 4, u32, ALL(a.u32[i] & b.u32[i]))
LANES_OF(uint32x4_t, vandq_u32, (uint32x4_t a, uint32x4_t b), 4, u32, a.u32[i] & b.u32[i])
LANES_OF(uint32x4_t, vorrq_u32, (uint32x4_t a, uint32x4_t b), 4, u32, a.u32[i] | b.u32[i])
LANES_OF(uint8x16_t, vandq_u8, (uint8x16_t a, uint8x16_t b), 16, u8, a.u8[i] & b.u8[i])
LANES_OF(uint8x16_t, vorrq_u8, (uint8x16_t a, uint8x16_t b), 16, u8, a.u8[i] | b.u8[i])

/* BSL: the bits of a where the mask is set, else those of b. */
#define CHOSEN(mask, a, b) ((mask) & (a)) | (~(mask) & (b))
LANES_OF(uint32x4_t, vbslq_u32, (uint32x4_t mask, uint32x4_t a, uint32x4_t b), 4, u32, CHOSEN(mask.u32[i], a.u32[i], b.u32[i]))
LANES_OF(float32x4_t, vbslq_f32, (uint32x4_t mask, float32x4_t a, float32x4_t b), 4, f,
         si_float(CHOSEN(mask.u32[i], si_bits(a.f[i]), si_bits(b.f[i]))))

/* Whole numbers wrap around. A shift to the right of a signed number keeps its sign. */
LANES_OF(uint32x4_t, vaddq_u32, (uint32x4_t a, uint32x4_t b), 4, u32, a.u32[i] + b.u32[i])
LANES_OF(int32x4_t, vaddq_s32, (int32x4_t a, int32x4_t b), 4, i32, (int32_t)((uint32_t)a.i32[i] + (uint32_t)b.i32[i]))
LANES_OF(int32x4_t, vsubq_s32, (int32x4_t a, int32x4_t b), 4, i32, (int32_t)((uint32_t)a.i32[i] - (uint32_t)b.i32[i]))
LANES_OF(int32x4_t, vshlq_n_s32, (int32x4_t x, int by), 4, i32, (int32_t)((uint32_t)x.i32[i] << by))
LANES_OF(uint32x4_t, vshlq_n_u32, (uint32x4_t x, int by), 4, u32, x.u32[i] << by)
LANES_OF(int32x4_t, vshrq_n_s32, (int32x4_t x, int by), 4, i32, x.i32[i] < 0 ? ~(~x.i32[i] >> by) : x.i32[i] >> by)
LANES_OF(uint32x4_t, vshrq_n_u32, (uint32x4_t x, int by), 4, u32, x.u32[i] >> by)
LANES_OF(uint8x16_t, vshrq_n_u8, (uint8x16_t x, int by), 16, u8, (uint8_t)(x.u8[i] >> by))
LANES_OF(uint8x16_t, vshlq_n_u8, (uint8x16_t x, int by), 16, u8, (uint8_t)(x.u8[i] << by))

/* USHL: to the left by a signed number of bits, or to the right if it is negative. */
STAND_IN uint32_t si_shifted(uint32_t x, int by, int width) { return by >= width || by <= -width ? 0 : by < 0 ? x >> -by : x << by; }
LANES_OF(uint8x16_t, vshlq_u8, (uint8x16_t x, int8x16_t by), 16, u8, (uint8_t)si_shifted(x.u8[i], by.i8[i], 8))
LANES_OF(uint32x4_t, vshlq_u32, (uint32x4_t x, int32x4_t by), 4, u32, si_shifted(x.u32[i], (int8_t)by.i32[i], 32))

/* ---- conversions ----------------------------------------------------------------------------------------------------------- */

LANES_OF(int32x4_t, vcvtq_s32_f32, (float32x4_t x), 4, i32, si_cut(x.f[i]))
LANES_OF(float32x4_t, vcvtq_f32_s32, (int32x4_t x), 4, f, (float)x.i32[i])
LANES_OF(float32x4_t, vcvtq_f32_u32, (uint32x4_t x), 4, f, (float)x.u32[i])
LANES_OF(int16x8_t, vmovl_s8, (int8x8_t x), 8, i16, x.i8[i])
LANES_OF(uint16x8_t, vmovl_u8, (uint8x8_t x), 8, u16, x.u8[i])
LANES_OF(float32x4_t, vcvt_f32_f16, (float16x4_t x), 4, f, si_of_half(x.u16[i]))
LANES_OF(float16x4_t, vcvt_f16_f32, (float32x4_t x), 4, u16, si_half(x.f[i], 0))
LANES_OF(uint32x4_t, vshll_n_u16, (uint16x4_t x, int by), 4, u32, (uint32_t)x.u16[i] << by)
LANES_OF(uint16x4_t, vmovn_u32, (uint32x4_t x), 4, u16, (uint16_t)x.u32[i])

/* ---- operations across lanes ----------------------------------------------------------------------------------------------- */

/* SMULL, SMULL2: products of bytes. ADDP: sums of neighbours, those of a first. SADDLP: the same in twice the bits. */
LANES_OF(int16x8_t, vmull_s8, (int8x8_t a, int8x8_t b), 8, i16, (int16_t)(a.i8[i] * b.i8[i]))
LANES_OF(int16x8_t, vmull_high_s8, (int8x16_t a, int8x16_t b), 8, i16, (int16_t)(a.i8[8 + i] * b.i8[8 + i]))
STAND_IN int16_t si_neighbours(int16x8_t x, int i) { return (int16_t)(x.i16[2 * i] + x.i16[2 * i + 1]); }
LANES_OF(int16x8_t, vpaddq_s16, (int16x8_t a, int16x8_t b), 8, i16, i < 4 ? si_neighbours(a, i) : si_neighbours(b, i - 4))
STAND_IN int32_t si_sum(int32x4_t x, int i) { return (int32_t)((uint32_t)x.i32[2 * i] + (uint32_t)x.i32[2 * i + 1]); }
LANES_OF(int32x4_t, vpaddq_s32, (int32x4_t a, int32x4_t b), 4, i32, i < 2 ? si_sum(a, i) : si_sum(b, i - 2))
LANES_OF(int32x4_t, vmull_s16, (int16x4_t a, int16x4_t b), 4, i32, a.i16[i] * b.i16[i])
LANES_OF(int32x4_t, vpaddlq_s16, (int16x8_t x), 4, i32, x.i16[2 * i] + x.i16[2 * i + 1])

STAND_IN uint32_t vaddvq_u32(uint32x4_t x) { return x.u32[0] + x.u32[1] + x.u32[2] + x.u32[3]; }

/* TRN1, TRN2: the even or the odd lanes of a and b in turn. */
LANES_OF(uint32x4_t, vtrn1q_u32, (uint32x4_t a, uint32x4_t b), 4, u32, (i & 1 ? b : a).u32[i & 2])
LANES_OF(uint32x4_t, vtrn2q_u32, (uint32x4_t a, uint32x4_t b), 4, u32, (i & 1 ? b : a).u32[(i & 2) + 1])
LANES_OF(uint64x2_t, vtrn1q_u64, (uint64x2_t a, uint64x2_t b), 2, u64, (i & 1 ? b : a).u64[0])
LANES_OF(uint64x2_t, vtrn2q_u64, (uint64x2_t a, uint64x2_t b), 2, u64, (i & 1 ? b : a).u64[1])

#endif
