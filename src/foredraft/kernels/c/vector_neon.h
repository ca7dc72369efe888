/* The NEON set, which every 64-bit ARM processor has: vectors of 4 numbers. MOST_ROWS, WIDE_ROWS and SUMS follow from its 32
   registers. The set has run in an emulator only, so nothing here was chosen by times. */

#include <arm_neon.h>

#define PAIRED 0
#define UNROLL _Pragma("GCC unroll 32")
#define MOST_ROWS 6
enum {
    LANES = 4, UNPACKED_ROWS = MOST_ROWS, MANY_ROWS = 1 << 30, PACKED_ROWS = 16,
    WIDE_ROWS = 2, SUMS = 24, PAIR_ROWS = 0, AHEAD = 6144,
};

typedef float32x4_t V;
typedef uint16x4_t C;

/* All bits set in the first `count` lanes. */
INLINE uint32x4_t first_of(int64_t count) {
    static const int32_t lanes[] = {0, 1, 2, 3};
    return vcgtq_s32(vdupq_n_s32((int32_t)(count < LANES ? count : LANES)), vld1q_s32(lanes));
}

/* The lanes of a number of four bits. */
INLINE uint32x4_t bits_of_lanes(void) {
    static const uint32_t bits[] = {1, 2, 4, 8};
    return vld1q_u32(bits);
}

INLINE V masked(V x, uint32x4_t kept) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), kept)); }

INLINE V v_set(float x) { return vdupq_n_f32(x); }
INLINE V v_load(const float *x) { return vld1q_f32(x); }
INLINE void v_store(float *to, V x) { vst1q_f32(to, x); }

INLINE V v_load_some(const float *x, int64_t count) {
    float four[LANES] = {0};
    if (count >= LANES) return v_load(x);
    for (int64_t i = 0; i < count; i++) four[i] = x[i];
    return v_load(four);
}

INLINE void v_store_some(float *to, V x, int64_t count) {
    float four[LANES];
    if (count >= LANES) {
        v_store(to, x);
        return;
    }
    v_store(four, x);
    for (int64_t i = 0; i < count; i++) to[i] = four[i];
}

INLINE V v_first(V x, int64_t count) { return masked(x, first_of(count)); }
INLINE V v_add(V a, V b) { return vaddq_f32(a, b); }
INLINE V v_sub(V a, V b) { return vsubq_f32(a, b); }
INLINE V v_mul(V a, V b) { return vmulq_f32(a, b); }
INLINE V v_div(V a, V b) { return vdivq_f32(a, b); }
INLINE V v_fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
INLINE V v_fnma(V a, V b, V c) { return vfmsq_f32(c, a, b); }
INLINE V v_fms(V a, V b, V c) { return vfmaq_f32(vnegq_f32(c), a, b); }
/* The maximum instruction makes every NaN win. The other sets return b if either number is NaN. */
INLINE V v_max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE V v_round(V x) { return vrndnq_f32(x); }
INLINE unsigned lanes_of(uint32x4_t all) { return vaddvq_u32(vandq_u32(all, bits_of_lanes())); }
INLINE unsigned v_above(V a, V b) { return lanes_of(vcgtq_f32(a, b)); }
INLINE unsigned v_below(V a, V b) { return lanes_of(vcltq_f32(a, b)); }
INLINE V v_keep(V x, unsigned lanes) { return masked(x, vtstq_u32(vdupq_n_u32(lanes), bits_of_lanes())); }

INLINE V power_of_two(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }

INLINE V v_scale(V x, V n) {
    const int32x4_t whole = vcvtq_s32_f32(vminq_f32(n, v_set(254))), half = vshrq_n_s32(whole, 1);
    return v_mul(v_mul(x, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
}

INLINE C c_load(const uint16_t *x) { return vld1_u16(x); }
INLINE void c_store(uint16_t *to, C x) { vst1_u16(to, x); }
INLINE V v_of_bf16(C x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
INLINE V v_of_half(C x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
INLINE C half_of_v(V x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }

INLINE C bf16_of_v(V x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), upper = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(upper, vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd), 16);
    return vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(upper, vdupq_n_u32(0x40))));
}

/* The first or the second input of every lane, of pairs of bf16. */
INLINE V even_of(uint32x4_t words) { return vreinterpretq_f32_u32(vshlq_n_u32(words, 16)); }
INLINE V odd_of(uint32x4_t words) { return vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xFFFF0000))); }
INLINE uint32x4_t words_of(const uint16_t *x) { return vreinterpretq_u32_u16(vld1q_u16(x)); }
INLINE V v_even(const uint16_t *x) { return even_of(words_of(x)); }
INLINE V v_odd(const uint16_t *x) { return odd_of(words_of(x)); }

/* Four bytes of every lane, and their products with four signed bytes, which are added as whole numbers. */
typedef uint8x16_t B;
typedef int32x4_t Q;

INLINE B b_load(const uint8_t *x) { return vld1q_u8(x); }
INLINE B b_low(B x) { return vandq_u8(x, vdupq_n_u8(15)); }
INLINE B b_high(B x) { return vshrq_n_u8(x, 4); }
INLINE Q q_zero(void) { return vdupq_n_s32(0); }

INLINE int8x16_t four_bytes(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

INLINE Q q_dot(Q sum, B w, const int8_t *x) {
    const int8x16_t inputs = four_bytes(x), weights = vreinterpretq_s8_u8(w);
    const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(inputs)), high = vmull_high_s8(weights, inputs);
    return vaddq_s32(sum, vpaddlq_s16(vpaddq_s16(low, high)));
}

INLINE V q_sum(Q sum, int32_t more) { return vcvtq_f32_s32(vaddq_s32(sum, vdupq_n_s32(more))); }

/* The same for bytes above 15, whose products take more bits. */
INLINE Q wide_dot(Q sum, B w, const int8_t *x) {
    const int16x4_t four = vget_low_s16(vmovl_s8(vget_low_s8(four_bytes(x))));
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(w))), high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(w)));
    const int32x4_t a = vmull_s16(vget_low_s16(low), four), b = vmull_s16(vget_high_s16(low), four);
    const int32x4_t c = vmull_s16(vget_low_s16(high), four), d = vmull_s16(vget_high_s16(high), four);
    return vaddq_s32(sum, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
}

INLINE V wide_sum(Q sum, int32_t more) { return q_sum(sum, more); }

/* Bytes: some of their bits; the lower and the upper half joined; byte k of every lane; signed bytes as numbers. */
INLINE B b_bits(B x, int shift, int mask) { return vandq_u8(vshlq_u8(x, vdupq_n_s8((int8_t)-shift)), vdupq_n_u8((uint8_t)mask)); }
INLINE B b_join(B low, B high) { return vorrq_u8(low, vshlq_n_u8(high, 4)); }

INLINE V v_of_byte(B x, int k) {
    const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_u8(x), vdupq_n_s32(-8 * k));
    return vcvtq_f32_u32(vandq_u32(shifted, vdupq_n_u32(255)));
}

INLINE V v_of_s8(const int8_t *x) {
    const float four[LANES] = {x[0], x[1], x[2], x[3]};
    return v_load(four);
}

/* Transposes 4 vectors of 4 words. */
INLINE void i_transpose(uint32x4_t *x) {
    const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(x[0], x[1])), b = vreinterpretq_u64_u32(vtrn2q_u32(x[0], x[1]));
    const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(x[2], x[3])), d = vreinterpretq_u64_u32(vtrn2q_u32(x[2], x[3]));
    x[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c)), x[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
    x[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c)), x[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
}

INLINE void v_transpose(V *x) {
    uint32x4_t words[LANES];
    UNROLL
    for (int i = 0; i < LANES; i++) words[i] = vreinterpretq_u32_f32(x[i]);
    i_transpose(words);
    UNROLL
    for (int i = 0; i < LANES; i++) x[i] = vreinterpretq_f32_u32(words[i]);
}

INLINE void w_transpose(const uint16_t *const *rows, int64_t d, V *out) {
    uint32x4_t words[LANES];
    UNROLL
    for (int i = 0; i < LANES; i++) words[i] = words_of(rows[i] + d);
    i_transpose(words);
    UNROLL
    for (int i = 0; i < LANES; i++) out[2 * i] = even_of(words[i]), out[2 * i + 1] = odd_of(words[i]);
}
