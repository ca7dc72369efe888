/* What the processor and the operating system allow. */

#include "numbers.h"

enum { AVX2 = 1, AVX512 = 2, VNNI = 4, BF16_PAIRS = 8, AMX = 16, NEON = 32, INTEL = 64 };

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Returns the registers that the operating system saves. */
static uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Asks the kernel for the tile registers, which it gives to a process on request only. */
static int gets_tiles(void) {
#ifdef __linux__
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
    return 0;
#endif
}

static int has_all(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }

PUBLIC int64_t foredraft_features(void) {
    uint32_t a, b, c, d, most = 0;
    int64_t found = 0;
    if (!__get_cpuid(0, &most, &b, &c, &d)) return 0;
    if (b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx) found |= INTEL;
    if (most < 7 || !__get_cpuid(1, &a, &b, &c, &d)) return found;
    const uint32_t needed = bit_FMA | bit_F16C | bit_OSXSAVE;
    if (!has_all(c, needed)) return found;
    const uint64_t saved = saved_registers();
    enum { YMM = 0x6, ZMM = 0xE6, TILES = 0x60000 };
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    const uint32_t more = a;
    if ((saved & YMM) != YMM || !has_all(b, bit_AVX2)) return found;
    found |= AVX2;
    if ((saved & ZMM) != ZMM || !has_all(b, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ)) return found;
    found |= AVX512;
    if (!has_all(c, bit_AVX512VNNI)) return found;
    found |= VNNI;
    const int has_tiles = (saved & TILES) == TILES && has_all(d, 1u << 24 | 1u << 22); /* AMX-TILE, AMX-BF16 */
    if (more < 1) return found;
    __get_cpuid_count(7, 1, &a, &b, &c, &d);
    if (!has_all(a, 1u << 5)) return found; /* AVX512-BF16 */
    found |= BF16_PAIRS;
    return has_tiles && gets_tiles() ? found | AMX : found;
}
#elif defined(__aarch64__)
PUBLIC int64_t foredraft_features(void) { return NEON; }
#else
PUBLIC int64_t foredraft_features(void) { return 0; }
#endif

/* Sizes of the structures that calls pass, in the order of structures.py, which compares them when the library is loaded. */
#include "passed.h"

PUBLIC int64_t foredraft_sizes(int64_t *sizes) {
    const int64_t known[] = {sizeof(Linear), sizeof(Residual), sizeof(Layer), sizeof(Entry), sizeof(Model), sizeof(Step), sizeof(Chains), sizeof(Trees)};
    enum { COUNT = sizeof known / sizeof *known };
    for (int i = 0; i < COUNT; i++) sizes[i] = known[i];
    return COUNT;
}
