/* What the stand-ins of all architectures share: functions lane by lane, and the numbers of a lane. */

#ifndef FOREDRAFT_LANES
#define FOREDRAFT_LANES

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define STAND_IN static inline __attribute__((unused))

/* The kernels inline by force and unroll, for speed. Here that would only make the build slow. */
#ifdef INLINE
#undef INLINE
#define INLINE STAND_IN
#endif

/* Defines a function whose lane i of field FIELD is VALUE. */
#define LANES_OF(RESULT, NAME, ARGUMENTS, COUNT, FIELD, VALUE) \
    STAND_IN RESULT NAME ARGUMENTS { \
        RESULT out; \
        for (int i = 0; i < COUNT; i++) out.FIELD[i] = VALUE; \
        return out; \
    }

STAND_IN uint32_t si_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

STAND_IN float si_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

STAND_IN int si_is_nan(float x) { return (si_bits(x) & 0x7FFFFFFF) > 0x7F800000; }

STAND_IN float si_quiet(float nan) { return si_float(si_bits(nan) | 0x400000); }

/* 2^n, for -127 < n < 128. */
STAND_IN float si_power(int n) { return si_float((uint32_t)(n + 127) << 23); }

/* VCVTPH2PS, FCVTL: exact, denormal numbers too. NaN becomes quiet and keeps its payload. */
STAND_IN float si_of_half(uint16_t x) {
    const int exponent = x >> 10 & 31, fraction = x & 0x3FF;
    const uint32_t sign = (uint32_t)(x >> 15) << 31;
    float size;
    if (exponent == 31) return si_float(sign | 0x7F800000 | (uint32_t)fraction << 13 | (fraction ? 0x400000 : 0));
    if (exponent == 0) size = (float)fraction * 0x1p-24f;
    else size = (float)(1024 + fraction) * si_power(exponent - 25);
    return sign ? -size : size;
}

/* VCVTPS2PH, FCVTN: to nearest even. NaN becomes quiet and keeps the upper bits of its payload. */
STAND_IN uint16_t si_half(float x, int mode) {
    if (mode & 7) abort();
    const uint32_t bits = si_bits(x);
    const uint16_t sign = (uint16_t)(bits >> 31 << 15);
    const float size = fabsf(x);
    if (si_is_nan(x)) return (uint16_t)(sign | 0x7E00 | (bits >> 13 & 0x1FF));
    if (size < 0x1p-14f) return (uint16_t)(sign | (int)rintf(size * 0x1p24f)); /* denormal, in steps of 2^-24 */
    if (size >= 65536) return sign | 0x7C00;
    const int exponent = (int)(bits >> 23 & 0xFF) - 127, steps = (int)rintf(size * si_power(10 - exponent)); /* 1024 to 2048 */
    return (uint16_t)(sign | (((exponent + 14) << 10) + steps)); /* a carry out of the fraction is right, up to infinity */
}

#endif
