/* Operands, and the digests of results, of check.c and check_neon.c. With EXACT, all floats are small whole numbers: no operation
   rounds, and nothing depends on how. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { ROUNDS = 3000, WORDS = 16 };

static uint64_t state = 1;

static uint32_t word(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static const uint32_t SPECIAL[] = {
    0, 0x80000000, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x00008000, /* zeros, denormal numbers, the least normal one */
    0x3F800000, 0xBF800000, 0x3F000000, 0x3FC00000, 0x40200000, 0x3F807FFF, 0x3F808000, 0x3F818000, /* 1, and halves between */
    0x4EFFFFFF, 0x4F000000, 0xCF000000, 0xCF000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, /* 2^31, and the largest */
    0x7FC00000, 0xFFC01234, 0x7F800001, 0xFFFFFFFF, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x33000000, /* NaN; the ends of float16 */
    0x33000001, 0x387FE000, 0x38800000,
};

#ifdef EXACT
static const uint32_t WHOLE[] = {0x3F800000, 0xBF800000, 0x40000000, 0x40400000, 0xC0A00000, 0x40E00000, 0xC1000000}; /* 1 to 8 */
#endif

static int is_nan(uint32_t bits) { return (bits & 0x7FFFFFFF) > 0x7F800000; }

/* A third of the numbers are any bits, a third are numbers near 1, a third are special. */
static uint32_t number(void) {
    const uint32_t kind = word() % 3;
    if (kind == 0) return word();
    if (kind == 1) return 0x3D000000 + word() % 0x06000000 + (word() & 0x80000000);
    return SPECIAL[word() % (sizeof SPECIAL / sizeof *SPECIAL)];
}

static uint32_t operands[4][WORDS];

static void draw(int is_float) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < WORDS; j++) {
            uint32_t bits = is_float ? number() : word() % 4 ? word() : SPECIAL[word() % 24];
#ifdef EXACT
            if (is_float) bits = WHOLE[bits % (sizeof WHOLE / sizeof *WHOLE)];
#endif
            operands[i][j] = bits;
        }
}

static uint64_t digest;

/* Adds a result. No instruction set promises which NaN an operation of floats returns, so all are one. */
static void add(const void *result, size_t size, int is_float) {
    for (size_t i = 0; i < size; i += 4) {
        uint32_t bits = 0;
        memcpy(&bits, (const char *)result + i, size - i < 4 ? size - i : 4);
        if (is_float && is_nan(bits)) bits = 0x7FC00000;
        digest = (digest ^ bits) * 1099511628211u;
    }
}

static int holds_floats(const char *type) {
    return strcmp(type, "__m256") == 0 || strcmp(type, "__m512") == 0 || strcmp(type, "float32x4_t") == 0;
}

/* Runs an expression on operands a, b, c of TYPE, and prints the digest of its results. */
#define CHECK(NAME, TYPE, RESULT, EXPRESSION) \
    state = 1, digest = 14695981039346656037u; \
    for (int round = 0; round < ROUNDS; round++) { \
        draw(holds_floats(#TYPE)); \
        TYPE a, b, c; \
        memcpy(&a, operands[0], sizeof a), memcpy(&b, operands[1], sizeof b), memcpy(&c, operands[2], sizeof c); \
        const RESULT result = EXPRESSION; \
        (void)a, (void)b, (void)c; \
        add(&result, sizeof result, holds_floats(#RESULT)); \
    } \
    printf(#NAME " %016llx\n", (unsigned long long)digest);
