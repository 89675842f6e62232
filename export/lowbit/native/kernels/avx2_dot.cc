// AVX2: convolutions on VPMADDUBSW with sums of 16 bits, 16 output channels at once.
//
// VPMADDUBSW adds two products in 16 signed bits, exact while 2 span |w| <= 32,767 (255 and 64, or 15 and anything).
// Such sums of two are added in 16 bits for as long as no activations could overflow one (`short_chunks`: with four
// bits, hundreds of products), so that a product costs half of an instruction less than int8's with its VPMADDWD and
// VPADDD. Then VPMADDWD adds a channel's two sums up in 32 bits.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx2.h"

namespace lowbit {
namespace {

constexpr int kMostPositions = 6;  // 12 sums, two weights, a broadcast, a product

INLINE __m256i four_bytes(const uint8_t* from) {
    int32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return _mm256_set1_epi32(bytes);
}

// Steps of one kernel row: four bytes of a row of pixels, broadcast, by four weights of each channel.
template <int P> INLINE void add_products(const uint8_t* const (&at)[P], size_t place, const int8_t* weights, int length,
                                          __m256i (&sums)[P][2]) {
    for (int s = 0; s < length; ++s, place += 4, weights += 4 * kShortLanes) {
        const __m256i w[2] = {load(weights), load(weights + 32)};
        UNROLL for (int p = 0; p < P; ++p) {
            const __m256i x = four_bytes(at[p] + place);
            UNROLL for (int v = 0; v < 2; ++v) sums[p][v] = _mm256_add_epi16(sums[p][v], _mm256_maddubs_epi16(x, w[v]));
        }
    }
}

// Two vectors of 8 numbers to 16 bytes.
INLINE __m128i to_bytes(__m256i a, __m256i b, const Output& to) {
    const __m256i ab = _mm256_adds_epi16(_mm256_packs_epi32(a, b), to.zero);
    const __m256i bytes = _mm256_min_epu8(_mm256_max_epu8(_mm256_packus_epi16(ab, ab), to.low), to.high);
    return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

// `first` counts positions along the rows of the output, so that maps of a few columns fill their tiles, too.
template <int P> __attribute__((noinline)) void dot_tile(const DotJob& job, int channel, int first) {
    const DotLayer& layer = *job.layer;
    const uint8_t* at[P];
    UNROLL for (int p = 0; p < P; ++p) {
        const size_t y = (first + p) / job.out_width, x = (first + p) % job.out_width;
        at[p] = job.source + y * layer.shape.stride_h * job.source_row + x * layer.shape.stride_w * layer.shape.in_channels;
    }
    uint8_t* const out = job.out + first * job.out_stride + channel;
    const int8_t* weights = layer.weights.as<int8_t>() + static_cast<size_t>(channel) * layer.shape.kernel_h * layer.steps * 4;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i totals[P][2];
    UNROLL for (int p = 0; p < P; ++p) totals[p][0] = totals[p][1] = _mm256_setzero_si256();
    for (const Chunk& chunk : layer.chunks[channel / kShortLanes]) {
        __m256i sums[P][2];
        UNROLL for (int p = 0; p < P; ++p) sums[p][0] = sums[p][1] = _mm256_setzero_si256();
        for (int row = chunk.row, start = chunk.start, left = chunk.length; left > 0; ++row, start = 0) {
            const int length = left < layer.steps - start ? left : layer.steps - start;
            add_products<P>(at, row * job.source_row + start * 4, weights, length, sums);
            weights += static_cast<size_t>(length) * 4 * kShortLanes;
            left -= length;
        }
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < 2; ++v)
            totals[p][v] = _mm256_add_epi32(totals[p][v], _mm256_madd_epi16(sums[p][v], ones));
    }
    const Output to = output_of(layer);
    const int32_t* const bias = layer.bias.as<int32_t>() + channel;
    const float* const scale = layer.scale.as<float>() + channel;
    UNROLL for (int p = 0; p < P; ++p)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + p * job.out_stride),
                         to_bytes(rounded(totals[p][0], bias, scale), rounded(totals[p][1], bias + 8, scale + 8), to));
}

using DotTile = void (*)(const DotJob&, int, int);
constexpr DotTile kDotTiles[kMostPositions] = {dot_tile<1>, dot_tile<2>, dot_tile<3>, dot_tile<4>, dot_tile<5>, dot_tile<6>};

}  // namespace

void avx2_dot_conv(const DotJob& job, int block, int first_row, int last_row) {
    const DotLayer& layer = *job.layer;
    const int first = first_row * job.out_width, count = last_row * job.out_width - first;
    const int end = layer.shape.out_channels < (block + 1) * 64 ? layer.shape.out_channels : (block + 1) * 64;
    for (int channel = block * 64; channel < end; channel += kShortLanes)
        for_tiles(count, kMostPositions, [&](int at, int width) { kDotTiles[width - 1](job, channel, first + at); });
}

}  // namespace lowbit

#endif
