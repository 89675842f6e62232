// Weights of look-up layers: codes, chunks that cannot overflow, thresholds of totals.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "layers/layer.h"

namespace lowbit {

namespace {

// Eight rows of eight bytes, first byte lowest, become eight columns: halves, quarters, then single bytes change places.
void transpose_eight(uint64_t (&rows)[8]) {
    constexpr uint64_t masks[3] = {0x00000000FFFFFFFFull, 0x0000FFFF0000FFFFull, 0x00FF00FF00FF00FFull};
    for (int round = 0; round < 3; ++round) {
        const int apart = 4 >> round, bits = 8 * apart;
        for (int i = 0; i < 8; ++i) {
            if (i & apart) continue;
            const uint64_t a = rows[i], b = rows[i + apart], mask = masks[round];
            rows[i] = (a & mask) | (b & mask) << bits;
            rows[i + apart] = (a >> bits & mask) | (b & ~mask);
        }
    }
}

class Packer {
public:
    Packer(const int8_t* source, LutLayer* layer)
        : source_(source), layer_(layer), taps_(static_cast<size_t>(layer->shape.kernel_h) * layer->shape.kernel_w),
          steps_(static_cast<size_t>(layer->groups) * layer->shape.kernel_w),
          zeros_(code_of_zeros(layer->format)), codes_(kLanesTogether * stride()) {}

    void pack(Block* block) {
        for (int lane = 0; lane < lanes(*block); lane += kLanesTogether) write(*block, lane);
        if (block->is_paired) repeat(*block);
        for (int ky = 0; ky < layer_->shape.kernel_h; ++ky) cut(block, ky);
    }

private:
    static constexpr int kLanesTogether = 8;

    static uint8_t code_of_zeros(const LutFormat& format) {
        int code = 0;
        for (int i = 0; i < format.group; ++i) code |= -format.lowest_weight() << format.weight_bits * i;
        return static_cast<uint8_t>(code);
    }

    int lanes(const Block& block) const { return block.vectors * layer_->format.lanes; }
    size_t stride() const { return round_up(layer_->groups * taps_, 8); }
    uint8_t* row(const Block& block, int ky) const {
        return layer_->weights.as<uint8_t>() + block.weights + ky * steps_ * lanes(block);
    }

    // Group g holds channels g, g + groups, ..., so that in memory, where a channel's taps are neighbors, the codes of all
    // groups and taps are sums of two or three runs. Lanes past the last channel hold weights of 0.
    void encode(size_t out, uint8_t* codes) const {
        const size_t count = layer_->groups * taps_, all = layer_->shape.in_channels * taps_;
        std::fill_n(codes, count, zeros_);
        if (out >= static_cast<size_t>(layer_->shape.out_channels)) return;
        for (size_t i = 0; i < static_cast<size_t>(layer_->format.group) && i * count < all; ++i) {
            const int8_t* const from = source_ + out * all + i * count;
            const size_t there = std::min(count, all - i * count);
            const int unit = 1 << layer_->format.weight_bits * i;
            for (size_t j = 0; j < there; ++j) codes[j] = static_cast<uint8_t>(codes[j] + from[j] * unit);
        }
    }

    // Eight lanes at a time. Taps are innermost where they share tables, groups otherwise.
    void write(const Block& block, int lane) {
        const size_t count = lanes(block), groups = layer_->groups, width = layer_->shape.kernel_w;
        for (int i = 0; i < kLanesTogether; ++i) encode(block.first_channel + lane + i, codes_.data() + i * stride());
        uint8_t* const base = row(block, 0) + lane;
        const size_t tap_step = (layer_->shares_taps ? 1 : groups) * count, group_step = (layer_->shares_taps ? width : 1) * count;
        const size_t row_step = steps_ * count;
        size_t group = 0, ky = 0, kx = 0;
        for (size_t first = 0; first < groups * taps_; first += 8) {
            uint64_t eight[8];
            for (int i = 0; i < 8; ++i) std::memcpy(&eight[i], codes_.data() + i * stride() + first, 8);
            transpose_eight(eight);
            for (size_t i = 0; i < 8 && first + i < groups * taps_; ++i) {
                std::memcpy(base + ky * row_step + kx * tap_step + group * group_step, &eight[i], 8);
                if (++kx < width) continue;
                kx = 0;
                if (++ky < static_cast<size_t>(layer_->shape.kernel_h)) continue;
                ky = 0;
                ++group;
            }
        }
    }

    // The upper half of a vector looks the same weights up in a second table, which bit 6 of a code chooses.
    void repeat(const Block& block) const {
        const int half = layer_->format.lanes / 2;
        uint8_t* codes = row(block, 0);
        for (size_t step = 0; step < steps_ * layer_->shape.kernel_h; ++step, codes += 2 * half)
            for (int lane = 0; lane < half; ++lane) codes[half + lane] = codes[lane] | kSecondTable;
    }

    // The most that look-ups of these weights add, a lane each: A sum |w|. Fields are compared as they are stored.
    void add_reach(const uint8_t* codes, int count, uint8_t* reach) const {
        const LutFormat& format = layer_->format;
        const uint8_t mask = static_cast<uint8_t>((1 << format.weight_bits) - 1), zero = static_cast<uint8_t>(-format.lowest_weight());
        const uint8_t highest = static_cast<uint8_t>(format.highest_activation());
        for (int i = 0; i < format.group; ++i)
            for (int lane = 0; lane < count; ++lane) {
                const uint8_t w = codes[lane] >> format.weight_bits * i & mask;
                reach[lane] = static_cast<uint8_t>(reach[lane] + highest * (std::max(w, zero) - std::min(w, zero)));
            }
    }

    // Cut a row of the kernel where a lane's byte could pass 255; a step of shared taps is three look-ups.
    void cut(Block* block, int ky) const {
        const int unit = layer_->shares_taps ? layer_->shape.kernel_w : 1, count = lanes(*block);
        const int steps = static_cast<int>(steps_) / unit;
        uint8_t added[kMostLanes];
        uint16_t sums[kMostLanes] = {};
        const uint8_t* codes = row(*block, ky);
        int start = 0;
        for (int step = 0; step < steps; ++step) {
            std::fill_n(added, count, 0);
            for (int i = 0; i < unit; ++i, codes += count) add_reach(codes, count, added);
            unsigned passed = 0;
            for (int lane = 0; lane < count; ++lane) passed |= (sums[lane] = static_cast<uint16_t>(sums[lane] + added[lane]));
            if (passed <= kByteLimit) continue;  // a sum past 255 has a higher bit, which no other can take away
            block->chunks.push_back({ky, start, step - start});
            start = step;
            for (int lane = 0; lane < count; ++lane) sums[lane] = added[lane];
        }
        block->chunks.push_back({ky, start, steps - start});
    }

    const int8_t* source_;
    LutLayer* layer_;
    size_t taps_, steps_;  // of a channel; look-ups of a kernel row
    uint8_t zeros_;
    std::vector<uint8_t> codes_;  // of eight lanes
};

// The smallest total whose code is at least `wanted`; kNeverReached where there is none. Codes rise with totals, for
// scales are positive and rounding is monotone. The real number at which the code would change is a guess that single
// precision may miss by a little: the formula itself decides.
uint16_t threshold(const Requantize& requantize, int channel, int32_t offset, int32_t reach, int wanted) {
    const auto is_reached = [&](int total) { return requantized(requantize, channel, total - offset) >= wanted; };
    int low = 0, high = reach + 1;  // the answer is in low..high
    const double edge = (wanted - requantize.zero - 0.5) / static_cast<double>(requantize.scale[channel]);
    int guess = static_cast<int>(std::min<double>(std::max<double>(std::ceil(edge) - requantize.bias[channel] + offset, low), high));
    for (int tries = 0; tries < 3 && low < high; ++tries) {
        if (guess > low) {
            if (is_reached(guess - 1)) high = guess - 1;
            else low = guess;
        }
        if (low < high && guess < high) {
            if (is_reached(guess)) high = guess;
            else low = guess + 1;
        }
        guess = std::min(std::max(guess, low), high);
    }
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (is_reached(middle)) high = middle;
        else low = middle + 1;
    }
    return static_cast<uint16_t>(low > reach ? kNeverReached : low);
}

// Whose numbers a place among the padded channels holds: its own channel's, in the upper half of a paired block those of
// the lower half, or nobody's (-1).
int channel_at(const LutLayer& layer, int place) {
    const int lanes = layer.format.lanes, channels = layer.shape.out_channels;
    if (place < channels) return place;
    const bool is_paired = !layer.blocks.empty() && layer.blocks.back().is_paired && place % lanes >= lanes / 2;
    return is_paired && place - lanes / 2 < channels ? place - lanes / 2 : -1;
}

void fill_output(const Requantize& requantize, const std::vector<int32_t>& reach, LutLayer* layer) {
    const int channels = layer->shape.out_channels, lanes = layer->format.lanes;
    const int padded = static_cast<int>(round_up(channels, kChannelUnit));
    layer->zero = requantize.zero;
    layer->low = requantize.low;
    layer->high = requantize.high;
    layer->bias = Buffer(padded * sizeof(int32_t));
    layer->scale = Buffer(padded * sizeof(float));
    int lowest = 255, highest = 0;
    for (int place = 0; place < padded; ++place) {
        const int c = channel_at(*layer, place);
        if (c < 0) continue;
        layer->bias.as<int32_t>()[quarter_place(place, lanes)] = requantize.bias[c] - layer->offset[c];
        layer->scale.as<float>()[quarter_place(place, lanes)] = requantize.scale[c];
        lowest = std::min<int>(lowest, requantized(requantize, c, -layer->offset[c]));
        highest = std::max<int>(highest, requantized(requantize, c, reach[c] - layer->offset[c]));
    }
    layer->is_narrow = highest - lowest <= 3;
    layer->lowest_code = lowest;
    if (!layer->is_narrow) return;
    layer->thresholds = Buffer(padded * 3 * sizeof(uint16_t));
    for (int place = 0; place < padded; ++place)
        for (int k = 0; k < 3; ++k) {
            const int lane = place % lanes, c = channel_at(*layer, place);
            const size_t at = ((static_cast<size_t>(place / lanes) * 3 + k) * 2 + (lane & 1)) * (lanes / 2) + lane / 2;
            layer->thresholds.as<uint16_t>()[at] =
                c < 0 ? kNeverReached : threshold(requantize, c, layer->offset[c], reach[c], lowest + k + 1);
        }
}

// Offsets and reaches of a layer's channels; false where totals would not be exact.
bool measure(const int8_t* weights, const ConvShape& shape, int highest, const Requantize& requantize, int zero,
             std::vector<int32_t>* offset, std::vector<int32_t>* reach) {
    const size_t count = static_cast<size_t>(shape.in_channels) * shape.kernel_h * shape.kernel_w;
    for (int o = 0; o < shape.out_channels; ++o) {
        const int8_t* const w = weights + o * count;
        int32_t sum = 0, below = 0;
        for (size_t i = 0; i < count; ++i) {
            sum += std::abs(w[i]);
            below += w[i] < 0 ? -w[i] : 0;
        }
        offset->push_back(highest * below + zero * (sum - 2 * below));
        reach->push_back(highest * sum);
        if (reach->back() > kTotalLimit || !is_tame(requantize.bias[o], requantize.scale[o], 2 * reach->back())) return false;
    }
    return true;
}

}  // namespace

int LutFormat::product(int activations, int weights) const {
    int sum = 0;
    for (int i = 0; i < group; ++i) {
        const int w = (weights >> weight_bits * i & ((1 << weight_bits) - 1)) + lowest_weight();
        const int a = activations >> act_bits * i & highest_activation();
        sum += w * a + (w < 0 ? -highest_activation() * w : 0);
    }
    return sum;
}

const uint8_t* product_tables(const LutFormat& format) {
    static std::mutex mutex;
    static std::map<std::array<int, 4>, Buffer> made;
    const std::lock_guard<std::mutex> lock(mutex);
    Buffer& tables = made[{format.group, format.weight_bits, format.act_bits, format.table_stride}];
    if (tables.size() > 0) return tables.as<uint8_t>();
    const int codes = 1 << format.group * format.act_bits, entries = 1 << format.group * format.weight_bits;
    tables = Buffer(static_cast<size_t>(codes) * format.table_stride);
    for (int a = 0; a < codes; ++a)
        for (int w = 0; w < format.table_stride; ++w)
            tables.as<uint8_t>()[a * format.table_stride + w] = static_cast<uint8_t>(format.product(a, w % entries));
    return tables.as<uint8_t>();
}

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
    layer->tables = product_tables(format);
    layer->shares_taps = format.has_shared_taps && shape.kernel_w == 3 && shape.stride_w == 1;

    std::vector<int32_t> reach;
    layer->offset.clear();
    if (!measure(weights, shape, format.highest_activation(), requantize, zero, &layer->offset, &reach)) return false;
    layer->border = 0;
    for (int i = 0; i < format.group; ++i) layer->border |= zero << format.act_bits * i;
    layer->border *= format.table_stride;

    const size_t row = static_cast<size_t>(layer->groups) * shape.kernel_w * shape.kernel_h;
    layer->weights = Buffer(row * padded);
    Packer packer(weights, layer);
    for (int channel = 0; channel < static_cast<int>(padded);) {
        Block block;
        const int left = (static_cast<int>(padded) - channel) / format.lanes;
        block.vectors = std::min(left, layer->shares_taps ? 1 : format.most_vectors);
        block.first_channel = channel;
        block.weights = row * channel;
        block.is_paired = format.has_pairs && block.vectors == 1 && shape.out_channels - channel <= format.lanes / 2;
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
    if (!measure(weights, shape, kHighestActivation, requantize, zero, &offset, &reach)) return false;
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
