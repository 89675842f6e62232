// Which kernels this processor runs best, asked of the processor when the library is loaded.
#include "runtime/processor.h"

#include <cstring>

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbit {

namespace {

#if defined(__x86_64__)
struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// CPUID itself: `__builtin_cpu_supports` answers no to everything in libraries that some cross-compilers link.
Registers cpuid(unsigned leaf, unsigned part = 0) {
    Registers r;
    __asm__ volatile("cpuid" : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx) : "a"(leaf), "c"(part));
    return r;
}

Registers features(unsigned part) { return cpuid(0).eax >= 7 ? cpuid(7, part) : Registers(); }

constexpr bool has(unsigned word, int bit) { return (word >> bit & 1) != 0; }

// Whether the operating system keeps these parts of the registers when it switches tasks (XCR0).
bool is_kept(unsigned parts) {
    if (!has(cpuid(1).ecx, 27)) return false;  // OSXSAVE: XGETBV may be asked
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & parts) == parts;
}

constexpr unsigned kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;

bool has_vnni() { return has(features(0).ecx, 11); }

bool has_avx2() {
    const unsigned basic = cpuid(1).ecx;
    return is_kept(kYmm) && has(basic, 12) && has(basic, 28) && has(features(0).ebx, 5);  // FMA, AVX; AVX2
}

bool has_avx512() {
    const Registers r = features(0);
    const bool is_base = has(r.ebx, 16) && has(r.ebx, 17) && has(r.ebx, 30) && has(r.ebx, 31);  // F, DQ, BW, VL
    return is_kept(kZmm) && has_avx2() && is_base && has(r.ecx, 1) && has_vnni();               // VBMI, VNNI
}

bool has_gfni() { return has(features(0).ecx, 8); }

// AMX multiplies 8-bit tiles many times faster than tables can be looked up. Linux gives a process the registers when it
// asks for them (arch_prctl, ARCH_REQ_XCOMP_PERM of XTILEDATA), and refuses where a signal stack is too small for them.
bool has_amx() {
    const unsigned edx = features(0).edx;
    if (!has_gfni() || !has(edx, 24) || !has(edx, 25) || !is_kept(kTiles) || !has_avx512()) return false;  // AMX-TILE, AMX-INT8
    if (amx_kernels() == nullptr) return false;  // not earlier: the function itself is compiled for AVX-512
#if defined(__linux__)
    constexpr long kAskForState = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
    return false;
#endif
}

// Dot products of 8 bits in 256-bit vectors: as fast as AVX2 tables or faster.
bool has_avx_vnni() { return features(0).eax >= 1 && has(features(1).eax, 4); }

Choice best() {
    if (has_amx()) return {amx_kernels(), "AMX: 8-bit tiles"};
    if (has_avx512()) return {avx512_kernels(), "AVX-512 with VBMI and VNNI"};
    if (has_avx2() && avx2_kernels() != nullptr && !has_avx_vnni() && !has_vnni())
        return {avx2_kernels(), "AVX2"};
    if (has_avx2()) return {nullptr, "this processor's 8-bit dot products (VNNI without VBMI) are about as fast: not measured to gain"};
    return {nullptr, "this processor has no AVX2"};
}
#elif defined(__aarch64__)
// Of the kernel's hardware capabilities, which older headers do not name.
constexpr unsigned long kDotProducts = 1ul << 20, kMatrixProducts = 1ul << 13;

Choice best() {
    if ((getauxval(AT_HWCAP) & kDotProducts) != 0 || (getauxval(AT_HWCAP2) & kMatrixProducts) != 0)
        return {nullptr, "this processor's 8-bit dot products are as fast as look-up tables, or faster"};
    return {neon_kernels(), "NEON without dot products"};
}
#else
Choice best() { return {nullptr, "there are no kernels for this processor family yet"}; }
#endif

}  // namespace

Choice choose_kernels(const char* wanted) {
    if (wanted == nullptr || *wanted == '\0') return best();
    if (std::strcmp(wanted, "portable") == 0) return {portable_kernels(), "asked for: plain C++, slow"};
#if defined(__x86_64__)
    if (std::strcmp(wanted, "amx") == 0 && has_amx()) return {amx_kernels(), "asked for: AMX"};
    if (std::strcmp(wanted, "amx_emulated") == 0 && has_avx512() && has_gfni())
        return {emulated_amx_kernels(), "asked for: AMX in plain C++, slow"};
    if (std::strcmp(wanted, "avx512") == 0 && has_avx512()) return {avx512_kernels(), "asked for: AVX-512"};
    if (std::strcmp(wanted, "avx2") == 0 && has_avx2() && avx2_kernels() != nullptr) return {avx2_kernels(), "asked for: AVX2"};
#elif defined(__aarch64__)
    if (std::strcmp(wanted, "neon") == 0) return {neon_kernels(), "asked for: NEON"};
#endif
    return {nullptr, "the instruction set that was asked for is not one that this processor and library have"};
}

}  // namespace lowbit
