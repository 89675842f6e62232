// NEON: 8-bit convolutions. A student's first layer, by SMULL and SMLAL of four taps; depthwise ones by MLA in 16 bits.
//
// Activations are taken as signed bytes a - 128 and weights negated (`DotFormat`): with weights of -64..63 four products
// stay within -32,768..32,512, so they are added in 16 bits before they are added to 32-bit sums.
#include "kernels/kernels.h"

#if defined(__aarch64__)

#include "kernels/neon.h"

namespace lowbit {
namespace {

constexpr int kLanes = 64, kHalf = 32, kMostPositions = 2;  // 16 sums, 8 weights, 4 activations, 4 products

struct FourTaps {
    int8x8_t tap[4];  // of a position, eight times each
};

INLINE FourTaps four_taps(const uint8_t* from) {
    uint32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    const int8x8_t all = vreinterpret_s8_u32(vdup_n_u32(bytes ^ 0x80808080u));
    return {{vdup_lane_s8(all, 0), vdup_lane_s8(all, 1), vdup_lane_s8(all, 2), vdup_lane_s8(all, 3)}};
}

// Of 16 channels, four vectors of sums.
INLINE void multiply(const int8x16x4_t& weights, const FourTaps& x, int32x4_t (&sums)[4]) {
    int16x8_t low = vmull_s8(vget_low_s8(weights.val[0]), x.tap[0]);
    int16x8_t high = vmull_s8(vget_high_s8(weights.val[0]), x.tap[0]);
    UNROLL for (int t = 1; t < 4; ++t) {
        low = vmlal_s8(low, vget_low_s8(weights.val[t]), x.tap[t]);
        high = vmlal_s8(high, vget_high_s8(weights.val[t]), x.tap[t]);
    }
    sums[0] = vaddw_s16(sums[0], vget_low_s16(low));
    sums[1] = vaddw_high_s16(sums[1], low);
    sums[2] = vaddw_s16(sums[2], vget_low_s16(high));
    sums[3] = vaddw_high_s16(sums[3], high);
}

template <int P>
__attribute__((noinline)) void dot_tile(const DotJob& job, const int8_t* weights, int channel, const uint8_t* source, uint8_t* out) {
    const DotLayer& layer = *job.layer;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.shape.in_channels;
    int32x4_t sums[P][2][4];
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < 2; ++v)
        UNROLL for (int q = 0; q < 4; ++q) sums[p][v][q] = vdupq_n_s32(0);
    for (int ky = 0; ky < layer.shape.kernel_h; ++ky) {
        const uint8_t* from = source + ky * job.source_row;
        for (int s = 0; s < layer.steps; ++s, from += 4, weights += 4 * kLanes) {
            FourTaps x[P];
            UNROLL for (int p = 0; p < P; ++p) x[p] = four_taps(from + p * step);
            const int8_t* at = weights;
            UNROLL for (int v = 0; v < 2; ++v, at += kHalf / 2 * 4) {
                const int8x16x4_t w = vld4q_s8(at);
                UNROLL for (int p = 0; p < P; ++p) {
                    multiply(w, x[p], sums[p][v]);
                    // One after the other: all at once do not fit the registers.
                    __asm__ volatile("" : "+r"(at), "+w"(sums[p][v][0]), "+w"(sums[p][v][3]));
                }
            }
        }
    }
    const Output to = output_of(layer);
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < 2; ++v) {
        const int32_t* const bias = layer.bias.as<int32_t>() + channel + v * 16;
        const float* const scale = layer.scale.as<float>() + channel + v * 16;
        int32x4_t real[4];  // weights were negated
        UNROLL for (int q = 0; q < 4; ++q) real[q] = rounded(vnegq_s32(sums[p][v][q]), bias + q * 4, scale + q * 4);
        vst1q_u8(out + p * job.out_stride + v * 16, to_bytes(real[0], real[1], real[2], real[3], to));
    }
}

struct Wide {  // 16 codes or weights in 16 bits
    int16x8_t low, high;
};

INLINE Wide wide_codes(const uint8_t* from) {
    const uint8x16_t codes = vld1q_u8(from);
    return {vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes))), vreinterpretq_s16_u16(vmovl_high_u8(codes))};
}

// Even and odd channels of eight sums, as 32-bit numbers.
INLINE int32x4_t even_of(int16x8_t sums) { return vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_s16(sums), 16), 16); }
INLINE int32x4_t odd_of(int16x8_t sums) { return vshrq_n_s32(vreinterpretq_s32_s16(sums), 16); }

// 16 channels of a position. Weights are pairs of taps, eight channels after eight (`depthwise_weight_place`).
INLINE void depthwise_position(const DepthwiseLayer& layer, const DepthwiseJob& job, const uint8_t* source, int channel,
                               const Output& to, uint8_t* out) {
    static constexpr uint8_t kOrder[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    const int8_t* weights = layer.weights.as<int8_t>() + static_cast<size_t>(channel / 64) * layer.pairs * 128 + channel % 64;
    const int width = layer.shape.kernel_w, taps = layer.shape.kernel_h * width;
    Wide sums = {vdupq_n_s16(0), vdupq_n_s16(0)};
    for (int pair = 0, row = 0, column = 0; pair < layer.pairs; ++pair, weights += 128) {
        const int8x8x2_t low = vld2_s8(weights), high = vld2_s8(weights + 64);
        for (int i = 0; i < 2 && pair * 2 + i < taps; ++i) {
            const Wide x = wide_codes(source + row * job.source_row + column * job.stride);
            sums.low = vmlaq_s16(sums.low, x.low, vmovl_s8(i ? low.val[1] : low.val[0]));
            sums.high = vmlaq_s16(sums.high, x.high, vmovl_s8(i ? high.val[1] : high.val[0]));
            if (++column == width) column = 0, ++row;
        }
    }
    const int at = channel / 64 * 64 + channel % 64 / 4;
    const int32_t* const bias = layer.bias.as<int32_t>() + at;
    const float* const scale = layer.scale.as<float>() + at;
    const uint8x16_t codes = to_bytes(rounded(even_of(sums.low), bias, scale), rounded(odd_of(sums.low), bias + 16, scale + 16),
                                      rounded(even_of(sums.high), bias + 32, scale + 32), rounded(odd_of(sums.high), bias + 48, scale + 48), to);
    vst1q_u8(out, vqtbl1q_u8(codes, vld1q_u8(kOrder)));
}

}  // namespace

void neon_dot_conv(const DotJob& job, int block, int first_row, int last_row) {
    const DotLayer& layer = *job.layer;
    const size_t size = static_cast<size_t>(layer.shape.kernel_h) * layer.steps * 4 * kLanes;
    const size_t row = layer.shape.stride_h * job.source_row;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.shape.in_channels;
    for (int y = first_row; y < last_row; ++y)
        for (int half = 0; half < 2; ++half) {
            const int channel = block * kLanes + half * kHalf;
            const int8_t* const weights = layer.weights.as<int8_t>() + block * size + half * kHalf * 4;
            for (int x = 0; x < job.out_width; x += kMostPositions) {
                const uint8_t* const source = job.source + y * row + x * step;
                uint8_t* const out = job.out + (static_cast<size_t>(y) * job.out_width + x) * job.out_stride + channel;
                if (x + 1 < job.out_width) dot_tile<2>(job, weights, channel, source, out);
                else dot_tile<1>(job, weights, channel, source, out);
            }
        }
}

void neon_depthwise(const DepthwiseJob& job, int first_row, int last_row) {
    const Output to = output_of(*job.layer);
    for_depthwise<16>(job, first_row, last_row, [&](const uint8_t* source, int channel, uint8_t* out) INLINED {
        depthwise_position(*job.layer, job, source, channel, to, out);
    });
}

}  // namespace lowbit

#endif
