// AMX: convolutions of any codes on tiles of 16 positions, 16 output channels and 64 bytes of a row of pixels.
//
// Four tiles of positions share each tile of weights, so a product costs little more than one load. No pixels are copied
// for it: the rows of a tile are windows of neighboring positions, `stride_w * in_channels` bytes apart in memory. The
// weights of a kernel's row are filled up with zeros to whole tiles; what pixels are read past a window meet these.
//
// Weights of few bits are kept in as few in memory, which is what limits layers of many channels on small maps, and become
// bytes in the first cache on their way to a tile: one GF2P8AFFINEQB takes a field out of 64 bytes and extends its sign.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/amx_tiles.h"
#include "kernels/avx512.h"

namespace lowbit {
namespace {

constexpr int kLanes = 64, kGroup = kSumTiles, kChannelTiles = kLanes / kTileChannels;
constexpr int kLatency = 52, kLeastPositions = kLatency / kGroup;  // cycles until a sum can be added to again: fewer rows gain nothing

// Sums of one group: [tiles of positions][tiles of channels][positions][channels].
using Sums = int32_t[kGroup][kChannelTiles][kTileRows][kTileChannels];

constexpr unsigned kAhead = 2;  // unpacked tiles of weights: the one in use and the next
constexpr int kMostGathered = kGatherLimit * kGatherRows;  // bytes of a window, whole tiles
static_assert(kMostGathered % kTileBytes == 0 && kTileRows == kTileSteps && kTileChannels == kShortLanes);

// What a window is in memory: rows of bytes, a multiple of a tile's.
struct Rows {
    int count, bytes;
    ptrdiff_t pitch;   // from one row to the next
    size_t position;   // from one window to the next
};

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

// For GF2P8AFFINEQB: row 7 - i of 8 bits chooses the bit of a byte that becomes bit i. Bits above the field are its highest.
constexpr int64_t field_bits(int bits, int field) {
    uint64_t matrix = 0;
    for (int i = 0; i < 8; ++i) matrix |= uint64_t{1} << (bits * field + (i < bits ? i : bits - 1)) << 8 * (7 - i);
    return static_cast<int64_t>(matrix);
}

// A tile of weights of `Bits` bits as bytes.
template <int Bits> INLINE void unpack(const uint8_t* packed, uint8_t* tile) {
    constexpr int kFields = 8 / Bits;
    UNROLL for (int v = 0; v < kTileRows / kFields; ++v) {
        const __m512i all = _mm512_load_si512(packed + v * kTileBytes);
        UNROLL for (int i = 0; i < kFields; ++i)
            _mm512_store_si512(tile + (v * kFields + i) * kTileBytes,
                               _mm512_gf2p8affine_epi64_epi8(all, _mm512_set1_epi64(field_bits(Bits, i)), 0));
    }
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

// Sums of M tiles of positions and all channels of a block, of weights of `Bits` bits. A tile is not loaded until stores
// to its bytes are done, so weights are unpacked a step before they are needed.
template <int M, int Bits, typename Tiles>
__attribute__((noinline)) void accumulate(Tiles& tiles, const Rows& rows, const uint8_t* weights, int channel_tiles,
                                          const uint8_t* const* pixels, Sums& sums) {
    constexpr size_t kStep = kTileRows * kTileBytes * Bits / 8;
    static_assert(Bits == 8 || (kAhead - 1) * kStep <= kSlack, "the last steps unpack what is past the weights");
    alignas(64) uint8_t unpacked[Bits < 8 ? kAhead : 1][kTileRows * kTileBytes];
    unsigned turn = 0;
    if constexpr (Bits < 8)
        for (unsigned i = 0; i + 1 < kAhead; ++i) unpack<Bits>(weights + i * kStep, unpacked[i]);
    for (int channels = 0; channels < channel_tiles; ++channels) {
        clear_sums<M>(tiles);
        for (int ky = 0; ky < rows.count; ++ky)
            for (ptrdiff_t at = 0; at < rows.bytes; at += kTileBytes, weights += kStep, ++turn) {
                if constexpr (Bits < 8) {
                    unpack<Bits>(weights + (kAhead - 1) * kStep, unpacked[(turn + kAhead - 1) % kAhead]);
                    tiles.template load<kWeights>(unpacked[turn % kAhead], kTileBytes);
                } else {
                    tiles.template load<kWeights>(weights, kTileBytes);
                }
                step<M>(tiles, pixels, ky * rows.pitch + at, rows.position);
            }
        store_sums<M>(tiles, channels, sums);
    }
}

// Windows of neighboring positions one after another, each of its kernel's rows packed: at most 32 bytes a row.
void gather(const DotLayer& layer, const uint8_t* source, size_t source_row, int count, uint8_t* to) {
    const ConvShape& s = layer.shape;
    const size_t position = static_cast<size_t>(s.stride_w) * s.in_channels, row = static_cast<size_t>(s.kernel_w) * s.in_channels;
    for (int p = 0; p < count; ++p, source += position, to += layer.steps * 4)
        for (int ky = 0; ky < s.kernel_h; ++ky)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + ky * row),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + ky * source_row)));
}

template <typename Tiles>
void conv(const DotJob& job, int block, int first_row, int last_row) {
#define GROUPS(BITS) {accumulate<1, BITS, Tiles>, accumulate<2, BITS, Tiles>, accumulate<3, BITS, Tiles>, accumulate<4, BITS, Tiles>}
    constexpr decltype(&accumulate<1, 8, Tiles>) kAccumulate[3][kGroup] = {GROUPS(2), GROUPS(4), GROUPS(8)};
#undef GROUPS
    const DotLayer& layer = *job.layer;
    const ConvShape& s = layer.shape;
    const Output to = output_of(layer);
    const bool is_gathered = layer.is_gathered;
    const Rows rows = {is_gathered ? 1 : s.kernel_h, layer.steps * 4, static_cast<ptrdiff_t>(job.source_row),
                       is_gathered ? static_cast<size_t>(layer.steps) * 4 : static_cast<size_t>(s.stride_w) * s.in_channels};
    const size_t block_bytes = static_cast<size_t>(rows.count) * layer.steps * 4 * kLanes * layer.weight_bits / 8;
    const uint8_t* const weights = layer.weights.as<uint8_t>() + block * block_bytes;
    const int channels = s.out_channels - block * kLanes, used = channels < kLanes ? channels : kLanes;
    const int channel_tiles = (used + kTileChannels - 1) / kTileChannels;
    const int32_t* const bias = layer.bias.as<int32_t>() + block * kLanes;
    const float* const scale = layer.scale.as<float>() + block * kLanes;
    const size_t row = s.stride_h * job.source_row, position = static_cast<size_t>(s.stride_w) * s.in_channels;
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const auto* const accumulate_group = kAccumulate[layer.weight_bits == 2 ? 0 : layer.weight_bits == 4 ? 1 : 2];
    const Cut parts = best_cut(job, last_row - first_row);
    alignas(64) Sums sums = {};  // of channels past the last tile: zeros
    alignas(64) uint8_t gathered[2][kGroup][kTileRows * kMostGathered];
    Tiles tiles(parts.height);
    const int groups = (parts.tiles() + kGroup - 1) / kGroup;
    const auto first_of = [&](int group) { return static_cast<int>(int64_t{parts.tiles()} * group / groups); };
    const auto window = [&](int tile) { return job.source + (first_row + tile / parts.each) * row + parts.position(tile) * position; };
    const auto gather_group = [&](int group) {
        if (!is_gathered || group == groups) return;
        for (int tile = first_of(group); tile < first_of(group + 1); ++tile)
            gather(layer, window(tile), job.source_row, parts.height, gathered[group % 2][tile - first_of(group)]);
    };
    gather_group(0);
    for (int group = 0; group < groups; ++group) {
        gather_group(group + 1);  // in time: a tile is not loaded until stores to its bytes are done
        const int first = first_of(group), count = first_of(group + 1) - first;
        const uint8_t* pixels[kGroup];
        for (int m = 0; m < count; ++m) pixels[m] = is_gathered ? gathered[group % 2][m] : window(first + m);
        accumulate_group[count - 1](tiles, rows, weights, channel_tiles, pixels, sums);
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
    }
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
    kernels.dot.is_tiled = true;
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
