// What the AVX-512 files share: nothing that could be emitted outside them (all of it is inlined).
#pragma once

#include <immintrin.h>

#include "kernels/kernels.h"
#include "kernels/rows.h"

#define UNROLL _Pragma("GCC unroll 32")

namespace lowbit {

void avx512_lut_conv(const LutJob& job, const Block& block, int first_row, int last_row);
void avx512_dot_conv(const DotJob& job, int block, int first_row, int last_row);
void avx512_narrow_conv(const NarrowJob& job, int first, int last);
void avx512_pack_planes(const uint8_t* codes, size_t stride, int width, const NarrowLayer& layer, int base, uint8_t* out,
                        size_t plane);

namespace {

struct Output {
    __m512i zero, low, high;
};

template <typename Layer> INLINE Output output_of(const Layer& layer) {
    return {_mm512_set1_epi16(static_cast<short>(layer.zero)), _mm512_set1_epi8(static_cast<char>(layer.low)),
            _mm512_set1_epi8(static_cast<char>(layer.high))};
}

INLINE __m512i rounded(__m512i sum, const int32_t* bias, const float* scale) {
    const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_load_si512(bias)));
    return _mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_load_ps(scale)));
}

// Four vectors of 16 numbers to bytes, the zero point added. Saturation does the clamp of the formula: it keeps order,
// and the zero point is small. Each 128 bits of the result hold four bytes of a, of b, of c, of d.
INLINE __m512i to_bytes(__m512i a, __m512i b, __m512i c, __m512i d, const Output& to) {
    const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), to.zero);
    const __m512i cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), to.zero);
    return _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(ab, cd), to.low), to.high);
}

// Bytes a0..3 b0..3 c0..3 d0..3 of each 128 bits to a0 c0 b0 d0, a1 c1 b1 d1, ...: quarters back to channels.
INLINE __m512i weave(__m512i bytes) {
    return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15)));
}

}  // namespace
}  // namespace lowbit
