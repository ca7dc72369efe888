/* Numbers of 16 bits, and small helpers. Every other file of this folder uses them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline, unused))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of_bf16(uint16_t x) { return float_of_bits((uint32_t)x << 16); }

/* Rounds to the nearest bfloat16, ties to even. NaN stays NaN. */
INLINE uint16_t bf16_of_float(float x) {
    const uint32_t bits = bits_of_float(x), upper = bits >> 16;
    return (uint16_t)(x == x ? (bits + 0x7FFF + (upper & 1)) >> 16 : upper | 0x40);
}

INLINE float float_of_half(uint16_t x) {
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = x & 0x7FFF;
    if (magnitude < 0x400) { /* zero, or a denormal number: magnitude times 2^-24 */
        const float value = (float)magnitude * 0x1p-24f;
        return sign ? -value : value;
    }
    if (magnitude >= 0x7C00) return float_of_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13 | (magnitude > 0x7C00 ? 0x400000 : 0));
    return float_of_bits(sign | ((magnitude << 13) + 0x38000000));
}

/* Rounds to the nearest float16, ties to even. NaN stays NaN; numbers of 65520 and above become infinite. */
INLINE uint16_t half_of_float(float x) {
    const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
    if (magnitude >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (magnitude < 0x38800000) { /* the result is denormal: adding 0.5 rounds to a multiple of 2^-24 */
        const uint32_t sum = bits_of_float(float_of_bits(magnitude) + 0.5f);
        return (uint16_t)(sign | (sum - 0x3F000000));
    }
    return (uint16_t)(sign | (magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}
