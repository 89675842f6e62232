// Weights of convolutions on dot products, and of those of each channel by itself.
#include <algorithm>
#include <cstdlib>

#include "program/program.h"

namespace lowbit {

namespace {

constexpr int kLanesTogether = 8;  // written side by side
constexpr size_t kPart = 256;      // weights whose sums fit 16 bits

// Weights of some channels, four neighboring bytes of a row per step. Where channels are multiples of four, so are steps.
void write_weights(const int8_t* weights, int first, int last, int lanes, int sign, DotLayer* layer) {
    const ConvShape& s = layer->shape;
    const ptrdiff_t taps = static_cast<ptrdiff_t>(s.kernel_h) * s.kernel_w;
    const int unit = s.in_channels % 4 == 0 ? 4 : 1;
    for (int ky = 0; ky < s.kernel_h; ++ky)
        for (int kx = 0; kx < s.kernel_w; ++kx)
            for (int c = 0; c < s.in_channels; c += unit) {
                const int place = (layer->is_gathered ? ky * s.kernel_w + kx : kx) * s.in_channels + c;
                const size_t row = layer->is_gathered ? first / lanes : static_cast<size_t>(first / lanes) * s.kernel_h + ky;
                const size_t at = (row * layer->steps + place / 4) * lanes * 4 + place % 4;
                const int8_t* from = weights + (static_cast<size_t>(first) * s.in_channels + c) * taps + ky * s.kernel_w + kx;
                int8_t* to = layer->weights.as<int8_t>() + at + first % lanes * 4;
                for (int o = first; o < last; ++o, from += static_cast<size_t>(s.in_channels) * taps, to += 4) {
                    to[0] = static_cast<int8_t>(sign * from[0]);
                    for (int i = 1; i < unit; ++i) to[i] = static_cast<int8_t>(sign * from[i * taps]);
                }
            }
}

// Cut the steps of 16 channels where a sum of 16 signed bits could overflow: positive and negative parts apart, for any
// activations of 0..span. A step adds two products to each of a channel's two sums.
std::vector<Chunk> short_chunks(const DotLayer& layer, int first_channel, int span) {
    constexpr int kSums = 2 * kShortLanes;
    const ConvShape& s = layer.shape;
    const size_t block = static_cast<size_t>(s.kernel_h) * layer.steps * 4 * kShortLanes;
    const int8_t* const weights = layer.weights.as<int8_t>() + first_channel / kShortLanes * block;
    std::vector<Chunk> chunks;
    Chunk chunk{0, 0, 0};
    const int limit = INT16_MAX / std::max(span, 1);  // of sums of weights
    int up[kSums] = {}, down[kSums] = {};
    for (int step = 0; step < s.kernel_h * layer.steps; ++step) {
        const int8_t* const w = weights + static_cast<size_t>(step) * 4 * kShortLanes;
        int more[kSums], less[kSums], passed = 0;
        for (int i = 0; i < kSums; ++i) {
            const int a = w[2 * i], b = w[2 * i + 1];
            more[i] = std::max(a, 0) + std::max(b, 0);
            less[i] = more[i] - a - b;
            up[i] += more[i];
            down[i] += less[i];
            passed |= (limit - up[i]) | (limit - down[i]);
        }
        if (passed < 0) {  // the sign of one that passed its limit
            chunks.push_back(chunk);
            chunk = {step / layer.steps, step % layer.steps, 0};
            std::copy_n(more, kSums, up);
            std::copy_n(less, kSums, down);
        }
        ++chunk.length;
    }
    chunks.push_back(chunk);
    return chunks;
}

// Keep weights in two or four bits where all of them fit; memory is slower than the products.
void pack_bits(int lowest, int highest, DotLayer* layer) {
    constexpr size_t kVector = 64, kPacked = kTileSteps * kVector;  // bytes
    const int bits = lowest >= -2 && highest <= 1 ? 2 : lowest >= -8 && highest <= 7 ? 4 : 8;
    if (bits == 8) return;
    const int fields = 8 / bits, mask = (1 << bits) - 1;
    const size_t size = layer->weights.size();
    Buffer packed(size / fields);
    const uint8_t* from = layer->weights.as<uint8_t>();
    uint8_t* to = packed.as<uint8_t>();
    for (const uint8_t* const end = from + size / kPacked * kPacked; from < end; from += fields * kVector, to += kVector)
        for (int i = 0; i < fields; ++i)
            for (size_t j = 0; j < kVector; ++j) to[j] = static_cast<uint8_t>(to[j] | (from[i * kVector + j] & mask) << bits * i);
    layer->weights = std::move(packed);
    layer->weight_bits = bits;
}

}  // namespace

bool pack_dot(const ConvSpec& spec, const Kernels& kernels, DotLayer* layer) {
    const ConvShape& s = spec.shape;
    layer->shape = s;
    const int row = s.kernel_w * s.in_channels;
    layer->is_gathered = kernels.dot.is_tiled && row <= kGatherLimit && s.kernel_h > 1 && s.kernel_h <= kGatherRows;
    const int rows = layer->is_gathered ? 1 : s.kernel_h, bytes = layer->is_gathered ? row * s.kernel_h : row;
    layer->steps = static_cast<int>(round_up((bytes + 3) / 4, kernels.dot.is_tiled ? kTileSteps : 1));
    layer->zero = spec.requantize.zero;
    layer->low = spec.requantize.low;
    layer->high = spec.requantize.high;
    const size_t padded = round_up(s.out_channels, kChannelUnit);
    layer->weights = Buffer(padded * rows * layer->steps * 4);
    layer->bias = Buffer(padded * sizeof(int32_t));
    layer->scale = Buffer(padded * sizeof(float));
    for (int first = 0; first < s.out_channels; first += kLanesTogether)
        write_weights(spec.weights.data(), first, std::min(first + kLanesTogether, s.out_channels),
                      kernels.has_short_sums || kernels.dot.is_tiled ? kShortLanes : kChannelUnit, kernels.dot.sign, layer);
    const size_t count = static_cast<size_t>(s.in_channels) * s.kernel_h * s.kernel_w;
    int least = 0, greatest = 0;
    for (int o = 0; o < s.out_channels; ++o) {
        const int8_t* const w = spec.weights.data() + o * count;
        int32_t sum = 0, reach = 0;
        uint8_t lowest = 255, highest = 0;  // with 128 added: smallest instructions
        for (size_t first = 0; first < count; first += kPart) {
            int16_t part = 0;
            uint16_t part_reach = 0;
            for (size_t i = first; i < std::min(first + kPart, count); ++i) {
                const int16_t value = w[i];
                part = static_cast<int16_t>(part + value);
                part_reach = static_cast<uint16_t>(part_reach + (value < 0 ? -value : value));
            }
            for (size_t i = first; i < std::min(first + kPart, count); ++i) {
                const uint8_t code = static_cast<uint8_t>(w[i] ^ 0x80);
                lowest = std::min(lowest, code);
                highest = std::max(highest, code);
            }
            sum += part;
            reach += part_reach;
        }
        least = std::min(least, lowest - 128);
        greatest = std::max(greatest, highest - 128);
        if (lowest - 128 < kernels.dot.lowest_weight || highest - 128 > kernels.dot.highest_weight) return false;
        if (!kernels.has_exact_dot && 2 * spec.span * std::max(128 - lowest, highest - 128) > INT16_MAX) return false;
        const int64_t bias = spec.requantize.bias[o] - int64_t{spec.zero - spec.base - kernels.dot.base} * sum;
        if (int64_t{255} * reach + std::llabs(bias) + std::llabs(static_cast<int64_t>(spec.requantize.bias[o])) > INT32_MAX) return false;
        if (!is_tame(spec.requantize.bias[o], spec.requantize.scale[o], int64_t{2 * 255} * reach)) return false;
        layer->bias.as<int32_t>()[o] = static_cast<int32_t>(bias);
        layer->scale.as<float>()[o] = spec.requantize.scale[o];
    }
    if (kernels.dot.is_tiled) pack_bits(least, greatest, layer);
    if (kernels.has_short_sums)
        for (size_t c = 0; c < padded; c += kShortLanes) layer->chunks.push_back(short_chunks(*layer, static_cast<int>(c), spec.span));
    return true;
}

bool pack_depthwise(const ConvSpec& spec, DepthwiseLayer* layer) {
    const ConvShape& s = spec.shape;
    const int taps = s.kernel_h * s.kernel_w;
    layer->shape = s;
    layer->pairs = (taps + 1) / 2;
    layer->zero = spec.requantize.zero;
    layer->low = spec.requantize.low;
    layer->high = spec.requantize.high;
    const size_t padded = round_up(s.in_channels, kChannelUnit);
    layer->weights = Buffer(padded * layer->pairs * 2);
    layer->bias = Buffer(padded * sizeof(int32_t));
    layer->scale = Buffer(padded * sizeof(float));
    for (int c = 0; c < s.in_channels; ++c) {
        int sum = 0, reach = 0;
        for (int tap = 0; tap < taps; ++tap) {
            const int8_t w = spec.weights[static_cast<size_t>(c) * taps + tap];
            layer->weights.as<int8_t>()[depthwise_weight_place(c, tap, layer->pairs)] = w;
            sum += w;
            reach += std::abs(w);
        }
        if (255 * reach > INT16_MAX || !is_tame(spec.requantize.bias[c], spec.requantize.scale[c], 2 * 255 * reach)) return false;
        layer->bias.as<int32_t>()[depthwise_place(c)] = spec.requantize.bias[c] - spec.zero * sum;
        layer->scale.as<float>()[depthwise_place(c)] = spec.requantize.scale[c];
    }
    return true;
}

}  // namespace lowbit
