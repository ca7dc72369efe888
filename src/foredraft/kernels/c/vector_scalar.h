/* The scalar set: vectors of one number. It is the reference that the other sets are compared with, and it runs wherever there is
   a C compiler. fmaf rounds once, as the multiply-add instructions of the other sets do. */

#include <math.h>

#define PAIRED 0
#define UNROLL
#define MOST_ROWS 4
enum {
    LANES = 1, UNPACKED_ROWS = MOST_ROWS, MANY_ROWS = 1 << 30, PACKED_ROWS = 16,
    WIDE_ROWS = MOST_ROWS, SUMS = 64, PAIR_ROWS = 0, AHEAD = 2048,
};

typedef float V;
typedef uint16_t C;

INLINE V v_set(float x) { return x; }
INLINE V v_load(const float *x) { return *x; }
INLINE void v_store(float *to, V x) { *to = x; }
INLINE V v_load_some(const float *x, int64_t count) { return count > 0 ? *x : 0; }
INLINE void v_store_some(float *to, V x, int64_t count) { if (count > 0) *to = x; }
INLINE V v_first(V x, int64_t count) { return count > 0 ? x : 0; }
INLINE V v_add(V a, V b) { return a + b; }
INLINE V v_sub(V a, V b) { return a - b; }
INLINE V v_mul(V a, V b) { return a * b; }
INLINE V v_div(V a, V b) { return a / b; }
INLINE V v_fma(V a, V b, V c) { return fmaf(a, b, c); }
INLINE V v_fnma(V a, V b, V c) { return fmaf(-a, b, c); }
INLINE V v_fms(V a, V b, V c) { return fmaf(a, b, -c); }
INLINE V v_max(V a, V b) { return a > b ? a : b; }
INLINE V v_round(V x) { return rintf(x); }
INLINE unsigned v_above(V a, V b) { return a > b; }
INLINE unsigned v_below(V a, V b) { return a < b; }
INLINE V v_keep(V x, unsigned lanes) { return lanes & 1 ? x : 0; }

/* 2^n for -127 < n < 128, a whole number. */
INLINE float power_of_two(int n) {
    union { int32_t bits; float value; } power = {.bits = (n + 127) << 23};
    return power.value;
}

INLINE V v_scale(V x, V n) {
    const int whole = n == n ? (int)(n < 254 ? n : 254) : 0, half = whole >> 1;
    return x * power_of_two(half) * power_of_two(whole - half);
}

INLINE C c_load(const uint16_t *x) { return *x; }
INLINE void c_store(uint16_t *to, C x) { *to = x; }
INLINE V v_of_bf16(C x) { return float_of_bf16(x); }
INLINE C bf16_of_v(V x) { return bf16_of_float(x); }
INLINE V v_of_half(C x) { return float_of_half(x); }
INLINE C half_of_v(V x) { return half_of_float(x); }

/* The first or the second input of every lane, of pairs of bf16. */
INLINE V v_even(const uint16_t *x) { return float_of_bf16(x[0]); }
INLINE V v_odd(const uint16_t *x) { return float_of_bf16(x[1]); }

/* Four bytes of every lane, and their products with four signed bytes, which are added as whole numbers. */
typedef struct { uint8_t at[4]; } B;
typedef int32_t Q;

INLINE B b_load(const uint8_t *x) { return (B){{x[0], x[1], x[2], x[3]}}; }
INLINE B b_low(B x) { return (B){{x.at[0] & 15, x.at[1] & 15, x.at[2] & 15, x.at[3] & 15}}; }
INLINE B b_high(B x) { return (B){{x.at[0] >> 4, x.at[1] >> 4, x.at[2] >> 4, x.at[3] >> 4}}; }
INLINE Q q_zero(void) { return 0; }
INLINE Q q_dot(Q sum, B w, const int8_t *x) {
    for (int i = 0; i < 4; i++) sum += w.at[i] * x[i];
    return sum;
}
INLINE V q_sum(Q sum, int32_t more) { return (float)(sum + more); }

/* The same for bytes above 15, whose products take more bits. */
INLINE Q wide_dot(Q sum, B w, const int8_t *x) { return q_dot(sum, w, x); }
INLINE V wide_sum(Q sum, int32_t more) { return q_sum(sum, more); }

/* Bytes: some of their bits; the lower and the upper half joined; byte k of every lane; signed bytes as numbers. */
INLINE B b_bits(B x, int shift, int mask) {
    for (int i = 0; i < 4; i++) x.at[i] = x.at[i] >> shift & mask;
    return x;
}
INLINE B b_join(B low, B high) {
    for (int i = 0; i < 4; i++) low.at[i] |= high.at[i] << 4;
    return low;
}
INLINE V v_of_byte(B x, int k) { return x.at[k]; }
INLINE V v_of_s8(const int8_t *x) { return *x; }

INLINE void v_transpose(V *x) { (void)x; }

/* Lays out the bf16 numbers d to d + 2 LANES - 1 of LANES rows: one vector per number. */
INLINE void w_transpose(const uint16_t *const *rows, int64_t d, V *out) { out[0] = v_even(rows[0] + d), out[1] = v_odd(rows[0] + d); }
