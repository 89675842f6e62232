// What the AVX2 files share: nothing that could be emitted outside them (all of it is inlined).
#pragma once

#include <immintrin.h>

#include "kernels/kernels.h"
#include "kernels/rows.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace lowbit {

void avx2_lut_conv(const LutJob& job, const Block& block, int first_row, int last_row);
void avx2_dot_conv(const DotJob& job, int block, int first_row, int last_row);

namespace {

INLINE __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINE void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

struct Output {
    __m256i zero, low, high;
};

template <typename Layer> INLINE Output output_of(const Layer& layer) {
    return {_mm256_set1_epi16(static_cast<short>(layer.zero)), _mm256_set1_epi8(static_cast<char>(layer.low)),
            _mm256_set1_epi8(static_cast<char>(layer.high))};
}

INLINE __m256i rounded(__m256i sum, const int32_t* bias, const float* scale) {
    const __m256 value = _mm256_cvtepi32_ps(_mm256_add_epi32(sum, load(bias)));
    return _mm256_cvtps_epi32(_mm256_mul_ps(value, _mm256_loadu_ps(scale)));
}

// Four vectors of 8 numbers to bytes, the zero point added; saturation does the clamp of the formula. Each 128 bits of
// the result hold four bytes of a, of b, of c, of d.
INLINE __m256i to_bytes(__m256i a, __m256i b, __m256i c, __m256i d, const Output& to) {
    const __m256i ab = _mm256_adds_epi16(_mm256_packs_epi32(a, b), to.zero);
    const __m256i cd = _mm256_adds_epi16(_mm256_packs_epi32(c, d), to.zero);
    return _mm256_min_epu8(_mm256_max_epu8(_mm256_packus_epi16(ab, cd), to.low), to.high);
}

// Bytes a0..3 b0..3 c0..3 d0..3 of each 128 bits to a0 c0 b0 d0, a1 c1 b1 d1, ...: quarters back to channels.
INLINE __m256i weave(__m256i bytes) {
    return _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(
                                          _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15)));
}

}  // namespace
}  // namespace lowbit
