// The inner loops, one set an instruction set; everything above them is the same everywhere.
//
// Tensors inside a region are [height][width][stride] bytes: channels innermost, `stride` the channels rounded up to 64
// (an image that only dot products read: exactly its channels). What is in the padding channels is never used.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layers/layer.h"

namespace lowbit {

// Activations as offsets into the table of products: uint16 [height][width][groups], borders included.
struct LutJob {
    const LutLayer* layer;
    const uint16_t* index;  // where the first window starts
    size_t index_row;       // elements from one row to the next
    uint8_t* out;
    size_t out_stride;      // bytes from one position to the next
    int out_width;
};

// A convolution on dot products: weights int8 [out / lanes][kernel row][steps][lanes][4 bytes of a row]; codes are taken
// less a base, so that few bits are small numbers. Lanes are 64, or 16 where sums are added in 16 bits or products are tiles.
struct DotLayer {
    ConvShape shape;
    int steps = 0;       // ceil(kernel_w * in_channels / 4), rounded up to kTileSteps where products are tiles, with weights of 0
    bool is_gathered = false;  // all rows of the kernel are one: see `DotFormat::is_tiled`
    Buffer weights;
    int weight_bits = 8;  // fewer: see `DotFormat::is_tiled`
    std::vector<std::vector<Chunk>> chunks;  // of every 16 channels, where sums are added in 16 bits: steps that fit
    Buffer bias;         // int32 [padded channels]: bias minus (zero point - base) times the sum of the weights
    Buffer scale;        // float [padded channels]
    int zero = 0, low = 0, high = 255;
};

struct DotJob {
    const DotLayer* layer;
    const uint8_t* source;  // where the first window starts: [y][x][in_channels], borders included
    size_t source_row;      // bytes from one row to the next
    uint8_t* out;
    size_t out_stride;
    int out_width;
};

// A convolution of each channel by itself. Vectors interleave the bytes of two taps within 128 bits, so 64 channels are
// kept as (their place modulo 16 below 8 or not), then 4 times 8 of them: weights int8 [blocks of 64][pairs of taps][2][4]
// [8][2 taps], the last pair filled up with 0. Sums of raw codes fit 16 signed bits: 255 sum |w| <= 32,767.
struct DepthwiseLayer {
    ConvShape shape;     // in_channels = out_channels
    int pairs = 0;
    Buffer weights;
    Buffer bias;         // int32 [padded channels] by `depthwise_place`: bias minus zero point times the sum of the weights
    Buffer scale;        // float, likewise
    int zero = 0, low = 0, high = 255;
};

// Even and odd channels of the lower and of the upper eight of every sixteen, four vectors of numbers.
inline size_t depthwise_place(int channel) {
    const int sixteen = channel % 64 / 16, in_it = channel % 16;
    return static_cast<size_t>(channel / 64) * 64 + (in_it / 8 * 2 + in_it % 2) * 16 + sixteen * 4 + in_it % 8 / 2;
}

inline size_t depthwise_weight_place(int channel, int tap, int pairs) {
    const int sixteen = channel % 64 / 16, in_it = channel % 16;
    return (static_cast<size_t>(channel / 64) * pairs + tap / 2) * 128 + in_it / 8 * 64 + sixteen * 16 + in_it % 8 * 2 + tap % 2;
}

struct DepthwiseJob {
    const DepthwiseLayer* layer;
    const uint8_t* source;  // where the first window starts: [y][x][stride], borders included
    size_t source_row;
    uint8_t* out;
    size_t stride;          // bytes a position, of source and output
    int out_width;
};

// Sum of two tensors, in one of ONNX Runtime's arithmetics. QLinearAdd's on x86:
//     round(a * ratio_a + (b * ratio_b + fixed)), both products fused with their additions;
// on Arm, in integers, halves away from zero:
//     round((multiplier_a (a - zero_a) + multiplier_b (b - zero_b)) / 2^right) + zero_c;
// or, where the file is not of the pattern it fuses, real numbers:
//     round((scale_a (a - zero_a) + scale_b (b - zero_b)) / scale_c) + zero_c.
struct AddJob {
    bool is_fused = true;
    int shift_a = 0, shift_b = 0, shift_c = 0;  // 128 where the file's tensor is int8: taken off codes, added to results
    float ratio_a = 0, ratio_b = 0, fixed = 0;
    float scale_a = 0, scale_b = 0, scale_c = 1;
    int zero_a = 0, zero_b = 0, zero_c = 0;     // of the codes as kept here
    int low = 0, high = 255;
    int32_t multiplier_a = 0, multiplier_b = 0;
    int right = 0;                              // above 0: in integers
    bool is_integer() const { return right > 0; }
};

struct PoolJob {
    const uint8_t* source;
    uint8_t* out;
    int height, width, stride;  // of the source; `stride` bytes a position, a multiple of 64
    int out_width;
    int kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;
};

struct NarrowJob {
    const NarrowLayer* layer;
    const uint8_t* planes;  // where the first window starts
    size_t plane, row;      // bytes from one group, one row to the next
    uint8_t* out;
    size_t out_stride;
    int out_height, out_width;
};

constexpr int kWideFormats = 2;
constexpr int kTileSteps = 16, kGatherLimit = 32, kGatherRows = 8;
constexpr int kShortLanes = 16;  // channels whose sums are added in 16 bits together, or in a tile

// How dot products take weights, where sums of products in 16 signed bits are exact only for some.
struct DotFormat {
    int lowest_weight = -128, highest_weight = 127;
    int base = 0;  // taken off activations before they are multiplied
    int sign = 1;  // of weights as they are kept, and so of sums
    // Tiles (AMX): a product is faster than the runtime's, so regions begin with convolutions of up to four bits. Rows of a
    // kernel take a multiple of kTileSteps; kernels of at most kGatherRows rows of at most kGatherLimit bytes are one row,
    // theirs one after another. Weights of two or four bits are kept in as many: kTileSteps steps of kShortLanes lanes
    // (1 KB) are 4 or 8 vectors of 64 bytes, and with f = 8 / bits, field i of byte j of vector v, lowest bits first, is
    // byte j of step v f + i.
    bool is_tiled = false;
};

struct Kernels {
    const char* name;
    LutFormat format;    // of two bits
    bool has_exact_dot;  // products of any weights; else pairs of products must fit 16 signed bits

    void (*lut_conv)(const LutJob& job, const Block& block, int first_row, int last_row);
    void (*dot_conv)(const DotJob& job, int block, int first_row, int last_row);
    void (*depthwise)(const DepthwiseJob& job, int first_row, int last_row);
    // One row of positions into indices; codes are less `base`, channels past the end count as 0.
    void (*pack_index)(const uint8_t* codes, size_t stride, int width, const LutLayer& layer, int base, uint16_t* out);
    void (*add)(const AddJob& job, const uint8_t* a, const uint8_t* b, uint8_t* out, size_t count);
    void (*map)(const uint8_t* table, const uint8_t* codes, uint8_t* out, size_t count);
    void (*max_pool)(const PoolJob& job, int first_row, int last_row);
    // Of look-up layers with few channels: vectors of 64 positions [first, last), counted along rows of `row` bytes. Null
    // where lanes are better channels.
    void (*narrow_conv)(const NarrowJob& job, int first, int last);
    // A row of positions to a row of codes of three activations in each group's plane.
    void (*pack_planes)(const uint8_t* codes, size_t stride, int width, const NarrowLayer& layer, int base, uint8_t* out,
                        size_t plane);
    // Planes [channels][positions] to positions [positions][stride], and back; `flip` is XORed to every byte.
    void (*import_planes)(const uint8_t* planes, int channels, size_t positions, uint8_t* out, size_t stride,
                          uint8_t flip, size_t first, size_t last);
    void (*export_planes)(const uint8_t* codes, size_t stride, int channels, size_t positions, uint8_t* planes,
                          uint8_t flip, int first_channel, int last_channel);

    LutFormat wide_formats[kWideFormats]{};  // of wider codes, tried in order; no lanes: none
    bool has_short_sums = false;  // dot products of few bits are added in 16 bits, and so are faster than those of 8
    DotFormat dot{};
};

// The format that holds weights of lowest..highest and activations of 0..span, or null.
inline const LutFormat* fitting_format(const Kernels& kernels, int lowest, int highest, int span) {
    const LutFormat* const formats[1 + kWideFormats] = {&kernels.format, &kernels.wide_formats[0], &kernels.wide_formats[1]};
    for (const LutFormat* format : formats)
        if (format->lanes > 0 && format->lowest_weight() <= lowest && highest <= format->highest_weight() &&
            span <= format->highest_activation())
            return format;
    return nullptr;
}

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the library was built for another processor family
const Kernels* avx512_kernels();
const Kernels* amx_kernels();           // null, too, where the compiler knew no AMX
const Kernels* emulated_amx_kernels();  // the same in plain C++, for tests; needs AVX-512
const Kernels* neon_kernels();

}  // namespace lowbit
