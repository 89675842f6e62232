// What the NEON files share: nothing that could be emitted outside them (all of it is inlined).
#pragma once

#include <arm_neon.h>

#include "kernels/kernels.h"
#include "kernels/rows.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace lowbit {

void neon_lut_conv(const LutJob& job, const Block& block, int first_row, int last_row);
void neon_dot_conv(const DotJob& job, int block, int first_row, int last_row);
void neon_depthwise(const DepthwiseJob& job, int first_row, int last_row);

namespace {

struct Output {
    int16x8_t zero;
    uint8x16_t low, high;
};

template <typename Layer> INLINE Output output_of(const Layer& layer) {
    return {vdupq_n_s16(static_cast<int16_t>(layer.zero)), vdupq_n_u8(static_cast<uint8_t>(layer.low)),
            vdupq_n_u8(static_cast<uint8_t>(layer.high))};
}

INLINE int32x4_t rounded(int32x4_t sum, const int32_t* bias, const float* scale) {
    return vcvtnq_s32_f32(vmulq_f32(vcvtq_f32_s32(vaddq_s32(sum, vld1q_s32(bias))), vld1q_f32(scale)));
}

// Four vectors of four numbers to bytes in this order, the zero point added; saturation does the clamp of the formula.
INLINE uint8x16_t to_bytes(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d, const Output& to) {
    const int16x8_t ab = vqaddq_s16(vqmovn_high_s32(vqmovn_s32(a), b), to.zero);
    const int16x8_t cd = vqaddq_s16(vqmovn_high_s32(vqmovn_s32(c), d), to.zero);
    return vminq_u8(vmaxq_u8(vqmovun_high_s16(vqmovun_s16(ab), cd), to.low), to.high);
}

// The lower and upper halves of 32-bit lanes, as numbers.
INLINE int32x4_t lower(uint16x8_t halves) {
    return vreinterpretq_s32_u32(vandq_u32(vreinterpretq_u32_u16(halves), vdupq_n_u32(0xFFFF)));
}
INLINE int32x4_t upper(uint16x8_t halves) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_u16(halves), 16)); }

}  // namespace
}  // namespace lowbit
