// AMX: convolutions of any codes on tiles of 16 positions, 16 output channels and 64 bytes of a row of pixels.
//
// Four tiles of positions share each tile of weights, so a product costs little more than one load. No pixels are copied
// for it: the rows of a tile are windows of neighboring positions, `stride_w * in_channels` bytes apart in memory. The
// weights of a kernel's row are filled up with zeros to whole tiles; what pixels are read past a window meet these.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/amx_tiles.h"
#include "kernels/avx512.h"

namespace lowbit {
namespace {

constexpr int kLanes = 64, kGroup = kSumTiles, kChannelTiles = kLanes / kTileChannels;
constexpr int kLatency = 52, kLeastPositions = kLatency / kGroup;  // cycles of a product: fewer rows are not faster

// Sums of one group: [tiles of positions][tiles of channels][positions][channels].
using Sums = int32_t[kGroup][kChannelTiles][kTileRows][kTileChannels];

// How the positions of some rows are cut into tiles of one height. With a stride of 1, several rows are one line of
// positions in memory, borders between them included; where that takes fewer tiles, sums at borders are thrown away.
struct Cut {
    int lines, width;  // positions of a line
    int pitch;         // positions from one row to the next within a line; a line of one row: its width
    int each, height;  // tiles of a line, positions of a tile: the last ones overlap their neighbors

    int tiles() const { return lines * each; }
    int cost() const { return (tiles() + kGroup - 1) / kGroup * (height > kLeastPositions ? height : kLeastPositions); }
    int position(int tile) const {  // within its line
        const int at = tile % each * height;
        return at + height > width ? width - height : at;
    }
};

Cut cut(int lines, int width, int pitch) {
    const int each = (width + kTileRows - 1) / kTileRows;
    return {lines, width, pitch, each, (width + each - 1) / each};
}

Cut best_cut(const DotJob& job, int rows) {
    const ConvShape& s = job.layer->shape;
    const Cut apart = cut(rows, job.out_width, job.out_width);
    if (s.stride_h != 1 || s.stride_w != 1 || rows == 1) return apart;
    const int pitch = static_cast<int>(job.source_row / s.in_channels);
    const Cut joined = cut(1, (rows - 1) * pitch + job.out_width, pitch);
    return joined.cost() < apart.cost() ? joined : apart;
}

template <int M, typename Tiles> INLINE void clear_sums(Tiles& tiles) {
    if constexpr (M > 0) tiles.template clear<M - 1>(), clear_sums<M - 1>(tiles);
}

template <int M, int From = 0, typename Tiles> INLINE void step(Tiles& tiles, const uint8_t* const* pixels, ptrdiff_t at, size_t row) {
    if constexpr (From < M) {
        constexpr int kPixels = kFirstPixels + From % (kWeights - kFirstPixels);
        tiles.template load<kPixels>(pixels[From] + at, row);
        tiles.template multiply<From, kPixels, kWeights>();
        step<M, From + 1>(tiles, pixels, at, row);
    }
}

template <int M, int From = 0, typename Tiles> INLINE void store_sums(Tiles& tiles, int channels, Sums& sums) {
    if constexpr (From < M) {
        tiles.template store<From>(sums[From][channels], kTileBytes);
        store_sums<M, From + 1>(tiles, channels, sums);
    }
}

// Sums of M tiles of positions and all channels of a block.
template <int M, typename Tiles>
__attribute__((noinline)) void accumulate(Tiles& tiles, const DotJob& job, const int8_t* weights, int channel_tiles,
                                          const uint8_t* const* pixels, Sums& sums) {
    const ConvShape& shape = job.layer->shape;
    const size_t row = static_cast<size_t>(shape.stride_w) * shape.in_channels;
    const ptrdiff_t bytes = job.layer->steps * 4, source_row = static_cast<ptrdiff_t>(job.source_row);
    for (int channels = 0; channels < channel_tiles; ++channels) {
        clear_sums<M>(tiles);
        for (int ky = 0; ky < shape.kernel_h; ++ky)
            for (ptrdiff_t at = 0; at < bytes; at += kTileBytes, weights += kTileRows * kTileBytes) {
                tiles.template load<kWeights>(weights, kTileBytes);
                step<M>(tiles, pixels, ky * source_row + at, row);
            }
        store_sums<M>(tiles, channels, sums);
    }
}

template <typename Tiles>
void conv(const DotJob& job, int block, int first_row, int last_row) {
    constexpr decltype(&accumulate<1, Tiles>) kAccumulate[kGroup] = {accumulate<1, Tiles>, accumulate<2, Tiles>,
                                                                     accumulate<3, Tiles>, accumulate<4, Tiles>};
    const DotLayer& layer = *job.layer;
    const ConvShape& s = layer.shape;
    const Output to = output_of(layer);
    const int8_t* const weights = layer.weights.as<int8_t>() + static_cast<size_t>(block) * s.kernel_h * layer.steps * 4 * kLanes;
    const int channels = s.out_channels - block * kLanes, used = channels < kLanes ? channels : kLanes;
    const int channel_tiles = (used + kTileChannels - 1) / kTileChannels;
    const int32_t* const bias = layer.bias.as<int32_t>() + block * kLanes;
    const float* const scale = layer.scale.as<float>() + block * kLanes;
    const size_t row = s.stride_h * job.source_row, position = static_cast<size_t>(s.stride_w) * s.in_channels;
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const Cut parts = best_cut(job, last_row - first_row);
    alignas(64) Sums sums = {};  // of channels past the last tile: zeros
    Tiles tiles(parts.height);
    for_tiles(parts.tiles(), kGroup, [&](int first, int count) {
        const uint8_t* pixels[kGroup];
        for (int m = 0; m < count; ++m)
            pixels[m] = job.source + (first_row + (first + m) / parts.each) * row + parts.position(first + m) * position;
        kAccumulate[count - 1](tiles, job, weights, channel_tiles, pixels, sums);
        for (int m = 0; m < count; ++m) {
            const int at = parts.position(first + m);
            int y = first_row + (first + m) / parts.each + at / parts.pitch, x = at % parts.pitch;
            for (int p = 0; p < parts.height; ++p, ++x) {
                if (x == parts.pitch) x = 0, ++y;
                if (x >= job.out_width) continue;  // between two rows
                const __m512i codes = to_bytes(rounded(_mm512_load_si512(sums[m][0][p]), bias, scale),
                                               rounded(_mm512_load_si512(sums[m][1][p]), bias + 16, scale + 16),
                                               rounded(_mm512_load_si512(sums[m][2][p]), bias + 32, scale + 32),
                                               rounded(_mm512_load_si512(sums[m][3][p]), bias + 48, scale + 48), to);
                _mm512_storeu_si512(job.out + (static_cast<size_t>(y) * job.out_width + x) * job.out_stride + block * kLanes,
                                    _mm512_permutexvar_epi32(order, codes));
            }
        }
    });
}

// Everything but convolutions is AVX-512's. Nothing is looked up: a product of tiles does five times as much as a look-up.
Kernels on_tiles(const char* name, decltype(Kernels::dot_conv) dot_conv) {
    Kernels kernels = *avx512_kernels();
    kernels.name = name;
    kernels.format = {};
    for (LutFormat& format : kernels.wide_formats) format = {};
    kernels.lut_conv = nullptr;
    kernels.pack_index = nullptr;
    kernels.narrow_conv = nullptr;
    kernels.pack_planes = nullptr;
    kernels.dot_conv = dot_conv;
    kernels.dot.lanes = kTileChannels;
    kernels.dot.step_unit = kTileRows;
    kernels.dot.is_faster = true;
    return kernels;
}

}  // namespace

const Kernels* amx_kernels() {
#if defined(__AMX_INT8__)
    static const Kernels kernels = on_tiles("amx", conv<HardwareTiles>);
    return &kernels;
#else
    return nullptr;
#endif
}

const Kernels* emulated_amx_kernels() {
    static const Kernels kernels = on_tiles("amx_emulated", conv<EmulatedTiles>);
    return &kernels;
}

}  // namespace lowbit

#else

namespace lowbit {
const Kernels* amx_kernels() { return nullptr; }
const Kernels* emulated_amx_kernels() { return nullptr; }
}  // namespace lowbit

#endif
