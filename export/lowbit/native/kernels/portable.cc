// The same kernels in plain C++: what the vector kernels are held against, and what stands in where none is offered.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernels/kernels.h"

namespace lowbit {

namespace {

uint8_t clamped(int code, int low, int high) { return static_cast<uint8_t>(std::min(std::max(code, low), high)); }

uint8_t rounded(float value, int zero) {
    value = std::min(std::max(value, static_cast<float>(-zero)), static_cast<float>(255 - zero));
    return static_cast<uint8_t>(static_cast<int>(std::nearbyintf(value)) + zero);
}

uint8_t lut_output(const LutLayer& layer, int channel, int total) {
    if (!layer.is_narrow) {
        const size_t at = quarter_place(channel, layer.format.lanes);
        const float value = static_cast<float>(total + layer.bias.as<int32_t>()[at]) * layer.scale.as<float>()[at];
        return clamped(rounded(value, layer.zero), layer.low, layer.high);
    }
    const int lanes = layer.format.lanes, lane = channel % lanes;
    int code = layer.lowest_code;
    for (int k = 0; k < 3; ++k) {
        const size_t at = ((channel / lanes * 3 + k) * 2 + (lane & 1)) * (lanes / 2) + lane / 2;
        code += total >= layer.thresholds.as<uint16_t>()[at];
    }
    return static_cast<uint8_t>(code);
}

void lut_conv(const LutJob& job, const Block& block, int first_row, int last_row) {
    const LutLayer& layer = *job.layer;
    const int lanes = block.vectors * layer.format.lanes, taps = layer.shares_taps ? layer.shape.kernel_w : 1;
    const int steps = layer.groups * layer.shape.kernel_w, groups = layer.groups;
    for (int y = first_row; y < last_row; ++y)
        for (int x = 0; x < job.out_width; ++x)
            for (int lane = 0; lane < lanes; ++lane) {
                int total = 0;
                for (const Chunk& chunk : block.chunks) {
                    uint8_t sum = 0;  // as in a vector: a lane that overflowed would show
                    for (int i = chunk.start * taps; i < (chunk.start + chunk.length) * taps; ++i) {
                        const int group = taps > 1 ? i / taps : i % groups, tap = taps > 1 ? i % taps : i / groups;
                        const uint16_t* const row = job.index + (y * layer.shape.stride_h + chunk.row) * job.index_row;
                        const int activations = row[(x * layer.shape.stride_w + tap) * groups + group] / layer.format.table_stride;
                        const uint8_t* const weights = layer.weights.as<uint8_t>() + block.weights;
                        const int code = weights[(static_cast<size_t>(chunk.row) * steps + i) * lanes + lane];
                        sum = static_cast<uint8_t>(sum + layer.format.product(activations, code));
                    }
                    total += sum;
                }
                const int channel = block.first_channel + lane;
                job.out[(static_cast<size_t>(y) * job.out_width + x) * job.out_stride + channel] = lut_output(layer, channel, total);
            }
}

void dot_conv(const DotJob& job, int block, int first_row, int last_row) {
    const DotLayer& layer = *job.layer;
    const int8_t* const weights = layer.weights.as<int8_t>() + static_cast<size_t>(block) * layer.shape.kernel_h * layer.steps * 256;
    for (int y = first_row; y < last_row; ++y)
        for (int x = 0; x < job.out_width; ++x)
            for (int lane = 0; lane < 64; ++lane) {
                int sum = 0;
                for (int ky = 0; ky < layer.shape.kernel_h; ++ky) {
                    const uint8_t* const from = job.source + (y * layer.shape.stride_h + ky) * job.source_row +
                                                static_cast<size_t>(x) * layer.shape.stride_w * layer.shape.in_channels;
                    for (int i = 0; i < 4 * layer.steps; ++i)
                        sum += from[i] * weights[((ky * layer.steps + i / 4) * 64 + lane) * 4 + i % 4];
                }
                const int channel = block * 64 + lane;
                const float value = static_cast<float>(sum + layer.bias.as<int32_t>()[channel]) * layer.scale.as<float>()[channel];
                job.out[(static_cast<size_t>(y) * job.out_width + x) * job.out_stride + channel] =
                    clamped(rounded(value, layer.zero), layer.low, layer.high);
            }
}

void depthwise(const DepthwiseJob& job, int first_row, int last_row) {
    const DepthwiseLayer& layer = *job.layer;
    const int taps = layer.shape.kernel_h * layer.shape.kernel_w;
    for (int y = first_row; y < last_row; ++y)
        for (int x = 0; x < job.out_width; ++x)
            for (int channel = 0; channel < layer.shape.in_channels; ++channel) {
                int sum = 0;
                for (int tap = 0; tap < taps; ++tap) {
                    const int sy = y * layer.shape.stride_h + tap / layer.shape.kernel_w;
                    const int sx = x * layer.shape.stride_w + tap % layer.shape.kernel_w;
                    const int weight = layer.weights.as<int8_t>()[depthwise_weight_place(channel, tap, layer.pairs)];
                    sum += job.source[sy * job.source_row + sx * job.stride + channel] * weight;
                }
                const size_t at = depthwise_place(channel);
                const float value = static_cast<float>(sum + layer.bias.as<int32_t>()[at]) * layer.scale.as<float>()[at];
                job.out[(static_cast<size_t>(y) * job.out_width + x) * job.stride + channel] =
                    clamped(rounded(value, layer.zero), layer.low, layer.high);
            }
}

void pack_index(const uint8_t* codes, size_t stride, int width, const LutLayer& layer, int base, uint16_t* out) {
    for (int x = 0; x < width; ++x, codes += stride)
        for (int g = 0; g < layer.groups; ++g) {
            int index = 0;
            for (int i = 0; i < layer.format.group; ++i) {
                const int channel = g + i * layer.groups;
                if (channel < layer.shape.in_channels) index |= ((codes[channel] - base) & layer.format.highest_activation()) << layer.format.act_bits * i;
            }
            *out++ = static_cast<uint16_t>(index * layer.format.table_stride);
        }
}

void add(const AddJob& job, const uint8_t* a, const uint8_t* b, uint8_t* out, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        int code;
        if (job.is_integer()) {
            const int64_t sum = int64_t{job.multiplier_a} * (a[i] - job.zero_a) + int64_t{job.multiplier_b} * (b[i] - job.zero_b);
            const int64_t half = int64_t{1} << (job.right - 1), size = (std::llabs(sum) + half) >> job.right;
            code = clamped(static_cast<int>(sum < 0 ? -size : size) + job.zero_c, 0, 255);
        } else if (job.is_fused) {
            const float part = std::fmaf(static_cast<float>(b[i] - job.shift_b), job.ratio_b, job.fixed);
            const float sum = std::fmaf(static_cast<float>(a[i] - job.shift_a), job.ratio_a, part);
            code = clamped(static_cast<int>(std::nearbyintf(sum)) + job.shift_c, 0, 255);
        } else {
            const float x = static_cast<float>(a[i] - job.zero_a) * job.scale_a;
            const float y = static_cast<float>(b[i] - job.zero_b) * job.scale_b;
            code = rounded((x + y) / job.scale_c, job.zero_c);
        }
        out[i] = clamped(code, job.low, job.high);
    }
}

void map(const uint8_t* table, const uint8_t* codes, uint8_t* out, size_t count) {
    for (size_t i = 0; i < count; ++i) out[i] = table[codes[i]];
}

void max_pool(const PoolJob& job, int first_row, int last_row) {
    for (int y = first_row; y < last_row; ++y)
        for (int x = 0; x < job.out_width; ++x)
            for (int c = 0; c < job.stride; ++c) {
                uint8_t most = 0;
                for (int ky = 0; ky < job.kernel_h; ++ky)
                    for (int kx = 0; kx < job.kernel_w; ++kx) {
                        const int sy = y * job.stride_h - job.pad_top + ky, sx = x * job.stride_w - job.pad_left + kx;
                        if (sy < 0 || sy >= job.height || sx < 0 || sx >= job.width) continue;
                        most = std::max(most, job.source[(static_cast<size_t>(sy) * job.width + sx) * job.stride + c]);
                    }
                job.out[(static_cast<size_t>(y) * job.out_width + x) * job.stride + c] = most;
            }
}

void import_planes(const uint8_t* planes, int channels, size_t positions, uint8_t* out, size_t stride, uint8_t flip,
                   size_t first, size_t last) {
    for (size_t i = first; i < last; ++i)
        for (int c = 0; c < channels; ++c) out[i * stride + c] = static_cast<uint8_t>(planes[c * positions + i] ^ flip);
}

void export_planes(const uint8_t* codes, size_t stride, int, size_t positions, uint8_t* planes, uint8_t flip,
                   int first_channel, int last_channel) {
    for (int c = first_channel; c < last_channel; ++c)
        for (size_t i = 0; i < positions; ++i) planes[c * positions + i] = static_cast<uint8_t>(codes[i * stride + c] ^ flip);
}

}  // namespace

const Kernels* portable_kernels() {
    static const Kernels kernels = {"portable", {64, 3, 64, 2, true}, true,     lut_conv,      dot_conv,     depthwise, pack_index,
                                    add,        map,                  max_pool, nullptr, nullptr, import_planes, export_planes,
                                    {{64, 2, 64, 2, true, 3, 3}, {64, 2, 64, 2, true, 2, 4}}};
    return &kernels;
}

}  // namespace lowbit
