// AVX-512 with VNNI: 8-bit convolutions (a student's first layer) on VPDPBUSD, 64 output channels at once.
//
// A step multiplies four neighboring bytes of a row of pixels, broadcast, with four weights of each of 64 channels.
// Sums are exact: `build_dot` refuses layers where 255 sum |w| + |bias| could pass 31 bits.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx512.h"

namespace lowbit {
namespace {

constexpr int kLanes = 64, kMostPositions = 6;  // 24 accumulators, 4 weights, 1 broadcast

INLINE __m512i four_bytes(const uint8_t* from) {
    int32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

// V vectors of 16 channels: fewer than four where the layer ends.
template <int P, int V> __attribute__((noinline)) void dot_tile(const DotJob& job, const int8_t* weights, int channel,
                                                         const uint8_t* source, uint8_t* out) {
    const DotLayer& layer = *job.layer;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.shape.in_channels;
    __m512i sums[P][4];
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < 4; ++v) sums[p][v] = _mm512_setzero_si512();
    for (int ky = 0; ky < layer.shape.kernel_h; ++ky) {
        const uint8_t* from = source + ky * job.source_row;
        for (int s = 0; s < layer.steps; ++s, from += 4, weights += 4 * kLanes) {
            __m512i w[V];
            UNROLL for (int v = 0; v < V; ++v) w[v] = _mm512_load_si512(weights + v * 64);
            UNROLL for (int p = 0; p < P; ++p) {
                const __m512i x = four_bytes(from + p * step);
                UNROLL for (int v = 0; v < V; ++v) sums[p][v] = _mm512_dpbusd_epi32(sums[p][v], x, w[v]);
            }
        }
    }
    const Output to = output_of(layer);
    const int32_t* const bias = layer.bias.as<int32_t>() + channel;
    const float* const scale = layer.scale.as<float>() + channel;
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    UNROLL for (int p = 0; p < P; ++p) {
        const __m512i codes = to_bytes(rounded(sums[p][0], bias, scale), rounded(sums[p][1], bias + 16, scale + 16),
                                       rounded(sums[p][2], bias + 32, scale + 32), rounded(sums[p][3], bias + 48, scale + 48), to);
        const __m512i ordered = _mm512_permutexvar_epi32(order, codes);
        if constexpr (V == 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + p * job.out_stride), _mm512_castsi512_si128(ordered));
        else _mm512_storeu_si512(out + p * job.out_stride, ordered);
    }
}

using DotTile = void (*)(const DotJob&, const int8_t*, int, const uint8_t*, uint8_t*);
#define TILES(V) {dot_tile<1, V>, dot_tile<2, V>, dot_tile<3, V>, dot_tile<4, V>, dot_tile<5, V>, dot_tile<6, V>}
constexpr DotTile kDotTiles[3][kMostPositions] = {TILES(1), TILES(2), TILES(4)};
#undef TILES

}  // namespace

void avx512_dot_conv(const DotJob& job, int block, int first_row, int last_row) {
    const DotLayer& layer = *job.layer;
    const size_t size = static_cast<size_t>(layer.shape.kernel_h) * layer.steps * 4 * kLanes;
    const int8_t* const weights = layer.weights.as<int8_t>() + block * size;
    const size_t row = layer.shape.stride_h * job.source_row;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.shape.in_channels;
    const int channels = layer.shape.out_channels - block * kLanes;
    const DotTile* const kernels = kDotTiles[channels <= 16 ? 0 : channels <= 32 ? 1 : 2];
    for (int y = first_row; y < last_row; ++y)
        for_tiles(job.out_width, kMostPositions, [&](int x, int width) {
            kernels[width - 1](job, weights, block * kLanes, job.source + y * row + x * step,
                               job.out + (static_cast<size_t>(y) * job.out_width + x) * job.out_stride + block * kLanes);
        });
}

}  // namespace lowbit

#endif
