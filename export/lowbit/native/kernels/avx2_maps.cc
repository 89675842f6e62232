// AVX2: what happens to codes between convolutions, and the table of this instruction set's kernels.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx2.h"
#include "kernels/planes.h"

namespace lowbit {
namespace {

// Pairs of taps, as in the AVX-512 file; 32 channels are half a block of weights.
INLINE void depthwise_position(const DepthwiseLayer& layer, const DepthwiseJob& job, const uint8_t* source, int channel,
                               const Output& to, uint8_t* out) {
    const int8_t* weights = layer.weights.as<int8_t>() + static_cast<size_t>(channel / 64) * layer.pairs * 128 + channel % 64;
    const int width = layer.shape.kernel_w, taps = layer.shape.kernel_h * width;
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int pair = 0, row = 0, column = 0; pair < layer.pairs; ++pair, weights += 128) {
        __m256i x[2];
        UNROLL for (int i = 0; i < 2; ++i) {
            const bool is_there = pair * 2 + i < taps;
            x[i] = is_there ? load(source + row * job.source_row + column * job.stride) : _mm256_setzero_si256();
            if (++column == width) column = 0, ++row;
        }
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(x[0], x[1]), load(weights)));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(x[0], x[1]), load(weights + 64)));
    }
    const int at = channel / 64 * 64 + channel % 64 / 4;
    const int32_t* const bias = layer.bias.as<int32_t>() + at;
    const float* const scale = layer.scale.as<float>() + at;
    const __m256i quarters = to_bytes(rounded(_mm256_srai_epi32(_mm256_slli_epi32(low, 16), 16), bias, scale),
                                      rounded(_mm256_srai_epi32(low, 16), bias + 16, scale + 16),
                                      rounded(_mm256_srai_epi32(_mm256_slli_epi32(high, 16), 16), bias + 32, scale + 32),
                                      rounded(_mm256_srai_epi32(high, 16), bias + 48, scale + 48), to);
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    store(out, _mm256_shuffle_epi8(quarters, _mm256_broadcastsi128_si256(order)));
}

void depthwise(const DepthwiseJob& job, int first_row, int last_row) {
    const Output to = output_of(*job.layer);
    for_depthwise<32>(job, first_row, last_row, [&](const uint8_t* source, int channel, uint8_t* out) INLINED {
        depthwise_position(*job.layer, job, source, channel, to, out);
    });
}

// Index of a group: activations a and b of channels g and g + groups make (a | b << bits) * 32.
INLINE __m256i sixteen(const uint8_t* codes, __m128i bases, int highest, int shift) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i activation = _mm_and_si128(_mm_sub_epi8(raw, bases), _mm_set1_epi8(static_cast<char>(highest)));
    return _mm256_slli_epi16(_mm256_cvtepu8_epi16(activation), shift);
}

void pack_index(const uint8_t* codes, size_t stride, int width, const LutLayer& layer, int base, uint16_t* out) {
    const int groups = layer.groups, whole = layer.shape.in_channels - groups;  // groups that have both channels
    const int bits = layer.format.act_bits, highest = layer.format.highest_activation();
    const __m128i bases = _mm_set1_epi8(static_cast<char>(base));
    for (int x = 0; x < width; ++x, codes += stride, out += groups) {
        int g = 0;
        for (; g + 16 <= whole; g += 16)
            store(out + g, _mm256_add_epi16(sixteen(codes + g, bases, highest, 5), sixteen(codes + g + groups, bases, highest, 5 + bits)));
        for (; g < groups; ++g) {
            const int a = (codes[g] - base) & highest;
            const int b = g < whole ? (codes[g + groups] - base) & highest : 0;
            out[g] = static_cast<uint16_t>((a | b << bits) << 5);
        }
    }
}

struct Bytes {  // 32 codes as numbers: every fourth one, from the first, third, second and fourth on
    __m256i quarter[4];
};

INLINE Bytes numbers(const uint8_t* codes, int less) {
    const __m256i all = load(codes), low = _mm256_set1_epi32(0xFF), shift = _mm256_set1_epi32(less);
    Bytes bytes = {{_mm256_and_si256(all, low), _mm256_and_si256(_mm256_srli_epi32(all, 16), low),
                    _mm256_and_si256(_mm256_srli_epi32(all, 8), low), _mm256_srli_epi32(all, 24)}};
    if (less != 0) UNROLL for (int q = 0; q < 4; ++q) bytes.quarter[q] = _mm256_sub_epi32(bytes.quarter[q], shift);
    return bytes;
}

void add(const AddJob& job, const uint8_t* a, const uint8_t* b, uint8_t* out, size_t count) {
    const Output to = {_mm256_set1_epi16(static_cast<short>(job.is_fused ? job.shift_c : job.zero_c)),
                       _mm256_set1_epi8(static_cast<char>(job.low)), _mm256_set1_epi8(static_cast<char>(job.high))};
    const int less_a = job.is_fused ? job.shift_a : job.zero_a, less_b = job.is_fused ? job.shift_b : job.zero_b;
    const __m256 ratio_a = _mm256_set1_ps(job.ratio_a), ratio_b = _mm256_set1_ps(job.ratio_b), fixed = _mm256_set1_ps(job.fixed);
    const __m256 scale_a = _mm256_set1_ps(job.scale_a), scale_b = _mm256_set1_ps(job.scale_b), scale_c = _mm256_set1_ps(job.scale_c);
    for (size_t i = 0; i < count; i += 32) {
        const Bytes x = numbers(a + i, less_a), y = numbers(b + i, less_b);
        __m256i sums[4];
        UNROLL for (int q = 0; q < 4; ++q) {
            const __m256 u = _mm256_cvtepi32_ps(x.quarter[q]), v = _mm256_cvtepi32_ps(y.quarter[q]);
            const __m256 sum = job.is_fused ? _mm256_fmadd_ps(u, ratio_a, _mm256_fmadd_ps(v, ratio_b, fixed))
                                            : _mm256_div_ps(_mm256_add_ps(_mm256_mul_ps(u, scale_a), _mm256_mul_ps(v, scale_b)), scale_c);
            sums[q] = _mm256_cvtps_epi32(sum);
        }
        store(out + i, weave(to_bytes(sums[0], sums[1], sums[2], sums[3], to)));
    }
}

// Tables that only rise, a few steps of one: counts of thresholds; others entry by entry.
void map(const uint8_t* table, const uint8_t* codes, uint8_t* out, size_t count) {
    constexpr int kMostSteps = 16;
    uint8_t steps[kMostSteps];
    int found = 0;
    bool is_simple = true;
    for (int i = 1; i < 256 && is_simple; ++i) {
        const int rise = table[i] - table[i - 1];
        is_simple = rise == 0 || (rise == 1 && found < kMostSteps);
        if (is_simple && rise == 1) steps[found++] = static_cast<uint8_t>(i);
    }
    size_t i = 0;
    if (is_simple)
        for (; i + 32 <= count; i += 32) {
            const __m256i code = load(codes + i);
            __m256i result = _mm256_set1_epi8(static_cast<char>(table[0]));
            for (int k = 0; k < found; ++k) {
                const __m256i step = _mm256_set1_epi8(static_cast<char>(steps[k]));
                result = _mm256_sub_epi8(result, _mm256_cmpeq_epi8(_mm256_max_epu8(code, step), code));
            }
            store(out + i, result);
        }
    for (; i < count; ++i) out[i] = table[codes[i]];
}

struct Most {
    __m256i codes = _mm256_setzero_si256();
    INLINE void take(const uint8_t* from) { codes = _mm256_max_epu8(codes, load(from)); }
    INLINE void store(uint8_t* to) const { lowbit::store(to, codes); }
};

void max_pool(const PoolJob& job, int first_row, int last_row) { pool_rows<Most, 32>(job, first_row, last_row); }

}  // namespace

const Kernels* avx2_kernels() {
    static const Kernels kernels = {"avx2", {32, 2, 32, 1, true}, false,        avx2_lut_conv, avx2_dot_conv, depthwise,
                                    pack_index, add,              map,          max_pool,      nullptr, nullptr, transpose_in,
                                    transpose_out, {{32, 2, 32, 1, true, 2, 4}}, true};
    return &kernels;
}

}  // namespace lowbit

#else

namespace lowbit {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace lowbit

#endif
