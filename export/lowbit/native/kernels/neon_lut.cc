// NEON: 32 output channels a unit (two vectors), two input channels a look-up.
//
// TBL looks 16 codes of weights up in a 16-entry table that an activation code chooses: 32 multiply-adds with the ADD that
// adds them up, where int8 without dot products takes SMULL, SMLAL2 and SADALP for 16 and some loads more. A table serves
// both vectors and, at stride 1, three neighboring taps. Of 32 registers: 14 sums, 6 weights, a table, 6 found.
#include "kernels/kernels.h"

#if defined(__aarch64__)

#include "kernels/neon.h"

namespace lowbit {
namespace {

constexpr int kLanes = 32, kVector = 16, kMostPositions = 7, kMostOfFour = 5;  // positions of two vectors, and of four

template <int P> struct Starts {  // of neighboring positions: one counter then walks along all of them
    const uint16_t* at[P];
    INLINE Starts(const uint16_t* index, size_t step) {
        UNROLL for (int p = 0; p < P; ++p) at[p] = index + p * step;
    }
};

template <int P, int V> INLINE void clear(uint8x16_t (&bytes)[P][V]) {
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v) bytes[p][v] = vdupq_n_u8(0);
}

template <int P, int V>
INLINE void look_up(const uint8_t* tables, const uint16_t* index, size_t step, const uint8_t* weights, int length,
                    uint8x16_t (&bytes)[P][V]) {
    clear(bytes);
    const Starts<P> starts(index, step);
    for (int i = 0; i < length; ++i, weights += V * kVector) {
        uint8x16_t w[V];
        UNROLL for (int v = 0; v < V; ++v) w[v] = vld1q_u8(weights + v * kVector);
        UNROLL for (int p = 0; p < P; ++p) {
            const uint8x16_t table = vld1q_u8(tables + starts.at[p][i]);
            UNROLL for (int v = 0; v < V; ++v) bytes[p][v] = vaddq_u8(bytes[p][v], vqtbl1q_u8(table, w[v]));
        }
    }
}

// Three neighboring taps of stride 1: position p of tap t reads table p + t. Adds lag one table behind, which is what a
// core that executes in order wants.
template <int P>
INLINE void look_up_taps(const uint8_t* tables, const uint16_t* index, size_t step, const uint8_t* weights, int length,
                         uint8x16_t (&bytes)[P][2]) {
    clear(bytes);
    const Starts<P + 2> starts(index, step);
    for (int i = 0; i < length; ++i, weights += 3 * kLanes) {
        uint8x16_t w[3][2], found[3][2];
        UNROLL for (int t = 0; t < 3; ++t) UNROLL for (int v = 0; v < 2; ++v) w[t][v] = vld1q_u8(weights + t * kLanes + v * kVector);
        UNROLL for (int x = 0; x < P + 3; ++x) {
            const uint8x16_t table = x < P + 2 ? vld1q_u8(tables + starts.at[x < P + 2 ? x : 0][i]) : vdupq_n_u8(0);
            UNROLL for (int t = 0; t < 3; ++t) UNROLL for (int v = 0; v < 2; ++v) {
                if (x - 1 - t >= 0 && x - 1 - t < P) bytes[x - 1 - t][v] = vaddq_u8(bytes[x - 1 - t][v], found[t][v]);
                if (x - t >= 0 && x - t < P) found[t][v] = vqtbl1q_u8(table, w[t][v]);
            }
        }
    }
}

template <int P, int V>
INLINE void look_up_chunk(const LutLayer& layer, const uint16_t* index, size_t step, const uint8_t* weights, int length,
                          uint8x16_t (&bytes)[P][V]) {
    if constexpr (V == 2) {
        if (layer.shares_taps) return look_up_taps<P>(layer.tables, index, step, weights, length, bytes);
    }
    look_up<P, V>(layer.tables, index, step, weights, length, bytes);
}

template <int P, int V> struct Totals {
    uint16x8_t even[P][V], odd[P][V];  // of even and odd channels
};

// 16-bit totals from bytes: even + 256 odd, and odd; at the end even -= odd << 8, modulo 2^16.
template <int P, int V>
INLINE void accumulate(const LutJob& job, const Block& block, const uint16_t* index, Totals<P, V>* totals) {
    const LutLayer& layer = *job.layer;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.groups;
    const size_t unit = (layer.shares_taps ? 3 : 1) * static_cast<size_t>(V) * kVector;
    const size_t steps = layer.shares_taps ? layer.groups : static_cast<size_t>(layer.groups) * layer.shape.kernel_w;
    const uint8_t* const weights = layer.weights.as<uint8_t>() + block.weights;
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v) totals->even[p][v] = totals->odd[p][v] = vdupq_n_u16(0);
    for (const Chunk* chunk = block.first(); chunk != block.last(); ++chunk) {
        uint8x16_t bytes[P][V];
        look_up_chunk<P, V>(layer, index + chunk->row * job.index_row + chunk->start, step,
                            weights + (chunk->row * steps + chunk->start) * unit, chunk->length, bytes);
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v) {
            const uint16x8_t both = vreinterpretq_u16_u8(bytes[p][v]);
            totals->even[p][v] = vaddq_u16(totals->even[p][v], both);
            totals->odd[p][v] = vsraq_n_u16(totals->odd[p][v], both, 8);
        }
    }
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v)
        totals->even[p][v] = vsubq_u16(totals->even[p][v], vshlq_n_u16(totals->odd[p][v], 8));
}

INLINE uint16x8_t count_reached(uint16x8_t total, const uint16_t* thresholds, uint16x8_t lowest) {
    UNROLL for (int k = 0; k < 3; ++k) lowest = vsubq_u16(lowest, vcgeq_u16(total, vld1q_u16(thresholds + k * kLanes)));
    return lowest;
}

// 16 codes of at most four values; `thresholds` are those of this half of the 32 channels.
INLINE uint8x16_t narrow_codes(const LutLayer& layer, const uint16_t* thresholds, uint16x8_t even, uint16x8_t odd) {
    const uint16x8_t lowest = vdupq_n_u16(static_cast<uint16_t>(layer.lowest_code));
    const uint16x8_t low = count_reached(even, thresholds, lowest), high = count_reached(odd, thresholds + kVector, lowest);
    return vreinterpretq_u8_u16(vsliq_n_u16(low, high, 8));
}

// 16 codes by the formula; bytes of quarters back to channels at the end.
INLINE uint8x16_t wide_codes(const int32_t* bias, const float* scale, uint16x8_t even, uint16x8_t odd, const Output& to) {
    static constexpr uint8_t kOrder[16] = {0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15};
    const uint8x16_t quarters = to_bytes(rounded(lower(even), bias, scale), rounded(upper(even), bias + 8, scale + 8),
                                         rounded(lower(odd), bias + 16, scale + 16), rounded(upper(odd), bias + 24, scale + 24), to);
    return vqtbl1q_u8(quarters, vld1q_u8(kOrder));
}

template <int P, int V>
__attribute__((noinline)) void lut_tile(const LutJob& job, const Block& block, const uint16_t* index, uint8_t* out) {
    Totals<P, V> totals;
    accumulate<P, V>(job, block, index, &totals);
    const LutLayer& layer = *job.layer;
    const Output to = output_of(layer);
    for (int v = 0; v < V; ++v) {
        const int channel = block.first_channel + v / 2 * kLanes, half = v % 2;
        const uint16_t* const thresholds = layer.thresholds.as<uint16_t>() + (layer.is_narrow ? channel * 3 + half * 8 : 0);
        const int32_t* const bias = layer.bias.as<int32_t>() + channel + half * 4;
        const float* const scale = layer.scale.as<float>() + channel + half * 4;
        for (int p = 0; p < P; ++p) {
            const uint16x8_t even = totals.even[p][v], odd = totals.odd[p][v];
            vst1q_u8(out + p * job.out_stride + v * kVector,
                     layer.is_narrow ? narrow_codes(layer, thresholds, even, odd) : wide_codes(bias, scale, even, odd, to));
        }
    }
}

using LutTile = void (*)(const LutJob&, const Block&, const uint16_t*, uint8_t*);
constexpr LutTile kTwo[kMostPositions] = {lut_tile<1, 2>, lut_tile<2, 2>, lut_tile<3, 2>, lut_tile<4, 2>,
                                          lut_tile<5, 2>, lut_tile<6, 2>, lut_tile<7, 2>};
constexpr LutTile kFour[kMostOfFour] = {lut_tile<1, 4>, lut_tile<2, 4>, lut_tile<3, 4>, lut_tile<4, 4>, lut_tile<5, 4>};

}  // namespace

void neon_lut_conv(const LutJob& job, const Block& block, int first_row, int last_row) {
    const LutLayer& layer = *job.layer;
    const size_t row = layer.shape.stride_h * job.index_row;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.groups;
    const int most = block.vectors == 2 ? kMostOfFour : kMostPositions;
    const LutTile* const tile_of = block.vectors == 2 ? kFour : kTwo;
    for (int y = first_row; y < last_row; ++y)
        for_tiles(job.out_width, most, [&](int x, int width) {
            tile_of[width - 1](job, block, job.index + y * row + x * step,
                               job.out + (static_cast<size_t>(y) * job.out_width + x) * job.out_stride + block.first_channel);
        });
}

}  // namespace lowbit

#endif
