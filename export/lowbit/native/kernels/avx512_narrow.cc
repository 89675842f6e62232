// AVX-512 with VBMI: layers of few output channels, 64 positions a vector, three input channels a look-up.
//
// Here weights are the same for all lanes: they choose the 64-entry table, and VPERMB looks 64 codes of activations up in
// it. Taps are unaligned loads of the same planes; what is computed across the end of a row is not stored.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx512.h"
#include "kernels/planes.h"

namespace lowbit {
namespace {

constexpr int kMostChannels = 16;
constexpr int kWide = 2;  // vectors together, each table serving both: 16 sums, 8 tables in turn

struct Tables {
    alignas(64) uint8_t entry[64][64];  // [three weights][three activations]
    constexpr Tables() : entry() {
        for (int w = 0; w < 64; ++w)
            for (int a = 0; a < 64; ++a) {
                int sum = 0;
                for (int i = 0; i < 3; ++i) {
                    const int weight = (w >> 2 * i & 3) + kLowestWeight, activation = a >> 2 * i & 3;
                    sum += weight * activation + (weight < 0 ? -kHighestActivation * weight : 0);
                }
                entry[w][a] = static_cast<uint8_t>(sum);
            }
    }
};
constexpr Tables kTables;

template <int P> INLINE void accumulate(const NarrowJob& job, const uint16_t* weights, const uint8_t* from,
                                        __m512i (&even)[P][kNarrowChannels], __m512i (&odd)[P][kNarrowChannels]) {
    const NarrowLayer& layer = *job.layer;
    UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < kNarrowChannels; ++o) even[p][o] = odd[p][o] = _mm512_setzero_si512();
    const int* chunk = layer.chunks.data();
    const int* const end = chunk + layer.chunks.size();
    int column = 0, line = 0;
    const uint8_t* group = from;
    for (; chunk != end; ++chunk) {
        __m512i bytes[P][kNarrowChannels];
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < kNarrowChannels; ++o) bytes[p][o] = _mm512_setzero_si512();
        for (int left = *chunk; left > 0; --left, weights += kNarrowChannels) {
            const uint8_t* const at = group + line * job.row + column;
            if (++column == layer.shape.kernel_w) {
                column = 0;
                if (++line == layer.shape.kernel_h) line = 0, group += job.plane;
            }
            __m512i codes[P];
            UNROLL for (int p = 0; p < P; ++p) codes[p] = _mm512_loadu_si512(at + 64 * p);
            UNROLL for (int o = 0; o < kNarrowChannels; ++o) {
                const __m512i table = _mm512_load_si512(reinterpret_cast<const char*>(&kTables) + weights[o]);
                UNROLL for (int p = 0; p < P; ++p) bytes[p][o] = _mm512_add_epi8(bytes[p][o], _mm512_permutexvar_epi8(codes[p], table));
            }
        }
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < kNarrowChannels; ++o) {
            even[p][o] = _mm512_add_epi16(even[p][o], bytes[p][o]);
            odd[p][o] = _mm512_add_epi16(odd[p][o], _mm512_srli_epi16(bytes[p][o], 8));
        }
    }
}

INLINE __m512i codes_of(const NarrowLayer& layer, int channel, __m512i even, __m512i odd, const Output& to) {
    even = _mm512_sub_epi16(even, _mm512_slli_epi16(odd, 8));
    if (layer.is_narrow) {
        const __m512i one = _mm512_set1_epi16(1);
        __m512i low = _mm512_set1_epi16(static_cast<short>(layer.lowest_code)), high = low;
        UNROLL for (int k = 0; k < 3; ++k) {
            const __m512i threshold = _mm512_set1_epi16(static_cast<short>(layer.thresholds.data()[channel * 3 + k]));
            low = _mm512_mask_add_epi16(low, _mm512_cmpge_epu16_mask(even, threshold), low, one);
            high = _mm512_mask_add_epi16(high, _mm512_cmpge_epu16_mask(odd, threshold), high, one);
        }
        return _mm512_or_si512(low, _mm512_slli_epi16(high, 8));
    }
    const __m512i bias = _mm512_set1_epi32(layer.bias.data()[channel]), word = _mm512_set1_epi32(0xFFFF);
    const __m512 scale = _mm512_set1_ps(layer.scale.data()[channel]);
    const __m512i totals[4] = {_mm512_and_si512(even, word), _mm512_srli_epi32(even, 16), _mm512_and_si512(odd, word),
                               _mm512_srli_epi32(odd, 16)};
    __m512i codes[4];
    UNROLL for (int q = 0; q < 4; ++q)
        codes[q] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(totals[q], bias)), scale));
    return weave(to_bytes(codes[0], codes[1], codes[2], codes[3], to));
}

// Sixteen rows of 64 bytes, a channel each, to 64 times 16 bytes, each to its position; `at` counts along rows of `job.row`.
INLINE void scatter(const NarrowJob& job, const uint8_t (*rows)[64], size_t at) {
    alignas(64) uint8_t positions[64][kMostChannels];
    UNROLL for (int part = 0; part < 4; ++part)
        transpose_square(rows[0] + 16 * part, 64, positions[16 * part], kMostChannels, _mm_setzero_si128());
    int y = static_cast<int>(at / job.row), x = static_cast<int>(at % job.row);
    for (int i = 0; i < 64 && y < job.out_height;) {
        const int run = 64 - i < job.out_width - x ? 64 - i : job.out_width - x;  // none where a row has ended
        uint8_t* to = job.out + (static_cast<size_t>(y) * job.out_width + x) * job.out_stride;
        for (int k = 0; k < run; ++k, to += job.out_stride)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_load_si128(reinterpret_cast<const __m128i*>(positions[i + k])));
        i += static_cast<int>(job.row) - x;
        x = 0;
        ++y;
    }
}

template <int P> __attribute__((noinline)) void tile(const NarrowJob& job, int vector) {
    const NarrowLayer& layer = *job.layer;
    const size_t at = static_cast<size_t>(vector) * 64;
    const int steps = layer.groups * layer.shape.kernel_h * layer.shape.kernel_w;
    const Output to = output_of(layer);
    alignas(64) uint8_t rows[P][kMostChannels][64];
    for (int channel = 0; channel < layer.shape.out_channels; channel += kNarrowChannels) {
        __m512i even[P][kNarrowChannels], odd[P][kNarrowChannels];
        accumulate<P>(job, layer.weights.as<uint16_t>() + static_cast<size_t>(channel) * steps, job.planes + at, even, odd);
        UNROLL for (int p = 0; p < P; ++p) UNROLL for (int o = 0; o < kNarrowChannels; ++o)
            _mm512_store_si512(rows[p][channel + o], codes_of(layer, channel + o, even[p][o], odd[p][o], to));
    }
    for (int p = 0; p < P; ++p) scatter(job, rows[p], at + 64 * p);
}

}  // namespace

void avx512_narrow_conv(const NarrowJob& job, int first, int last) {
    int vector = first;
    for (; vector + kWide <= last; vector += kWide) tile<kWide>(job, vector);
    for (; vector < last; ++vector) tile<1>(job, vector);
}

void avx512_pack_planes(const uint8_t* codes, size_t stride, int width, const NarrowLayer& layer, int base, uint8_t* out,
                        size_t plane) {
    constexpr int kPart = 64;
    alignas(64) uint8_t channels[3 * 24][kPart];  // up to 64 channels, and zeros to a multiple of three
    const __m512i bases = _mm512_set1_epi8(static_cast<char>(base)), mask = _mm512_set1_epi8(kHighestActivation);
    for (int x0 = 0; x0 < width; x0 += kPart) {
        const int count = width - x0 < kPart ? width - x0 : kPart;
        for (int c = layer.shape.in_channels; c < 3 * layer.groups; ++c) _mm512_store_si512(channels[c], bases);
        transpose_part(codes + static_cast<size_t>(x0) * stride, stride, channels[0], kPart, 0, 0, count, 0, layer.shape.in_channels);
        for (int g = 0; g < layer.groups; ++g) {
            __m512i code = _mm512_setzero_si512();
            UNROLL for (int i = 0; i < 3; ++i) {
                const __m512i raw = _mm512_load_si512(channels[g + i * layer.groups]);
                code = _mm512_or_si512(code, _mm512_slli_epi16(_mm512_and_si512(_mm512_sub_epi8(raw, bases), mask), 2 * i));
            }
            const __mmask64 lanes = count == kPart ? ~0ull : (1ull << count) - 1;
            _mm512_mask_storeu_epi8(out + g * plane + x0, lanes, code);
        }
    }
}

}  // namespace lowbit

#endif
