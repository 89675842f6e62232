// What a convolution on look-up tables is made of once its weights are packed; independent of any instruction set.
//
// Arithmetic. A weight w is one of {-2, -1, 0, 1}, an activation a (its zero point taken off) one of {0, 1, 2, 3}; or
// -4..3 and 0..7; or -2..1 and 0..15 (`LutFormat`). With A the highest activation, a look-up of a *group* of two or
// three input channels gives, for the group's weights and activations,
//
//     T[a][w] = sum_i w_i a_i + A sum_i max(0, -w_i)            0 <= T <= A sum_i |w_i|
//
// The second sum depends on the weights alone. It makes every entry non-negative, so that bytes can be added without a
// sign, and its total over a channel's weights, the channel's *offset*, is taken off again in thresholds or biases.
// Signed activations -2..1 are looked up as 0..3; what that adds, 2 sum w, is part of the offset (other widths likewise).
//
// Bounds. A look-up adds at most A sum_i |w_i| to its lane. A byte may hold 255, so a *chunk* of look-ups ends before
// any lane's A sum |w| passes 255 (two bits: at worst after 14 groups of three, 85 / 6; three: after 4 pairs, 36 / 8);
// then bytes are added to 16-bit totals. Three taps that share a table add at most 180 (15 * 4 * 3), so a step fits.
// A channel's total is at most A sum |w| over all its weights: `pack_lut` refuses layers where that passes 65,534 (two
// bits, all weights -2: more than 10,922 of them), so 16 unsigned bits are exact, and 65,535 is free to mean "never
// reached".
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "layers/memory.h"

namespace lowbit {

constexpr int kLineBytes = 64;        // a cache line, and the widest vector
constexpr int kChannelUnit = 64;      // channels of a tensor are padded to a multiple of this
constexpr int kSlack = 512;           // bytes that may be read past the end of any buffer
constexpr int kLowestWeight = -2, kHighestWeight = 1, kHighestActivation = 3;  // of two bits
constexpr int kMostTaps = 64;         // of a kernel's row
constexpr int kMostLanes = 128;       // of a block
constexpr int kSecondTable = 64;   // bit of a code of weights
constexpr int kByteLimit = 255, kTotalLimit = 65534, kNeverReached = 65535;

inline size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

struct ConvShape {
    int in_channels = 0, out_channels = 0;
    int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
    int pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;

    int out_height(int height) const { return (height + pad_top + pad_bottom - kernel_h) / stride_h + 1; }
    int out_width(int width) const { return (width + pad_left + pad_right - kernel_w) / stride_w + 1; }
    bool is_point() const { return kernel_h == 1 && kernel_w == 1; }
};

// How an accumulator becomes an output code, the way ONNX Runtime's QLinearConv computes it, in single precision:
//     code = clamp(round_half_even(float(accumulator + bias) * scale), -zero, 255 - zero) + zero, then cut to low..high
// Codes are bytes; int8 tensors are kept with 128 added to codes and zero points.
//
// Kernels leave the first clamp to saturation: `is_tame` says that the product stays below 2^30 for any accumulator.
struct Requantize {
    std::vector<int32_t> bias;   // a channel each
    std::vector<float> scale;    // a channel each: float(input scale * weight scale) / output scale
    int zero = 0, low = 0, high = 255;
};

struct Chunk {
    int32_t row;     // of the kernel
    int32_t start;   // first group step of that row
    int32_t length;  // group steps
};

struct Block {
    int vectors = 1;            // of `lanes` output channels that are computed together
    int first_channel = 0;
    size_t weights = 0;         // offset in bytes
    bool is_paired = false;     // at most half a vector of channels: the other half is a second position's
    std::vector<Chunk> chunks;
    const Chunk* first() const { return chunks.data(); }
    const Chunk* last() const { return chunks.data() + chunks.size(); }
};

// How an instruction set wants its look-up layers of some width.
struct LutFormat {
    int lanes;         // output channels a vector: 64 or 32
    int group;         // input channels a look-up: 3 or 2
    int table_stride;  // bytes between tables of neighboring activation codes
    int most_vectors;  // vectors a block
    bool has_shared_taps;
    int weight_bits = 2, act_bits = 2;
    bool has_pairs = false;  // of positions in a vector, where a layer's last channels fill no more than half of one

    int lowest_weight() const { return -(1 << (weight_bits - 1)); }
    int highest_weight() const { return (1 << (weight_bits - 1)) - 1; }
    int highest_activation() const { return (1 << act_bits) - 1; }
    int product(int activations, int weights) const;  // an entry of T, of two codes
};

struct LutLayer {
    ConvShape shape;
    LutFormat format{};
    int groups = 0;            // look-ups over the input channels: group g holds channels g, g + groups, g + 2 groups
    bool shares_taps = false;  // weights of three neighboring taps are side by side and share a table
    std::vector<Block> blocks;
    std::vector<int32_t> offset;  // a channel each
    Buffer weights;
    const uint8_t* tables = nullptr;  // of products, where the kernels have none of their own
    int border = 0;            // index of a position outside the tensor, whose activations are all the zero point's
    bool is_narrow = false;    // at most four output codes: three thresholds a channel
    int lowest_code = 0;       // of narrow outputs
    Buffer thresholds;         // uint16 [out_channels / lanes][3][even, odd][lanes / 2], of totals
    Buffer bias;               // int32 [padded channels], in the order of `quarter_place`: bias minus offset
    Buffer scale;              // float, likewise
    int zero = 0, low = 0, high = 255;
};

// A layer of few output channels and stride 1: lanes are 64 neighboring positions, the weights choose the table and the
// activations look it up. Activations are planes of codes [groups][rows][row], borders included.
constexpr int kNarrowChannels = 8;  // computed together

struct NarrowLayer {
    ConvShape shape;
    int groups = 0, border = 0;
    Buffer weights;             // uint16 [blocks of 8 channels][groups][kernel_h][kernel_w][8]: offset of a table
    std::vector<int> chunks;    // steps each
    bool is_narrow = false;
    int lowest_code = 0;
    std::vector<uint16_t> thresholds;  // three a channel
    std::vector<int32_t> bias;
    std::vector<float> scale;
    int zero = 0, low = 0, high = 255;
};

// Totals of a vector's channels are taken out of 16-bit words by masks and shifts, four vectors of 32-bit numbers:
// channels 0, 4, 8, ...; then 2, 6, ...; 1, 5, ...; 3, 7, ... Where a channel's bias and scale are kept:
inline size_t quarter_place(int channel, int lanes) {
    constexpr int quarters[4] = {0, 2, 1, 3};
    const int lane = channel % lanes;
    return static_cast<size_t>(channel) - lane + quarters[lane % 4] * (lanes / 4) + lane / 4;
}

// Pack a layer. Weights are [out][in][kh][kw] of -2..1. Activations are codes less a base, 0..3, of which the zero point
// is `zero`: 0 for unsigned grids, 2 for signed ones. Returns false where the 16-bit totals would not be exact.
bool pack_lut(const int8_t* weights, const ConvShape& shape, const LutFormat& format, const Requantize& requantize,
              int zero, LutLayer* layer);

bool pack_narrow(const int8_t* weights, const ConvShape& shape, const Requantize& requantize, int zero, NarrowLayer* layer);

// The table of products of a format, [activation codes][table_stride bytes], made once; tables shorter than their stride are
// repeated.
const uint8_t* product_tables(const LutFormat& format);

// Whether float(accumulator + bias) * scale stays below 2^30 for accumulators of up to `reach` either way.
bool is_tame(int32_t bias, float scale, int64_t reach);

// The code of an accumulator, in single precision as above.
uint8_t requantized(const Requantize& requantize, int channel, int32_t accumulator);

}  // namespace lowbit
