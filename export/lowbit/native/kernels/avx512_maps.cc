// AVX-512: what happens to codes between convolutions, and the table of this instruction set's kernels.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include "kernels/avx512.h"
#include "kernels/planes.h"

namespace lowbit {
namespace {

// Pairs of taps: bytes of both interleaved, VPMADDUBSW with interleaved weights, 16-bit sums. Interleaving works within
// 128 bits, so sums come as channels 0..7, 16..23, 32..39, 48..55 and the rest; so do the bytes packed from them again.
INLINE void depthwise_position(const DepthwiseLayer& layer, const DepthwiseJob& job, const uint8_t* source, int channel,
                               const Output& to, uint8_t* out) {
    const int8_t* weights = layer.weights.as<int8_t>() + static_cast<size_t>(channel) * layer.pairs * 2;
    const int width = layer.shape.kernel_w, taps = layer.shape.kernel_h * width;
    __m512i low = _mm512_setzero_si512(), high = low;
    for (int pair = 0, row = 0, column = 0; pair < layer.pairs; ++pair, weights += 128) {
        __m512i x[2];
        UNROLL for (int i = 0; i < 2; ++i) {
            const bool is_there = pair * 2 + i < taps;
            x[i] = is_there ? _mm512_loadu_si512(source + row * job.source_row + column * job.stride) : _mm512_setzero_si512();
            if (++column == width) column = 0, ++row;
        }
        const __m512i w0 = _mm512_load_si512(weights), w1 = _mm512_load_si512(weights + 64);
        low = _mm512_add_epi16(low, _mm512_maddubs_epi16(_mm512_unpacklo_epi8(x[0], x[1]), w0));
        high = _mm512_add_epi16(high, _mm512_maddubs_epi16(_mm512_unpackhi_epi8(x[0], x[1]), w1));
    }
    const int32_t* const bias = layer.bias.as<int32_t>() + channel;
    const float* const scale = layer.scale.as<float>() + channel;
    const __m512i quarters = to_bytes(rounded(_mm512_srai_epi32(_mm512_slli_epi32(low, 16), 16), bias, scale),
                                      rounded(_mm512_srai_epi32(low, 16), bias + 16, scale + 16),
                                      rounded(_mm512_srai_epi32(_mm512_slli_epi32(high, 16), 16), bias + 32, scale + 32),
                                      rounded(_mm512_srai_epi32(high, 16), bias + 48, scale + 48), to);
    // Each 128 bits: low even x4, low odd x4, high even x4, high odd x4; low is channels 0..7 of 16, high 8..15.
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
    _mm512_storeu_si512(out, _mm512_shuffle_epi8(quarters, order));
}

void depthwise(const DepthwiseJob& job, int first_row, int last_row) {
    const Output to = output_of(*job.layer);
    for_depthwise<64>(job, first_row, last_row, [&](const uint8_t* source, int channel, uint8_t* out) INLINED {
        depthwise_position(*job.layer, job, source, channel, to, out);
    });
}

INLINE __mmask32 first_lanes(int count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// Index of a group: activations a, b, c of channels g, g + groups, g + 2 groups make (a | b << 2 | c << 4) * 64, or those of
// two channels what their bits say.
template <int Group, int Bits>
void pack_groups(const uint8_t* codes, size_t stride, int width, const LutLayer& layer, int base, uint16_t* out) {
    const int groups = layer.groups, channels = layer.shape.in_channels;
    const __m256i bases = _mm256_set1_epi8(static_cast<char>(base)), mask = _mm256_set1_epi8((1 << Bits) - 1);
    for (int x = 0; x < width; ++x, codes += stride, out += groups)
        for (int g = 0; g < groups; g += 32) {
            __m512i index = _mm512_setzero_si512();
            UNROLL for (int i = 0; i < Group; ++i) {
                const int channel = g + i * groups;
                const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + channel));
                const __m256i activation =  // channels past the end count as 0
                    _mm256_maskz_sub_epi8(first_lanes(channels - channel), raw, bases);
                index = _mm512_add_epi16(
                    index, _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_and_si256(activation, mask)), 6 + Bits * i));
            }
            _mm512_mask_storeu_epi16(out + g, first_lanes(groups - g), index);
        }
}

void pack_index(const uint8_t* codes, size_t stride, int width, const LutLayer& layer, int base, uint16_t* out) {
    if (layer.format.act_bits == 2) pack_groups<3, 2>(codes, stride, width, layer, base, out);
    else if (layer.format.act_bits == 3) pack_groups<2, 3>(codes, stride, width, layer, base, out);
    else pack_groups<2, 4>(codes, stride, width, layer, base, out);
}

struct Bytes {  // 64 codes as numbers: every fourth one, from the first, third, second and fourth on
    __m512i quarter[4];
};

INLINE Bytes numbers(const uint8_t* codes, int less) {
    const __m512i all = _mm512_loadu_si512(codes), low = _mm512_set1_epi32(0xFF), shift = _mm512_set1_epi32(less);
    Bytes bytes = {{_mm512_and_si512(all, low), _mm512_and_si512(_mm512_srli_epi32(all, 16), low),
                    _mm512_and_si512(_mm512_srli_epi32(all, 8), low), _mm512_srli_epi32(all, 24)}};
    if (less != 0) UNROLL for (int q = 0; q < 4; ++q) bytes.quarter[q] = _mm512_sub_epi32(bytes.quarter[q], shift);
    return bytes;
}

void add(const AddJob& job, const uint8_t* a, const uint8_t* b, uint8_t* out, size_t count) {
    const Output to = {_mm512_set1_epi16(static_cast<short>(job.is_fused ? job.shift_c : job.zero_c)),
                       _mm512_set1_epi8(static_cast<char>(job.low)), _mm512_set1_epi8(static_cast<char>(job.high))};
    const int less_a = job.is_fused ? job.shift_a : job.zero_a, less_b = job.is_fused ? job.shift_b : job.zero_b;
    const __m512 ratio_a = _mm512_set1_ps(job.ratio_a), ratio_b = _mm512_set1_ps(job.ratio_b), fixed = _mm512_set1_ps(job.fixed);
    const __m512 scale_a = _mm512_set1_ps(job.scale_a), scale_b = _mm512_set1_ps(job.scale_b), scale_c = _mm512_set1_ps(job.scale_c);
    for (size_t i = 0; i < count; i += 64) {
        const Bytes x = numbers(a + i, less_a), y = numbers(b + i, less_b);
        __m512i sums[4];
        UNROLL for (int q = 0; q < 4; ++q) {
            const __m512 u = _mm512_cvtepi32_ps(x.quarter[q]), v = _mm512_cvtepi32_ps(y.quarter[q]);
            const __m512 sum = job.is_fused ? _mm512_fmadd_ps(u, ratio_a, _mm512_fmadd_ps(v, ratio_b, fixed))
                                            : _mm512_div_ps(_mm512_add_ps(_mm512_mul_ps(u, scale_a), _mm512_mul_ps(v, scale_b)), scale_c);
            sums[q] = _mm512_cvtps_epi32(sum);
        }
        _mm512_storeu_si512(out + i, weave(to_bytes(sums[0], sums[1], sums[2], sums[3], to)));
    }
}

// 256 entries: two tables of 128, chosen by the code's highest bit.
void map(const uint8_t* table, const uint8_t* codes, uint8_t* out, size_t count) {
    __m512i t[4];
    UNROLL for (int i = 0; i < 4; ++i) t[i] = _mm512_loadu_si512(table + 64 * i);
    for (size_t i = 0; i < count; i += 64) {
        const __m512i code = _mm512_loadu_si512(codes + i);
        const __m512i below = _mm512_permutex2var_epi8(t[0], code, t[1]), above = _mm512_permutex2var_epi8(t[2], code, t[3]);
        _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), below, above));
    }
}

struct Most {
    __m512i codes = _mm512_setzero_si512();
    INLINE void take(const uint8_t* from) { codes = _mm512_max_epu8(codes, _mm512_loadu_si512(from)); }
    INLINE void store(uint8_t* to) const { _mm512_storeu_si512(to, codes); }
};

void max_pool(const PoolJob& job, int first_row, int last_row) { pool_rows<Most, 64>(job, first_row, last_row); }

// Three planes of 64 pixels to 192 bytes of pixels: byte i is plane i % 3, pixel i / 3.
struct Interleave {
    alignas(64) uint8_t from[3][64];  // pixels of the byte's plane; plane 1 is found 64 higher
    constexpr Interleave() : from() {
        for (int i = 0; i < 192; ++i) from[i / 64][i % 64] = static_cast<uint8_t>(i / 3 + (i % 3 == 1 ? 64 : 0));
    }
};
constexpr Interleave kInterleave;

void import_three(const uint8_t* planes, size_t positions, uint8_t* out, uint8_t flip, size_t first, size_t last) {
    const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
    // Bits i with i % 3 == 2, counted from byte 64 k of the 192.
    const __mmask64 third[3] = {0x4924924924924924ull, 0x2492492492492492ull, 0x9249249249249249ull};
    size_t at = first;
    for (; at + 64 <= last; at += 64) {
        const __m512i a = _mm512_loadu_si512(planes + at), b = _mm512_loadu_si512(planes + positions + at);
        const __m512i c = _mm512_loadu_si512(planes + 2 * positions + at);
        UNROLL for (int k = 0; k < 3; ++k) {
            const __m512i from = _mm512_load_si512(kInterleave.from[k]);
            __m512i pixels = _mm512_permutex2var_epi8(a, from, b);
            pixels = _mm512_mask_permutexvar_epi8(pixels, third[k], from, c);
            _mm512_storeu_si512(out + 3 * at + 64 * k, _mm512_xor_si512(pixels, flips));
        }
    }
    for (; at < last; ++at)
        for (int c = 0; c < 3; ++c) out[3 * at + c] = static_cast<uint8_t>(planes[c * positions + at] ^ flip);
}

void import_planes(const uint8_t* planes, int channels, size_t positions, uint8_t* out, size_t stride, uint8_t flip,
                   size_t first, size_t last) {
    if (channels == 3 && stride == 3) import_three(planes, positions, out, flip, first, last);
    else transpose_in(planes, channels, positions, out, stride, flip, first, last);
}

}  // namespace

const Kernels* avx512_kernels() {
    static const Kernels kernels = {"avx512", {64, 3, 64, 2, true, 2, 2, true}, true,          avx512_lut_conv, avx512_dot_conv, depthwise,
                                    pack_index, add,                map,           max_pool,        avx512_narrow_conv, avx512_pack_planes, import_planes,
                                    transpose_out, {{64, 2, 64, 2, true, 3, 3, true}, {64, 2, 64, 2, true, 2, 4, true}}};
    return &kernels;
}

}  // namespace lowbit

#else

namespace lowbit {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace lowbit

#endif
