// AVX2: what happens to codes between convolutions, and the table of this instruction set's kernels.
#include "kernels.h"

#if defined(__x86_64__)

#include "avx2.h"
#include "planes.h"

namespace lowbit {
namespace {

// Index of a group: activations a and b of channels g and g + groups make (a | b << 2) * 32.
INLINE __m256i sixteen(const uint8_t* codes, __m128i zeros, int shift) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i activation = _mm_and_si128(_mm_sub_epi8(raw, zeros), _mm_set1_epi8(kHighestActivation));
    return _mm256_slli_epi16(_mm256_cvtepu8_epi16(activation), shift);
}

void pack_index(const uint8_t* codes, size_t stride, int width, const LutLayer& layer, int zero, uint16_t* out) {
    const int groups = layer.groups, whole = layer.shape.in_channels - groups;  // groups that have both channels
    const __m128i zeros = _mm_set1_epi8(static_cast<char>(zero));
    for (int x = 0; x < width; ++x, codes += stride, out += groups) {
        int g = 0;
        for (; g + 16 <= whole; g += 16)
            store(out + g, _mm256_add_epi16(sixteen(codes + g, zeros, 5), sixteen(codes + g + groups, zeros, 7)));
        for (; g < groups; ++g) {
            const int a = (codes[g] - zero) & kHighestActivation;
            const int b = g < whole ? (codes[g + groups] - zero) & kHighestActivation : 0;
            out[g] = static_cast<uint16_t>((a | b << 2) << 5);
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
    constexpr int kMostSteps = 8;
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

void max_pool(const PoolJob& job, int first_row, int last_row) {
    for (int y = first_row; y < last_row; ++y) {
        const int top = y * job.stride_h - job.pad_top;
        const int y0 = top < 0 ? 0 : top, y1 = top + job.kernel_h > job.height ? job.height : top + job.kernel_h;
        for (int x = 0; x < job.out_width; ++x) {
            const int left = x * job.stride_w - job.pad_left;
            const int x0 = left < 0 ? 0 : left, x1 = left + job.kernel_w > job.width ? job.width : left + job.kernel_w;
            uint8_t* const out = job.out + (static_cast<size_t>(y) * job.out_width + x) * job.stride;
            for (int c = 0; c < job.stride; c += 32) {
                __m256i most = _mm256_setzero_si256();
                for (int sy = y0; sy < y1; ++sy) {
                    const uint8_t* from = job.source + (static_cast<size_t>(sy) * job.width + x0) * job.stride + c;
                    for (int sx = x0; sx < x1; ++sx, from += job.stride) most = _mm256_max_epu8(most, load(from));
                }
                store(out + c, most);
            }
        }
    }
}

}  // namespace

const Kernels* avx2_kernels() {
    static const Kernels kernels = {"avx2", {32, 2, 32, 1, true}, false,        avx2_lut_conv, avx2_dot_conv,
                                    pack_index, add,              map,          max_pool,      transpose_in,
                                    transpose_out};
    return &kernels;
}

}  // namespace lowbit

#else

namespace lowbit {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace lowbit

#endif
