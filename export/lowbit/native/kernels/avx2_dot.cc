// AVX2: 8-bit convolutions (a student's first layer) on VPMADDUBSW and VPMADDWD, 32 output channels at once.
//
// VPMADDUBSW adds two products in 16 signed bits: exact while |w| <= 64, for 2 * 255 * 64 < 32,768. Layers with larger
// weights are not claimed.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx2.h"

namespace lowbit {
namespace {

constexpr int kLanes = 64, kHalf = 32, kMostPositions = 2;  // 8 sums, 4 weights, a broadcast, a product, ones

INLINE __m256i four_bytes(const uint8_t* from) {
    int32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return _mm256_set1_epi32(bytes);
}

template <int P> __attribute__((noinline)) void dot_tile(const DotJob& job, const int8_t* weights, int channel,
                                                         const uint8_t* source, uint8_t* out) {
    const DotLayer& layer = *job.layer;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.shape.in_channels;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[P][4];
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int v = 0; v < 4; ++v) sums[p][v] = _mm256_setzero_si256();
    for (int ky = 0; ky < layer.shape.kernel_h; ++ky) {
        const uint8_t* from = source + ky * job.source_row;
        for (int s = 0; s < layer.steps; ++s, from += 4, weights += 4 * kLanes) {
            __m256i w[4];
            UNROLL for (int v = 0; v < 4; ++v) w[v] = load(weights + v * 32);
            UNROLL for (int p = 0; p < P; ++p) {
                const __m256i x = four_bytes(from + p * step);
                UNROLL for (int v = 0; v < 4; ++v)
                    sums[p][v] = _mm256_add_epi32(sums[p][v], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w[v]), ones));
            }
        }
    }
    const Output to = output_of(layer);
    const int32_t* const bias = layer.bias.as<int32_t>() + channel;
    const float* const scale = layer.scale.as<float>() + channel;
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    UNROLL for (int p = 0; p < P; ++p) {
        const __m256i codes = to_bytes(rounded(sums[p][0], bias, scale), rounded(sums[p][1], bias + 8, scale + 8),
                                       rounded(sums[p][2], bias + 16, scale + 16), rounded(sums[p][3], bias + 24, scale + 24), to);
        store(out + p * job.out_stride, _mm256_permutevar8x32_epi32(codes, order));
    }
}

}  // namespace

void avx2_dot_conv(const DotJob& job, int block, int first_row, int last_row) {
    const DotLayer& layer = *job.layer;
    const size_t size = static_cast<size_t>(layer.shape.kernel_h) * layer.steps * 4 * kLanes;
    const size_t row = layer.shape.stride_h * job.source_row;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.shape.in_channels;
    for (int y = first_row; y < last_row; ++y)
        for (int half = 0; half < 2; ++half) {
            const int channel = block * kLanes + half * kHalf;
            const int8_t* const weights = layer.weights.as<int8_t>() + block * size + half * kHalf * 4;
            for (int x = 0; x < job.out_width; x += kMostPositions) {
                const uint8_t* const source = job.source + y * row + x * step;
                uint8_t* const out = job.out + (static_cast<size_t>(y) * job.out_width + x) * job.out_stride + channel;
                if (x + 1 < job.out_width) dot_tile<2>(job, weights, channel, source, out);
                else dot_tile<1>(job, weights, channel, source, out);
            }
        }
}

}  // namespace lowbit

#endif
