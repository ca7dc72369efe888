/* The same as check.c for the intrinsics of NEON: built once against the stand-ins, and once against those of a compiler for ARM or
   of SIMDe, it must print the same lines. */

#ifdef USE_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>
#else
#include <arm_neon.h>
#endif
#include "check.h"

#define F(NAME, EXPRESSION) CHECK(NAME, float32x4_t, float32x4_t, EXPRESSION)
#define COMPARED(NAME, EXPRESSION) CHECK(NAME, float32x4_t, uint32x4_t, EXPRESSION)
#define U(NAME, EXPRESSION) CHECK(NAME, uint32x4_t, uint32x4_t, EXPRESSION)
#define S(NAME, EXPRESSION) CHECK(NAME, int32x4_t, int32x4_t, EXPRESSION)

static float32x4_t stored(float32x4_t x) {
    float to[4];
    vst1q_f32(to, x);
    return vld1q_f32(to);
}

static uint16x4_t stored_cells(uint16x4_t x) {
    uint16_t to[4];
    vst1_u16(to, x);
    return vld1_u16(to);
}

static void of_floats(void) {
    F(add, stored(vaddq_f32(a, b)))
    F(sub, vsubq_f32(a, b))
    F(mul, vmulq_f32(a, b))
    F(div, vdivq_f32(a, b))
    F(min, vminq_f32(a, b))
    F(fma, vfmaq_f32(a, b, c))
    F(fms, vfmsq_f32(a, b, c))
    F(round, vrndnq_f32(a))
    F(dup, vaddq_f32(vdupq_n_f32(1.5f), a))
    COMPARED(neg, vreinterpretq_u32_f32(vnegq_f32(a)))
    COMPARED(eq, vceqq_f32(a, b))
    COMPARED(eq_self, vceqq_f32(a, a))
    COMPARED(gt, vcgtq_f32(a, b))
    COMPARED(lt, vcltq_f32(a, b))
    COMPARED(select_floats, vreinterpretq_u32_f32(vbslq_f32(vreinterpretq_u32_f32(c), a, b)))
    CHECK(to_whole, float32x4_t, int32x4_t, vcvtq_s32_f32(a))
    CHECK(of_whole, int32x4_t, float32x4_t, vcvtq_f32_s32(a))
    CHECK(to_half, float32x4_t, uint16x4_t, vreinterpret_u16_f16(vcvt_f16_f32(a)))
    CHECK(of_half, uint16x4_t, uint32x4_t, vreinterpretq_u32_f32(vcvt_f32_f16(vreinterpret_f16_u16(a))))
    CHECK(casts, uint32x4_t, uint32x4_t, vreinterpretq_u32_f32(vreinterpretq_f32_u32(a)))
    CHECK(cast_signed, int32x4_t, uint32x4_t, vreinterpretq_u32_f32(vreinterpretq_f32_s32(a)))
}

static void of_whole_numbers(void) {
    U(add_u32, vaddq_u32(vaddq_u32(a, b), vdupq_n_u32(70000)))
    U(and_u32, vandq_u32(a, b))
    U(or_u32, vorrq_u32(a, b))
    U(tst, vtstq_u32(a, b))
    U(select, vbslq_u32(a, b, c))
    U(left_16, vshlq_n_u32(a, 16))
    U(right_16, vshrq_n_u32(a, 16))
    U(load, vaddq_u32(vld1q_u32(operands[3]), a))
    U(trn1, vtrn1q_u32(a, b))
    U(trn2, vtrn2q_u32(a, b))
    CHECK(trn1_u64, uint32x4_t, uint64x2_t, vtrn1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)))
    CHECK(trn2_u64, uint64x2_t, uint32x4_t, vreinterpretq_u32_u64(vtrn2q_u64(a, b)))
    CHECK(sum_of_lanes, uint32x4_t, uint32_t, vaddvq_u32(a))
    CHECK(narrow, uint32x4_t, uint16x4_t, stored_cells(vmovn_u32(a)))
    CHECK(widen, uint16x4_t, uint32x4_t, vshll_n_u16(a, 16))
    CHECK(words, uint32x4_t, uint32x4_t, vreinterpretq_u32_u16(vld1q_u16((const uint16_t *)operands[3])))
    S(add_s32, vaddq_s32(vaddq_s32(a, b), vdupq_n_s32(-70000)))
    S(sub_s32, vsubq_s32(a, b))
    S(left_23, vshlq_n_s32(a, 23))
    S(right_1, vshrq_n_s32(a, 1))
    S(load_s32, vaddq_s32(vld1q_s32((const int32_t *)operands[3]), a))
    CHECK(gt_s32, int32x4_t, uint32x4_t, vcgtq_s32(a, b))
    CHECK(products_s16, int16x8_t, int32x4_t, vmull_s16(vget_low_s16(a), vget_high_s16(b)))
    CHECK(longer_s8, int8x16_t, int16x8_t, vmovl_s8(vget_low_s8(a)))
    CHECK(longer_u8, uint8x16_t, int16x8_t, vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(a))))
    CHECK(longer_low_u8, uint8x16_t, int16x8_t, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(a))))
    S(pairs_s32, vpaddq_s32(a, b))
    CHECK(pairs, int16x8_t, int16x8_t, vpaddq_s16(a, b))
    CHECK(long_pairs, int16x8_t, int32x4_t, vpaddlq_s16(a))
    CHECK(products, int8x16_t, int16x8_t, vmull_s8(vget_low_s8(a), vget_low_s8(b)))
    CHECK(high_products, int8x16_t, int16x8_t, vmull_high_s8(a, b))
    CHECK(and_or_u8, uint8x16_t, uint8x16_t, vorrq_u8(vandq_u8(a, vdupq_n_u8(15)), vshlq_n_u8(b, 4)))
    CHECK(left_u8, uint8x16_t, uint8x16_t, vshlq_u8(a, vdupq_n_s8(-3)))
    CHECK(left_u32, uint32x4_t, float32x4_t, vcvtq_f32_u32(vshlq_u32(a, vdupq_n_s32(-8))))
    CHECK(right_4, uint8x16_t, uint8x16_t, vshrq_n_u8(a, 4))
    CHECK(bytes, uint8x16_t, int8x16_t, vreinterpretq_s8_u8(vld1q_u8((const uint8_t *)operands[3])))
    CHECK(casts_of_bytes, int32x4_t, int8x16_t, vreinterpretq_s8_s32(a))
    CHECK(words_of_bytes, uint8x16_t, uint32x4_t, vreinterpretq_u32_u8(a))
}

int main(void) {
    of_floats();
    of_whole_numbers();
    return 0;
}
