// NEON: what happens to codes between convolutions, and the table of this instruction set's kernels.
#include "kernels/kernels.h"

#if defined(__aarch64__)

#include "kernels/neon.h"
#include "kernels/planes.h"

namespace lowbit {
namespace {

// Index of a group: activations a and b of channels g and g + groups make (a | b << bits) * 16.
void pack_index(const uint8_t* codes, size_t stride, int width, const LutLayer& layer, int base, uint16_t* out) {
    const int groups = layer.groups, whole = layer.shape.in_channels - groups;  // groups that have both channels
    const int bits = layer.format.act_bits, highest = layer.format.highest_activation();
    const uint8x16_t bases = vdupq_n_u8(static_cast<uint8_t>(base)), mask = vdupq_n_u8(static_cast<uint8_t>(highest));
    const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(bits));
    for (int x = 0; x < width; ++x, codes += stride, out += groups) {
        int g = 0;
        for (; g + 16 <= whole; g += 16) {
            const uint8x16_t a = vandq_u8(vsubq_u8(vld1q_u8(codes + g), bases), mask);
            const uint8x16_t b = vandq_u8(vsubq_u8(vld1q_u8(codes + g + groups), bases), mask);
            const uint8x16_t both = vorrq_u8(a, vshlq_u8(b, shift));
            vst1q_u16(out + g, vshll_n_u8(vget_low_u8(both), 4));
            vst1q_u16(out + g + 8, vshll_high_n_u8(both, 4));
        }
        for (; g < groups; ++g) {
            const int a = (codes[g] - base) & highest;
            const int b = g < whole ? (codes[g + groups] - base) & highest : 0;
            out[g] = static_cast<uint16_t>((a | b << bits) << 4);
        }
    }
}

struct Numbers {  // 16 codes less a zero point, four by four
    int32x4_t quarter[4];
};

INLINE Numbers numbers(const uint8_t* codes, uint8x16_t zero) {
    const uint8x16_t all = vld1q_u8(codes);
    const int16x8_t low = vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(all), vget_low_u8(zero)));
    const int16x8_t high = vreinterpretq_s16_u16(vsubl_high_u8(all, zero));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}

enum class Arithmetic { kIntegers, kFused, kReal };  // of `AddJob`

struct Sum {  // a job's numbers, in vectors
    Sum(const AddJob& job, bool is_fused)
        : zero_a(vdupq_n_u8(static_cast<uint8_t>(is_fused ? job.shift_a : job.zero_a))),
          zero_b(vdupq_n_u8(static_cast<uint8_t>(is_fused ? job.shift_b : job.zero_b))),
          to{vdupq_n_s16(static_cast<int16_t>(is_fused ? job.shift_c : job.zero_c)),
             vdupq_n_u8(static_cast<uint8_t>(job.low)), vdupq_n_u8(static_cast<uint8_t>(job.high))},
          ratio_a(vdupq_n_f32(is_fused ? job.ratio_a : job.scale_a)), ratio_b(vdupq_n_f32(is_fused ? job.ratio_b : job.scale_b)),
          fixed(vdupq_n_f32(job.fixed)), scale_c(vdupq_n_f32(job.scale_c)), multiplier_a(vdupq_n_s32(job.multiplier_a)),
          multiplier_b(vdupq_n_s32(job.multiplier_b)), right(vdupq_n_s32(-job.right)) {}

    uint8x16_t zero_a, zero_b;
    Output to;
    float32x4_t ratio_a, ratio_b, fixed, scale_c;
    int32x4_t multiplier_a, multiplier_b, right;
};

template <Arithmetic kind> INLINE int32x4_t sum_of(const Sum& sum, int32x4_t a, int32x4_t b) {
    if (kind == Arithmetic::kIntegers) {  // SRSHL rounds halves up; one less where negative: away from zero
        const int32x4_t total = vmlaq_s32(vmulq_s32(a, sum.multiplier_a), b, sum.multiplier_b);
        return vrshlq_s32(vsraq_n_s32(total, total, 31), sum.right);
    }
    const float32x4_t x = vcvtq_f32_s32(a), y = vcvtq_f32_s32(b);
    if (kind == Arithmetic::kFused) return vcvtnq_s32_f32(vfmaq_f32(vfmaq_f32(sum.fixed, y, sum.ratio_b), x, sum.ratio_a));
    return vcvtnq_s32_f32(vdivq_f32(vaddq_f32(vmulq_f32(x, sum.ratio_a), vmulq_f32(y, sum.ratio_b)), sum.scale_c));
}

template <Arithmetic kind> void add_codes(const AddJob& job, const uint8_t* a, const uint8_t* b, uint8_t* out, size_t count) {
    const Sum sum(job, kind == Arithmetic::kFused);
    for (size_t i = 0; i < count; i += 16) {
        const Numbers x = numbers(a + i, sum.zero_a), y = numbers(b + i, sum.zero_b);
        int32x4_t sums[4];
        UNROLL for (int q = 0; q < 4; ++q) sums[q] = sum_of<kind>(sum, x.quarter[q], y.quarter[q]);
        vst1q_u8(out + i, to_bytes(sums[0], sums[1], sums[2], sums[3], sum.to));
    }
}

void add(const AddJob& job, const uint8_t* a, const uint8_t* b, uint8_t* out, size_t count) {
    if (job.is_integer()) add_codes<Arithmetic::kIntegers>(job, a, b, out, count);
    else if (job.is_fused) add_codes<Arithmetic::kFused>(job, a, b, out, count);
    else add_codes<Arithmetic::kReal>(job, a, b, out, count);
}

// TBL and TBX look up 64 of the 256 entries each; codes past their end give 0, or leave what was found.
void map(const uint8_t* table, const uint8_t* codes, uint8_t* out, size_t count) {
    const uint8x16x4_t parts[4] = {vld1q_u8_x4(table), vld1q_u8_x4(table + 64), vld1q_u8_x4(table + 128), vld1q_u8_x4(table + 192)};
    const uint8x16_t part = vdupq_n_u8(64);
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        uint8x16_t code = vld1q_u8(codes + i);
        uint8x16_t found = vqtbl4q_u8(parts[0], code);
        UNROLL for (int k = 1; k < 4; ++k) {
            code = vsubq_u8(code, part);
            found = vqtbx4q_u8(found, parts[k], code);
        }
        vst1q_u8(out + i, found);
    }
    for (; i < count; ++i) out[i] = table[codes[i]];
}

struct Most {
    uint8x16_t codes[4] = {vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};
    INLINE void take(const uint8_t* from) {
        UNROLL for (int v = 0; v < 4; ++v) codes[v] = vmaxq_u8(codes[v], vld1q_u8(from + v * 16));
    }
    INLINE void store(uint8_t* to) const {
        UNROLL for (int v = 0; v < 4; ++v) vst1q_u8(to + v * 16, codes[v]);
    }
};

void max_pool(const PoolJob& job, int first_row, int last_row) { pool_rows<Most, 64>(job, first_row, last_row); }

}  // namespace

const Kernels* neon_kernels() {
    static const Kernels kernels = {"neon", {32, 2, 16, 2, true}, true, neon_lut_conv, neon_dot_conv, neon_depthwise,
                                    pack_index, add, map, max_pool, nullptr, nullptr, transpose_in, transpose_out,
                                    {{32, 2, 16, 2, true, 2, 4}}, false, {-64, 63, 128, -1}};
    return &kernels;
}

}  // namespace lowbit

#else

namespace lowbit {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace lowbit

#endif
