// Which kernels this processor runs best, asked of the processor when the library is loaded.
#include "runtime/processor.h"

#include <cstring>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace lowbit {

namespace {

#if defined(__x86_64__)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// AMX multiplies 8-bit tiles many times faster than tables can be looked up.
bool has_amx() {
    unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return (edx >> 25 & 1) != 0;  // leaf 7, AMX-INT8
}

// Dot products of 8 bits in 256-bit vectors: as fast as AVX2 tables or faster.
bool has_avx_vnni() {
    unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return (eax >> 4 & 1) != 0;
}

Choice best() {
    if (has_amx()) return {nullptr, "this processor multiplies 8-bit tiles (AMX) faster than tables can be looked up"};
    if (has_avx512()) return {avx512_kernels(), "AVX-512 with VBMI and VNNI"};
    if (has_avx2() && avx2_kernels() != nullptr && !has_avx_vnni() && !__builtin_cpu_supports("avx512vnni"))
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
    if (std::strcmp(wanted, "avx512") == 0 && has_avx512()) return {avx512_kernels(), "asked for: AVX-512"};
    if (std::strcmp(wanted, "avx2") == 0 && has_avx2() && avx2_kernels() != nullptr) return {avx2_kernels(), "asked for: AVX2"};
#elif defined(__aarch64__)
    if (std::strcmp(wanted, "neon") == 0) return {neon_kernels(), "asked for: NEON"};
#endif
    return {nullptr, "the instruction set that was asked for is not one that this processor and library have"};
}

}  // namespace lowbit
