/* Prints a digest of what every intrinsic of the kernels computes on random and on special operands. Built once against the
   stand-ins and once against the intrinsics of a compiler or of SIMDe, it must print the same lines.

   USE_AVX512, USE_VNNI and USE_BF16 add the intrinsics of these extensions. */

#ifdef USE_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#ifdef USE_AVX512
#include <simde/x86/avx512.h>
#endif
#define _MM_FROUND_NO_EXC 8
#else
#include <immintrin.h>
#endif
#include "check.h"

#define F8(NAME, EXPRESSION) CHECK(NAME, __m256, __m256, EXPRESSION)
#define I8(NAME, EXPRESSION) CHECK(NAME, __m256i, __m256i, EXPRESSION)
#define F16(NAME, EXPRESSION) CHECK(NAME, __m512, __m512, EXPRESSION)
#define I16(NAME, EXPRESSION) CHECK(NAME, __m512i, __m512i, EXPRESSION)

static __m256i stored_some(__m256 x, __m256i mask) {
    float to[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    _mm256_maskstore_ps(to, mask, x);
    return _mm256_loadu_si256((const __m256i *)to);
}

static __m128i stored_low(__m128i x) {
    __m128i to;
    _mm_storeu_si128(&to, x);
    return _mm_loadu_si128(&to);
}

static __m256 stored_floats(__m256 x) {
    float to[8];
    _mm256_storeu_ps(to, x);
    return _mm256_loadu_ps(to);
}

static __m256i stored(__m256i x) {
    __m256i to;
    _mm256_storeu_si256(&to, x);
    return to;
}

static void avx2(void) {
    F8(add, stored_floats(_mm256_add_ps(a, b)))
    F8(sub, _mm256_sub_ps(a, b))
    F8(mul, _mm256_mul_ps(a, b))
    F8(div, _mm256_div_ps(a, b))
    F8(max, _mm256_max_ps(a, b))
    F8(min, _mm256_min_ps(a, b))
    F8(fmadd, _mm256_fmadd_ps(a, b, c))
    F8(fnmadd, _mm256_fnmadd_ps(a, b, c))
    F8(fmsub, _mm256_fmsub_ps(a, b, c))
    F8(round, _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
    F8(set1_ps, _mm256_add_ps(_mm256_set1_ps(1.5f), a))
    F8(unpacklo, _mm256_unpacklo_ps(a, b))
    F8(unpackhi, _mm256_unpackhi_ps(a, b))
    F8(shuffle_44, _mm256_shuffle_ps(a, b, 0x44))
    F8(shuffle_EE, _mm256_shuffle_ps(a, b, 0xEE))
    F8(shuffle_1B, _mm256_shuffle_ps(a, b, 0x1B))
    F8(permute2f128_20, _mm256_permute2f128_ps(a, b, 0x20))
    F8(permute2f128_31, _mm256_permute2f128_ps(a, b, 0x31))
    F8(permute2f128_83, _mm256_permute2f128_ps(a, b, 0x83))
    CHECK(and_ps, __m256, __m256i, _mm256_castps_si256(_mm256_and_ps(a, b)))
    CHECK(cmp_gt, __m256, int, _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)))
    CHECK(cmp_lt, __m256, int, _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)))
    CHECK(cmp_unord, __m256, int, _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)))
    CHECK(cvtps_epi32, __m256, __m256i, _mm256_cvtps_epi32(a))
    CHECK(cvtps_ph, __m256, __m128i, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT))
    CHECK(cvtph_ps, __m128i, __m256i, _mm256_castps_si256(_mm256_cvtph_ps(a)))
    CHECK(cvtepi32_ps, __m256i, __m256, _mm256_cvtepi32_ps(a))
    CHECK(cvtepu16_epi32, __m128i, __m256i, _mm256_cvtepu16_epi32(a))
    CHECK(castsi256_si128, __m256i, __m128i, stored_low(_mm256_castsi256_si128(a)))
    CHECK(maskload, __m256i, __m256, _mm256_maskload_ps((const float *)operands[3], a))
    CHECK(maskstore, __m256i, __m256i, stored_some(_mm256_castsi256_ps(b), a))
    I8(add_epi16, _mm256_add_epi16(a, b))
    I8(add_epi32, _mm256_add_epi32(a, b))
    I8(sub_epi32, _mm256_sub_epi32(a, b))
    I8(and_si256, _mm256_and_si256(a, b))
    I8(or_si256, stored(_mm256_or_si256(a, b)))
    I8(cmpeq, _mm256_cmpeq_epi32(a, b))
    I8(cmpgt, _mm256_cmpgt_epi32(a, b))
    I8(blendv, _mm256_blendv_epi8(a, b, c))
    I8(maddubs, _mm256_maddubs_epi16(a, b))
    I8(madd, _mm256_madd_epi16(a, b))
    I8(packus, _mm256_packus_epi32(a, b))
    I8(permute4x64, _mm256_permute4x64_epi64(a, 0x08))
    I8(permute4x64_1B, _mm256_permute4x64_epi64(a, 0x1B))
    I8(slli_16, _mm256_slli_epi32(a, 16))
    I8(slli_32, _mm256_slli_epi32(a, 32))
    I8(srli_16, _mm256_srli_epi32(a, 16))
    I8(srli_4, _mm256_srli_epi16(a, 4))
    I8(srai_1, _mm256_srai_epi32(a, 1))
    I8(srai_40, _mm256_srai_epi32(a, 40))
    I8(slli_epi16, _mm256_slli_epi16(a, 4))
    I8(srai_epi16, _mm256_srai_epi16(a, 8))
    I8(srl_epi16, _mm256_srl_epi16(a, _mm_cvtsi32_si128(3)))
    I8(srlv_epi32, _mm256_srlv_epi32(a, _mm256_and_si256(b, _mm256_set1_epi32(63))))
    CHECK(cvtepi8_epi32, __m128i, __m256i, _mm256_cvtepi8_epi32(a))
    CHECK(loadl, __m128i, __m256i, _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)operands[3])))
    I8(setr, _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8))
    I8(sets, _mm256_add_epi32(_mm256_set1_epi8(-3), _mm256_set1_epi16(-300)))
    I8(set1, _mm256_add_epi32(_mm256_setzero_si256(), _mm256_add_epi32(_mm256_set1_epi32(-70000), a)))
}

#ifdef USE_AVX512
static __m512i stored_wide(__m512 x, __mmask16 mask) {
    float to[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    _mm512_mask_storeu_ps(to, mask, x);
    return _mm512_loadu_si512(to);
}

static __m512 stored_floats_512(__m512 x) {
    float to[16];
    _mm512_storeu_ps(to, x);
    return _mm512_loadu_ps(to);
}

static void avx512(void) {
    I16(slli_epi16_512, _mm512_slli_epi16(a, 4))
    I16(srai_epi16_512, _mm512_srai_epi16(a, 8))
    I16(srl_epi16_512, _mm512_srl_epi16(a, _mm_cvtsi32_si128(3)))
    I16(srlv_epi32_512, _mm512_srlv_epi32(a, _mm512_and_si512(b, _mm512_set1_epi32(63))))
    I16(sub_epi32_512, _mm512_sub_epi32(a, b))
    I16(permutexvar_epi16, _mm512_permutexvar_epi16(a, b))
    CHECK(cvtepi8_epi32_512, __m128i, __m512i, _mm512_cvtepi8_epi32(a))
    CHECK(broadcast_i64x4, __m256i, __m512i, _mm512_broadcast_i64x4(a))
    CHECK(setr_epi16, __m256i, __m256i, _mm256_add_epi16(_mm256_setr_epi16(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, -13, -14, 15, 16), a))
    F16(add_512, stored_floats_512(_mm512_add_ps(a, b)))
    F16(sub_512, _mm512_sub_ps(a, b))
    F16(mul_512, _mm512_mul_ps(a, b))
    F16(div_512, _mm512_div_ps(a, b))
    F16(max_512, _mm512_max_ps(a, b))
    F16(min_512, _mm512_min_ps(a, b))
    F16(fmadd_512, _mm512_fmadd_ps(a, b, c))
    F16(fnmadd_512, _mm512_fnmadd_ps(a, b, c))
    F16(fmsub_512, _mm512_fmsub_ps(a, b, c))
    F16(roundscale, _mm512_roundscale_ps(a, 0))
    F16(scalef, _mm512_scalef_ps(a, b))
    F16(set1_512, _mm512_add_ps(_mm512_set1_ps(1.5f), a))
    F16(maskz_mov, _mm512_maskz_mov_ps((__mmask16)operands[3][0], a))
    F16(maskz_loadu, _mm512_maskz_loadu_ps((__mmask16)operands[3][0], (const float *)operands[1]))
    CHECK(mask_storeu, __m512, __m512i, stored_wide(a, (__mmask16)operands[3][0]))
    CHECK(cmp_gt_512, __m512, int, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ))
    CHECK(cmp_lt_512, __m512, int, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ))
    CHECK(cmp_unord_512, __m512, int, _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q))
    CHECK(cvtepi32_ps_512, __m512i, __m512, _mm512_cvtepi32_ps(a))
    CHECK(cvtepu16_epi32_512, __m256i, __m512i, _mm512_cvtepu16_epi32(a))
    CHECK(cvtph_ps_512, __m256i, __m512i, _mm512_castps_si512(_mm512_cvtph_ps(a)))
#ifndef USE_SIMDE /* which lacks them */
    CHECK(cvtepi32_epi16_512, __m512i, __m256i, _mm512_cvtepi32_epi16(a))
    CHECK(cvtps_ph_512, __m512, __m256i, _mm512_cvtps_ph(a, 0))
#endif
    I16(add_epi16_512, _mm512_add_epi16(a, b))
    I16(add_epi32_512, _mm512_add_epi32(a, b))
    I16(and_512, _mm512_and_si512(a, b))
    I16(or_512, _mm512_or_si512(a, b))
    I16(casts_512, _mm512_castps_si512(_mm512_castsi512_ps(a)))
    I16(maddubs_512, _mm512_maddubs_epi16(a, b))
    I16(madd_512, _mm512_madd_epi16(a, b))
    I16(mask_mov, _mm512_mask_mov_epi32(a, (__mmask16)operands[3][0], b))
    I16(sets_512, _mm512_add_epi32(_mm512_set1_epi8(-3), _mm512_set1_epi16(-300)))
    I16(set1_epi32_512, _mm512_add_epi32(_mm512_setzero_si512(), _mm512_set1_epi32(-70000)))
    I16(shuffle_88, _mm512_shuffle_i32x4(a, b, 0x88))
    I16(shuffle_DD, _mm512_shuffle_i32x4(a, b, 0xDD))
    I16(slli_16_512, _mm512_slli_epi32(a, 16))
    I16(srli_16_512, _mm512_srli_epi32(a, 16))
    I16(srli_4_512, _mm512_srli_epi16(a, 4))
    I16(unpackhi_epi32, _mm512_unpackhi_epi32(a, b))
    I16(unpackhi_epi64, _mm512_unpackhi_epi64(a, b))
    I16(unpacklo_epi32, _mm512_unpacklo_epi32(a, b))
    I16(unpacklo_epi64, _mm512_unpacklo_epi64(a, b))
}
#endif

#ifdef USE_VNNI
static void vnni(void) { I16(dpbusd, _mm512_dpbusd_epi32(a, b, c)) }
#endif

#ifdef USE_BF16
static __m512bh bf16_of(__m512 x) {
    uint32_t words[WORDS];
    __m512bh cells;
    memcpy(words, &x, sizeof words);
#ifdef EXACT
    for (int i = 0; i < WORDS; i++) words[i] |= words[(i + 1) % WORDS] >> 16;
#endif
    memcpy(&cells, words, sizeof cells);
    return cells;
}

static void bf16(void) {
#ifndef USE_SIMDE
    CHECK(cvtneps_pbh, __m512, __m256bh, _mm512_cvtneps_pbh(a))
#endif
    CHECK(dpbf16, __m512, __m512, _mm512_dpbf16_ps(a, bf16_of(b), bf16_of(c)))
}
#endif

int main(void) {
    avx2();
#ifdef USE_AVX512
    avx512();
#endif
#ifdef USE_VNNI
    vnni();
#endif
#ifdef USE_BF16
    bf16();
#endif
    return 0;
}
