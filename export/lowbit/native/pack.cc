// Weights of look-up layers: codes, chunks that cannot overflow, thresholds of totals.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "layer.h"

namespace lowbit {

namespace {

struct Packer {
    const int8_t* source;
    LutLayer* layer;

    int weight(int out, int in, int ky, int kx) const {
        const ConvShape& s = layer->shape;
        if (out >= s.out_channels || in >= s.in_channels) return 0;
        return source[((static_cast<size_t>(out) * s.in_channels + in) * s.kernel_h + ky) * s.kernel_w + kx];
    }

    // Step `step` of a kernel row is (group, tap): taps innermost where they share tables, groups innermost otherwise.
    void place(int step, int* group, int* tap) const {
        const int groups = layer->groups, taps = layer->shape.kernel_w;
        *group = layer->shares_taps ? step / taps : step % groups;
        *tap = layer->shares_taps ? step % taps : step / groups;
    }

    uint8_t code(int out, int ky, int step) const {
        int group, tap, code = 0;
        place(step, &group, &tap);
        for (int i = 0; i < layer->format.group; ++i)
            code |= (weight(out, group + i * layer->groups, ky, tap) - kLowestWeight) << (2 * i);
        return static_cast<uint8_t>(code);
    }

    int reach(int out, int ky, int step) const {  // the most that a look-up adds: 3 sum |w|
        int group, tap, sum = 0;
        place(step, &group, &tap);
        for (int i = 0; i < layer->format.group; ++i)
            sum += std::abs(weight(out, group + i * layer->groups, ky, tap));
        return kHighestActivation * sum;
    }

    // Cut a row of the kernel where a lane's byte could pass 255; a step of shared taps is three look-ups.
    void cut(Block* block, int ky) const {
        const int unit = layer->shares_taps ? layer->shape.kernel_w : 1;
        const int steps = layer->groups * layer->shape.kernel_w / unit;
        const int lanes = block->vectors * layer->format.lanes;
        std::vector<int> sums(lanes, 0), added(lanes);
        int start = 0;
        for (int step = 0; step < steps; ++step) {
            bool fits = true;
            for (int lane = 0; lane < lanes; ++lane) {
                added[lane] = 0;
                for (int i = 0; i < unit; ++i) added[lane] += reach(block->first_channel + lane, ky, step * unit + i);
                fits = fits && sums[lane] + added[lane] <= kByteLimit;
            }
            if (!fits) {
                block->chunks.push_back({ky, start, step - start});
                start = step;
                std::fill(sums.begin(), sums.end(), 0);
            }
            for (int lane = 0; lane < lanes; ++lane) sums[lane] += added[lane];
        }
        block->chunks.push_back({ky, start, steps - start});
    }

    void write(const Block& block) const {
        const int lanes = block.vectors * layer->format.lanes, steps = layer->groups * layer->shape.kernel_w;
        uint8_t* out = layer->weights.as<uint8_t>() + block.weights;
        for (int ky = 0; ky < layer->shape.kernel_h; ++ky)
            for (int step = 0; step < steps; ++step)
                for (int lane = 0; lane < lanes; ++lane) *out++ = code(block.first_channel + lane, ky, step);
    }
};

// The smallest total whose code is at least `wanted`; kNeverReached where there is none. Codes rise with totals, for
// scales are positive and rounding is monotone.
uint16_t threshold(const Requantize& requantize, int channel, int32_t offset, int32_t reach, int wanted) {
    int low = 0, high = reach + 1;  // the answer lies in low..high
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
              LutLayer* layer) {
    layer->shape = shape;
    layer->format = format;
    layer->groups = (shape.in_channels + format.group - 1) / format.group;
    const size_t padded = round_up(shape.out_channels, format.lanes);
    
    layer->shares_taps = format.has_shared_taps && shape.kernel_w == 3 && shape.stride_w == 1;

    const size_t count = static_cast<size_t>(shape.in_channels) * shape.kernel_h * shape.kernel_w;
    std::vector<int32_t> reach(shape.out_channels, 0);
    layer->offset.assign(shape.out_channels, 0);
    for (int o = 0; o < shape.out_channels; ++o) {
        int64_t sum = 0;
        for (size_t i = 0; i < count; ++i) {
            const int w = weights[o * count + i];
            sum += kHighestActivation * std::abs(w);
            layer->offset[o] += kHighestActivation * std::max(0, -w);
        }
        if (sum > kTotalLimit || !is_tame(requantize.bias[o], requantize.scale[o], sum)) return false;
        reach[o] = static_cast<int32_t>(sum);
    }

    const size_t row = static_cast<size_t>(layer->groups) * shape.kernel_w * shape.kernel_h;
    layer->weights = Buffer(row * padded);
    const Packer packer{weights, layer};
    for (int channel = 0; channel < static_cast<int>(padded);) {
        Block block;
        const int left = (static_cast<int>(padded) - channel) / format.lanes;
        block.vectors = std::min(left, layer->shares_taps ? 1 : format.most_vectors);
        block.first_channel = channel;
        block.weights = row * channel;
        for (int ky = 0; ky < shape.kernel_h; ++ky) packer.cut(&block, ky);
        packer.write(block);
        channel += block.vectors * format.lanes;
        layer->blocks.push_back(std::move(block));
    }
    fill_output(requantize, reach, layer);
    return true;
}

}  // namespace lowbit
