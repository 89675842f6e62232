// AVX-512 with VBMI and VNNI: 64 output channels a vector, three input channels a look-up (two where codes are wider).
//
// One VPERMB looks 64 codes of weights up in the 64-entry table that an activation code chooses: 192 multiply-adds with
// its VPADDB (128 where two channels make a look-up). Accumulators, permuted bytes, weights and table fill the 32 registers,
// so loops over them must be unrolled wholly; the empty assembly statements keep "all permutes, then all adds" (1.1 cycles a look-up; interleaved 1.3).
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx512.h"

namespace lowbit {
namespace {

constexpr int kLanes = 64, kMostPositions = 7;

// The table of a position; of a pair, the second position's as well, which VPERMI2B takes where bit 6 of a code is set.
template <bool Paired> struct Table {
    __m512i first, second;

    INLINE Table(const uint8_t* tables, const uint16_t* index, size_t apart) : first(_mm512_load_si512(tables + *index)), second(first) {
        if constexpr (Paired) second = _mm512_load_si512(tables + index[apart]);
    }

    INLINE __m512i find(__m512i codes) const {
        if constexpr (Paired) return _mm512_permutex2var_epi8(first, codes, second);
        else return _mm512_permutexvar_epi8(codes, first);
    }
};

template <int P, int V> struct Sums {  // 16-bit totals of even and odd channels
    __m512i even[P][V], odd[P][V];
};

// Bytes of a chunk into 16 bits: `even` gets whole words, `odd` their high bytes, and later even -= odd << 8, modulo 2^16.
template <int P, int V> INLINE void widen(const __m512i (&bytes)[P][V], Sums<P, V>& sums) {
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v) {
        sums.even[p][v] = _mm512_add_epi16(sums.even[p][v], bytes[p][v]);
        sums.odd[p][v] = _mm512_add_epi16(sums.odd[p][v], _mm512_srli_epi16(bytes[p][v], 8));
    }
}

template <int P, int V, bool Paired> INLINE void look_up(const uint8_t* tables, const uint16_t* index, size_t step, size_t apart, const uint8_t* weights, int length,
                                            __m512i (&bytes)[P][V]) {
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v) bytes[p][v] = _mm512_setzero_si512();
    const uint16_t* const end = index + length;
    do {
        __m512i found[P][V], w[V];
        UNROLL for (int v = 0; v < V; ++v) w[v] = _mm512_load_si512(weights + v * kLanes);
        UNROLL for (int p = 0; p < P; ++p) {
            const Table<Paired> table(tables, index + p * step, apart);
            UNROLL for (int v = 0; v < V; ++v) {
                found[p][v] = table.find(w[v]);
                __asm__ volatile("" : "+v"(found[p][v]));
            }
        }
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v) {
            bytes[p][v] = _mm512_add_epi8(bytes[p][v], found[p][v]);
            __asm__ volatile("" : "+v"(bytes[p][v]));
        }
        weights += V * kLanes;
    } while (++index != end);
}

// Three neighboring taps of stride 1: position p of tap t reads table p + t, so P + 2 tables serve 3 P look-ups.
template <int P, bool Paired> INLINE void look_up_taps(const uint8_t* tables, const uint16_t* index, size_t step, size_t apart, const uint8_t* weights, int length,
                                          __m512i (&bytes)[P][1]) {
    UNROLL for (int p = 0; p < P; ++p) bytes[p][0] = _mm512_setzero_si512();
    const uint16_t* const end = index + length;
    do {
        __m512i found[P + 2][3], w[3];
        UNROLL for (int t = 0; t < 3; ++t) w[t] = _mm512_load_si512(weights + t * kLanes);
        UNROLL for (int x = 0; x < P + 2; ++x) {
            const Table<Paired> table(tables, index + x * step, apart);
            UNROLL for (int t = 0; t < 3; ++t)
                if (x - t >= 0 && x - t < P) {
                    found[x][t] = table.find(w[t]);
                    __asm__ volatile("" : "+v"(found[x][t]));
                }
            if (x >= 2) UNROLL for (int t = 0; t < 3; ++t)  // the adds lag two tables behind
                if (x - 2 - t >= 0 && x - 2 - t < P) {
                    bytes[x - 2 - t][0] = _mm512_add_epi8(bytes[x - 2 - t][0], found[x - 2][t]);
                    __asm__ volatile("" : "+v"(bytes[x - 2 - t][0]));
                }
        }
        UNROLL for (int x = P; x < P + 2; ++x) UNROLL for (int t = 0; t < 3; ++t)
            if (x - t >= 0 && x - t < P) bytes[x - t][0] = _mm512_add_epi8(bytes[x - t][0], found[x][t]);
        weights += 3 * kLanes;
    } while (++index != end);
}

template <int P, int V, bool Paired> INLINE void accumulate(const LutJob& job, const Block& block, const uint16_t* index, int width,
                                               Sums<P, V>& sums) {
    const LutLayer& layer = *job.layer;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.groups;
    const size_t apart = static_cast<size_t>(width - P) * step;
    const size_t unit = static_cast<size_t>(layer.shares_taps ? 3 : 1) * V * kLanes;
    const size_t steps = layer.shares_taps ? layer.groups : static_cast<size_t>(layer.groups) * layer.shape.kernel_w;
    const uint8_t* const weights = layer.weights.as<uint8_t>() + block.weights;
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v)
        sums.even[p][v] = sums.odd[p][v] = _mm512_setzero_si512();
    for (const Chunk* chunk = block.first(); chunk != block.last(); ++chunk) {
        __m512i bytes[P][V];
        const uint16_t* const from = index + chunk->row * job.index_row + chunk->start;
        const uint8_t* const w = weights + (chunk->row * steps + chunk->start) * unit;
        if constexpr (V == 1) {
            if (layer.shares_taps) look_up_taps<P, Paired>(layer.tables, from, step, apart, w, chunk->length, bytes);
            else look_up<P, V, Paired>(layer.tables, from, step, apart, w, chunk->length, bytes);
        } else {
            look_up<P, V, Paired>(layer.tables, from, step, apart, w, chunk->length, bytes);
        }
        widen(bytes, sums);
    }
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v)
        sums.even[p][v] = _mm512_sub_epi16(sums.even[p][v], _mm512_slli_epi16(sums.odd[p][v], 8));
}

INLINE __m512i count_reached(__m512i total, const uint16_t* thresholds, __m512i lowest) {
    const __m512i one = _mm512_set1_epi16(1);
    UNROLL for (int k = 0; k < 3; ++k)
        lowest = _mm512_mask_add_epi16(lowest, _mm512_cmpge_epu16_mask(total, _mm512_load_si512(thresholds + k * 64)),
                                       lowest, one);
    return lowest;
}

INLINE __m512i narrow_codes(const LutLayer& layer, int channel, __m512i even, __m512i odd) {
    const uint16_t* const thresholds = layer.thresholds.as<uint16_t>() + channel * 3;
    const __m512i lowest = _mm512_set1_epi16(static_cast<short>(layer.lowest_code));
    even = count_reached(even, thresholds, lowest);
    odd = count_reached(odd, thresholds + 32, lowest);
    return _mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
}

INLINE __m512i wide_codes(const LutLayer& layer, int channel, __m512i even, __m512i odd, const Output& to) {
    const int32_t* const bias = layer.bias.as<int32_t>() + channel;
    const float* const scale = layer.scale.as<float>() + channel;
    const __m512i word = _mm512_set1_epi32(0xFFFF);
    const __m512i quarters = to_bytes(rounded(_mm512_and_si512(even, word), bias, scale),
                                      rounded(_mm512_srli_epi32(even, 16), bias + 16, scale + 16),
                                      rounded(_mm512_and_si512(odd, word), bias + 32, scale + 32),
                                      rounded(_mm512_srli_epi32(odd, 16), bias + 48, scale + 48), to);
    return weave(quarters);
}

// Codes of `width` positions: P, or in pairs one of the lower half and one of the upper half of each vector. Upper halves
// are the last P positions: where the width is odd the middle one is computed twice, and nothing past the row is read.
template <int P, int V, bool Paired> __attribute__((noinline)) void lut_tile(const LutJob& job, const Block& block,
                                                                             const uint16_t* index, int width, uint8_t* out) {
    Sums<P, V> sums;
    accumulate<P, V, Paired>(job, block, index, width, sums);
    const LutLayer& layer = *job.layer;
    const Output to = output_of(layer);
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < V; ++v) {
        const int channel = block.first_channel + v * kLanes;
        const __m512i codes = layer.is_narrow ? narrow_codes(layer, channel, sums.even[p][v], sums.odd[p][v])
                                              : wide_codes(layer, channel, sums.even[p][v], sums.odd[p][v], to);
        uint8_t* const at = out + p * job.out_stride + v * kLanes;
        if constexpr (Paired) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(codes));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + (width - P) * job.out_stride), _mm512_extracti64x4_epi64(codes, 1));
        } else {
            _mm512_storeu_si512(at, codes);
        }
    }
}

using LutTile = void (*)(const LutJob&, const Block&, const uint16_t*, int, uint8_t*);
#define TILES(V, PAIRED)                                                                                                       \
    {lut_tile<1, V, PAIRED>, lut_tile<2, V, PAIRED>, lut_tile<3, V, PAIRED>, lut_tile<4, V, PAIRED>, lut_tile<5, V, PAIRED>, \
     lut_tile<6, V, PAIRED>, lut_tile<7, V, PAIRED>}
constexpr LutTile kLutTiles[3][kMostPositions] = {TILES(1, false), TILES(2, false), TILES(1, true)};
#undef TILES

}  // namespace

void avx512_lut_conv(const LutJob& job, const Block& block, int first_row, int last_row) {
    const LutLayer& layer = *job.layer;
    const size_t row = layer.shape.stride_h * job.index_row;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.groups;
    const int each = block.is_paired ? 2 : 1, most = each * kMostPositions;
    const LutTile* const kernels = kLutTiles[block.is_paired ? 2 : block.vectors - 1];
    for (int y = first_row; y < last_row; ++y)
        for_tiles(job.out_width, most, [&](int x, int width) {
            kernels[(width + each - 1) / each - 1](job, block, job.index + y * row + x * step, width,
                                                   job.out + (static_cast<size_t>(y) * job.out_width + x) * job.out_stride + block.first_channel);
        });
}

}  // namespace lowbit

#endif
