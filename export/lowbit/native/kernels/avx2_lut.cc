// AVX2: 32 output channels a vector, two input channels a look-up.
//
// VPSHUFB looks 32 codes of weights up in a 16-entry table, kept twice, that an activation code chooses: 64
// multiply-adds with its VPADDB, where int8 without VNNI takes three instructions for 32. Sixteen registers: seven
// sums, three weights (or one), a table, three found.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx2.h"

namespace lowbit {
namespace {

constexpr int kLanes = 32, kMostPositions = 7;

INLINE __m256i table_of(const uint8_t* tables, uint16_t offset) { return load(tables + offset); }

template <int P> INLINE void look_up(const uint8_t* tables, const uint16_t* index, size_t step, const uint8_t* weights, int length, __m256i (&bytes)[P]) {
    UNROLL for (int p = 0; p < P; ++p) bytes[p] = _mm256_setzero_si256();
    const uint16_t* const end = index + length;
    do {
        const __m256i w = load(weights);
        UNROLL for (int p = 0; p < P; ++p) bytes[p] = _mm256_add_epi8(bytes[p], _mm256_shuffle_epi8(table_of(tables, index[p * step]), w));
        weights += kLanes;
    } while (++index != end);
}

// Three neighboring taps of stride 1: position p of tap t reads table p + t. Adds lag one table behind.
template <int P> INLINE void look_up_taps(const uint8_t* tables, const uint16_t* index, size_t step, const uint8_t* weights, int length, __m256i (&bytes)[P]) {
    UNROLL for (int p = 0; p < P; ++p) bytes[p] = _mm256_setzero_si256();
    const uint16_t* const end = index + length;
    do {
        __m256i w[3], found[3];
        UNROLL for (int t = 0; t < 3; ++t) w[t] = load(weights + t * kLanes);
        UNROLL for (int x = 0; x < P + 3; ++x) {
            const __m256i table = x < P + 2 ? table_of(tables, index[x * step]) : _mm256_setzero_si256();
            UNROLL for (int t = 0; t < 3; ++t) {
                if (x - 1 - t >= 0 && x - 1 - t < P) {
                    bytes[x - 1 - t] = _mm256_add_epi8(bytes[x - 1 - t], found[t]);
                    __asm__ volatile("" : "+x"(bytes[x - 1 - t]));
                }
                if (x - t >= 0 && x - t < P) {
                    found[t] = _mm256_shuffle_epi8(table, w[t]);
                    __asm__ volatile("" : "+x"(found[t]));
                }
            }
        }
        weights += 3 * kLanes;
    } while (++index != end);
}

// 16-bit totals from bytes: even + 256 odd, and odd; at the end even -= odd << 8, modulo 2^16.
template <int P> INLINE void accumulate(const LutJob& job, const Block& block, const uint16_t* index, __m256i (&even)[P],
                                        __m256i (&odd)[P]) {
    const LutLayer& layer = *job.layer;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.groups;
    const size_t unit = static_cast<size_t>(layer.shares_taps ? 3 : 1) * kLanes;
    const size_t steps = layer.shares_taps ? layer.groups : static_cast<size_t>(layer.groups) * layer.shape.kernel_w;
    const uint8_t* const weights = layer.weights.as<uint8_t>() + block.weights;
    UNROLL for (int p = 0; p < P; ++p) even[p] = odd[p] = _mm256_setzero_si256();
    for (const Chunk* chunk = block.first(); chunk != block.last(); ++chunk) {
        __m256i bytes[P];
        const uint16_t* const from = index + chunk->row * job.index_row + chunk->start;
        const uint8_t* const w = weights + (chunk->row * steps + chunk->start) * unit;
        if (layer.shares_taps) look_up_taps<P>(layer.tables, from, step, w, chunk->length, bytes);
        else look_up<P>(layer.tables, from, step, w, chunk->length, bytes);
        UNROLL for (int p = 0; p < P; ++p) {
            even[p] = _mm256_add_epi16(even[p], bytes[p]);
            odd[p] = _mm256_add_epi16(odd[p], _mm256_srli_epi16(bytes[p], 8));
        }
    }
    UNROLL for (int p = 0; p < P; ++p) even[p] = _mm256_sub_epi16(even[p], _mm256_slli_epi16(odd[p], 8));
}

INLINE __m256i count_reached(__m256i total, const uint16_t* thresholds, __m256i lowest) {
    UNROLL for (int k = 0; k < 3; ++k) {  // a >= b where max(a, b) == a
        const __m256i reached = _mm256_cmpeq_epi16(_mm256_max_epu16(total, load(thresholds + k * 32)), total);
        lowest = _mm256_sub_epi16(lowest, reached);
    }
    return lowest;
}

template <int P> __attribute__((noinline)) void lut_tile(const LutJob& job, const Block& block, const uint16_t* index, uint8_t* out) {
    __m256i even[P], odd[P];
    accumulate<P>(job, block, index, even, odd);
    const LutLayer& layer = *job.layer;
    if (layer.is_narrow) {
        const uint16_t* const thresholds = layer.thresholds.as<uint16_t>() + block.first_channel * 3;
        const __m256i lowest = _mm256_set1_epi16(static_cast<short>(layer.lowest_code));
        for (int p = 0; p < P; ++p) {
            const __m256i low = count_reached(even[p], thresholds, lowest), high = count_reached(odd[p], thresholds + 16, lowest);
            store(out + p * job.out_stride, _mm256_or_si256(low, _mm256_slli_epi16(high, 8)));
        }
        return;
    }
    const Output to = output_of(layer);
    const int32_t* const bias = layer.bias.as<int32_t>() + block.first_channel;
    const float* const scale = layer.scale.as<float>() + block.first_channel;
    const __m256i word = _mm256_set1_epi32(0xFFFF);
    for (int p = 0; p < P; ++p) {
        const __m256i quarters = to_bytes(rounded(_mm256_and_si256(even[p], word), bias, scale),
                                          rounded(_mm256_srli_epi32(even[p], 16), bias + 8, scale + 8),
                                          rounded(_mm256_and_si256(odd[p], word), bias + 16, scale + 16),
                                          rounded(_mm256_srli_epi32(odd[p], 16), bias + 24, scale + 24), to);
        store(out + p * job.out_stride, weave(quarters));
    }
}

using LutTile = void (*)(const LutJob&, const Block&, const uint16_t*, uint8_t*);
constexpr LutTile kLutTiles[kMostPositions] = {lut_tile<1>, lut_tile<2>, lut_tile<3>, lut_tile<4>, lut_tile<5>, lut_tile<6>, lut_tile<7>};

}  // namespace

void avx2_lut_conv(const LutJob& job, const Block& block, int first_row, int last_row) {
    const LutLayer& layer = *job.layer;
    const size_t row = layer.shape.stride_h * job.index_row;
    const size_t step = static_cast<size_t>(layer.shape.stride_w) * layer.groups;
    for (int y = first_row; y < last_row; ++y)
        for_tiles(job.out_width, kMostPositions, [&](int x, int width) {
            kLutTiles[width - 1](job, block, job.index + y * row + x * step,
                                 job.out + (static_cast<size_t>(y) * job.out_width + x) * job.out_stride + block.first_channel);
        });
}

}  // namespace lowbit

#endif
