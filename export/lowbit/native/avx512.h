// What the AVX-512 files share: nothing that could be emitted outside them (all of it is inlined).
#pragma once

#include <immintrin.h>

#include "kernels.h"

#define UNROLL _Pragma("GCC unroll 32")
#define INLINE inline __attribute__((always_inline))

namespace lowbit {

void avx512_lut_conv(const LutJob& job, const Block& block, int first_row, int last_row);
void avx512_dot_conv(const DotJob& job, int block, int first_row, int last_row);

namespace {

struct Output {
    __m512 lowest, highest;  // less the zero point
    __m512i zero, low, high;
};

template <typename Layer> INLINE Output output_of(const Layer& layer) {
    return {_mm512_set1_ps(static_cast<float>(-layer.zero)), _mm512_set1_ps(static_cast<float>(255 - layer.zero)),
            _mm512_set1_epi32(layer.zero), _mm512_set1_epi8(static_cast<char>(layer.low)),
            _mm512_set1_epi8(static_cast<char>(layer.high))};
}

INLINE __m128i requantize(__m512i sum, const int32_t* bias, const float* scale, const Output& to) {
    __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_load_si512(bias)));
    value = _mm512_mul_ps(value, _mm512_load_ps(scale));
    value = _mm512_min_ps(_mm512_max_ps(value, to.lowest), to.highest);
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(value), to.zero));
}

INLINE __m512i join(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

}  // namespace
}  // namespace lowbit
