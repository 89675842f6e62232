// Weights of look-up layers: codes, chunks that cannot overflow, thresholds of totals.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "layers/layer.h"

namespace lowbit {

namespace {

class Packer {
public:
    Packer(const int8_t* source, LutLayer* layer)
        : source_(source), layer_(layer), steps_(static_cast<size_t>(layer->groups) * layer->shape.kernel_w) {
        for (int code = 0; code < kCodes; ++code) {
            int sum = 0;
            for (int i = 0; i < layer->format.group; ++i) sum += std::abs((code >> 2 * i & 3) + kLowestWeight);
            reach_[code] = static_cast<uint8_t>(kHighestActivation * sum);
        }
    }

    void pack(Block* block) const {
        write(*block);
        for (int ky = 0; ky < layer_->shape.kernel_h; ++ky) cut(block, ky);
    }

private:
    static constexpr int kCodes = 64, kZeros = 0x2A;  // three weights of 0
    int lanes(const Block& block) const { return block.vectors * layer_->format.lanes; }
    uint8_t* row(const Block& block, int ky) const {
        return layer_->weights.as<uint8_t>() + block.weights + ky * steps_ * lanes(block);
    }

    // Taps innermost where they share tables, groups innermost otherwise.
    void write(const Block& block) const {
        const ConvShape& s = layer_->shape;
        const size_t count = lanes(block), groups = layer_->groups, width = s.kernel_w;
        const size_t tap_step = (layer_->shares_taps ? 1 : groups) * count, group_step = (layer_->shares_taps ? width : 1) * count;
        for (size_t group = 0; group < groups; ++group)  // lanes innermost: written in order, read from few cache lines
            for (int ky = 0; ky < s.kernel_h; ++ky)
                for (size_t lane = 0; lane < count; ++lane) {
                    const int8_t* from[3];
                    for (size_t i = 0; i < 3; ++i) from[i] = weights(block.first_channel + lane, group + i * groups, i, ky);
                    uint8_t* const to = row(block, ky) + group * group_step + lane;
                    for (size_t tap = 0; tap < width; ++tap)
                        to[tap * tap_step] = static_cast<uint8_t>(from[0][tap] + 4 * from[1][tap] + 16 * from[2][tap] + kZeros);
                }
        if (layer_->format.group == 2)  // the third place was 0
            for (size_t i = 0; i < s.kernel_h * steps_ * count; ++i) row(block, 0)[i] &= 0x0F;
    }

    // A row of taps; zeros for channels past the end.
    const int8_t* weights(size_t out, size_t in, size_t place, int ky) const {
        static constexpr int8_t kNothing[kMostTaps] = {};
        const ConvShape& s = layer_->shape;
        const bool is_there = out < static_cast<size_t>(s.out_channels) && in < static_cast<size_t>(s.in_channels) &&
                              place < static_cast<size_t>(layer_->format.group);
        return is_there ? source_ + ((out * s.in_channels + in) * s.kernel_h + ky) * s.kernel_w : kNothing;
    }

    // Cut a row of the kernel where a lane's byte could pass 255; a step of shared taps is three look-ups.
    void cut(Block* block, int ky) const {
        const int unit = layer_->shares_taps ? layer_->shape.kernel_w : 1, count = lanes(*block);
        const int steps = static_cast<int>(steps_) / unit;
        std::vector<int> sums(count, 0), added(count);
        const uint8_t* codes = row(*block, ky);
        int start = 0;
        for (int step = 0; step < steps; ++step) {
            std::fill(added.begin(), added.end(), 0);
            for (int i = 0; i < unit; ++i, codes += count)
                for (int lane = 0; lane < count; ++lane) added[lane] += reach_[codes[lane]];
            bool fits = true;
            for (int lane = 0; lane < count; ++lane) fits &= sums[lane] + added[lane] <= kByteLimit;
            if (!fits) {
                block->chunks.push_back({ky, start, step - start});
                start = step;
                std::fill(sums.begin(), sums.end(), 0);
            }
            for (int lane = 0; lane < count; ++lane) sums[lane] += added[lane];
        }
        block->chunks.push_back({ky, start, steps - start});
    }

    const int8_t* source_;
    LutLayer* layer_;
    size_t steps_;  // look-ups of a kernel row
    uint8_t reach_[kCodes];  // the most that a look-up of these weights adds: 3 sum |w|
};

// The smallest total whose code is at least `wanted`; kNeverReached where there is none. Codes rise with totals, for
// scales are positive and rounding is monotone.
uint16_t threshold(const Requantize& requantize, int channel, int32_t offset, int32_t reach, int wanted) {
    int low = 0, high = reach + 1;  // the answer is in low..high
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (requantized(requantize, channel, middle - offset) >= wanted) high = middle;
        else low = middle + 1;
    }
    return static_cast<uint16_t>(low > reach ? kNeverReached : low);
}

void fill_output(const Requantize& requantize, const std::vector<int32_t>& reach, LutLayer* layer) {
    const int channels = layer->shape.out_channels, lanes = layer->format.lanes;
    const size_t padded = round_up(channels, kChannelUnit);
    layer->zero = requantize.zero;
    layer->low = requantize.low;
    layer->high = requantize.high;
    layer->bias = Buffer(padded * sizeof(int32_t));
    layer->scale = Buffer(padded * sizeof(float));
    int lowest = 255, highest = 0;
    for (int c = 0; c < channels; ++c) {
        layer->bias.as<int32_t>()[quarter_place(c, lanes)] = requantize.bias[c] - layer->offset[c];
        layer->scale.as<float>()[quarter_place(c, lanes)] = requantize.scale[c];
        lowest = std::min<int>(lowest, requantized(requantize, c, -layer->offset[c]));
        highest = std::max<int>(highest, requantized(requantize, c, reach[c] - layer->offset[c]));
    }
    layer->is_narrow = highest - lowest <= 3;
    layer->lowest_code = lowest;
    if (!layer->is_narrow) return;
    layer->thresholds = Buffer(padded * 3 * sizeof(uint16_t));
    for (size_t c = 0; c < padded; ++c)
        for (int k = 0; k < 3; ++k) {
            const int lane = static_cast<int>(c) % lanes;
            const size_t at = ((c / lanes * 3 + k) * 2 + (lane & 1)) * (lanes / 2) + lane / 2;
            layer->thresholds.as<uint16_t>()[at] =
                c < static_cast<size_t>(channels)
                    ? threshold(requantize, static_cast<int>(c), layer->offset[c], reach[c], lowest + k + 1)
                    : kNeverReached;
        }
}

// Offsets and reaches of a layer's channels; false where totals would not be exact.
bool measure(const int8_t* weights, const ConvShape& shape, const Requantize& requantize, int zero,
             std::vector<int32_t>* offset, std::vector<int32_t>* reach) {
    const size_t count = static_cast<size_t>(shape.in_channels) * shape.kernel_h * shape.kernel_w;
    for (int o = 0; o < shape.out_channels; ++o) {
        const int8_t* const w = weights + o * count;
        int32_t sum = 0, below = 0;
        for (size_t i = 0; i < count; ++i) {
            sum += std::abs(w[i]);
            below += w[i] < 0 ? -w[i] : 0;
        }
        offset->push_back(kHighestActivation * below + zero * (sum - 2 * below));
        reach->push_back(kHighestActivation * sum);
        if (reach->back() > kTotalLimit || !is_tame(requantize.bias[o], requantize.scale[o], 2 * reach->back())) return false;
    }
    return true;
}

}  // namespace

bool is_tame(int32_t bias, float scale, int64_t reach) {
    return (std::llabs(static_cast<int64_t>(bias)) + reach) * static_cast<double>(scale) < (1 << 30);
}

uint8_t requantized(const Requantize& requantize, int channel, int32_t accumulator) {
    float value = static_cast<float>(accumulator + requantize.bias[channel]) * requantize.scale[channel];
    value = std::min(std::max(value, static_cast<float>(-requantize.zero)), static_cast<float>(255 - requantize.zero));
    const int code = static_cast<int>(std::nearbyintf(value)) + requantize.zero;
    return static_cast<uint8_t>(std::min(std::max(code, requantize.low), requantize.high));
}

bool pack_lut(const int8_t* weights, const ConvShape& shape, const LutFormat& format, const Requantize& requantize,
              int zero, LutLayer* layer) {
    layer->shape = shape;
    layer->format = format;
    if (shape.kernel_w > kMostTaps) return false;
    layer->groups = (shape.in_channels + format.group - 1) / format.group;
    const size_t padded = round_up(shape.out_channels, format.lanes);
    
    layer->shares_taps = format.has_shared_taps && shape.kernel_w == 3 && shape.stride_w == 1;

    std::vector<int32_t> reach;
    layer->offset.clear();
    if (!measure(weights, shape, requantize, zero, &layer->offset, &reach)) return false;
    layer->border = 0;
    for (int i = 0; i < format.group; ++i) layer->border |= zero << 2 * i;
    layer->border *= format.table_stride;

    const size_t row = static_cast<size_t>(layer->groups) * shape.kernel_w * shape.kernel_h;
    layer->weights = Buffer(row * padded);
    const Packer packer(weights, layer);
    for (int channel = 0; channel < static_cast<int>(padded);) {
        Block block;
        const int left = (static_cast<int>(padded) - channel) / format.lanes;
        block.vectors = std::min(left, layer->shares_taps ? 1 : format.most_vectors);
        block.first_channel = channel;
        block.weights = row * channel;
        packer.pack(&block);
        channel += block.vectors * format.lanes;
        layer->blocks.push_back(std::move(block));
    }
    fill_output(requantize, reach, layer);
    return true;
}

bool pack_narrow(const int8_t* weights, const ConvShape& shape, const Requantize& requantize, int zero, NarrowLayer* layer) {
    layer->shape = shape;
    layer->groups = (shape.in_channels + 2) / 3;
    layer->zero = requantize.zero;
    layer->low = requantize.low;
    layer->high = requantize.high;
    layer->border = zero * 0x15;  // the zero point three times
    std::vector<int32_t> offset, reach;
    if (!measure(weights, shape, requantize, zero, &offset, &reach)) return false;
    const int taps = shape.kernel_h * shape.kernel_w, steps = layer->groups * taps;
    const int padded = static_cast<int>(round_up(shape.out_channels, kNarrowChannels));
    const auto weight = [&](int out, int in, int tap) {
        const bool is_there = out < shape.out_channels && in < shape.in_channels;
        return is_there ? weights[(static_cast<size_t>(out) * shape.in_channels + in) * taps + tap] : 0;
    };
    layer->weights = Buffer(static_cast<size_t>(padded) * steps * sizeof(uint16_t));
    std::vector<int> sums(padded, 0), added(padded);
    int length = 0;
    for (int step = 0; step < steps; ++step) {
        bool fits = true;
        for (int o = 0; o < padded; ++o) {
            int code = 0, sum = 0;
            for (int i = 0; i < 3; ++i) {
                const int w = weight(o, step / taps + i * layer->groups, step % taps);
                code |= (w - kLowestWeight) << 2 * i;
                sum += std::abs(w);
            }
            const size_t at = (static_cast<size_t>(o / kNarrowChannels) * steps + step) * kNarrowChannels + o % kNarrowChannels;
            layer->weights.as<uint16_t>()[at] = static_cast<uint16_t>(code * 64);
            added[o] = kHighestActivation * sum;
            fits = fits && sums[o] + added[o] <= kByteLimit;
        }
        if (!fits) {
            layer->chunks.push_back(length);
            length = 0;
            std::fill(sums.begin(), sums.end(), 0);
        }
        for (int o = 0; o < padded; ++o) sums[o] += added[o];
        ++length;
    }
    layer->chunks.push_back(length);
    int lowest = 255, highest = 0;
    for (int o = 0; o < shape.out_channels; ++o) {
        lowest = std::min<int>(lowest, requantized(requantize, o, -offset[o]));
        highest = std::max<int>(highest, requantized(requantize, o, reach[o] - offset[o]));
    }
    layer->is_narrow = highest - lowest <= 3;
    layer->lowest_code = lowest;
    for (int o = 0; o < padded; ++o) {
        const bool is_there = o < shape.out_channels;
        layer->bias.push_back(is_there ? requantize.bias[o] - offset[o] : 0);
        layer->scale.push_back(is_there ? requantize.scale[o] : 0.0f);
        for (int k = 1; k <= 3; ++k)
            layer->thresholds.push_back(is_there && layer->is_narrow ? threshold(requantize, o, offset[o], reach[o], lowest + k)
                                                                     : kNeverReached);
    }
    return true;
}

}  // namespace lowbit
