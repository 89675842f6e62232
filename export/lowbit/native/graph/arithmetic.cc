// ONNX Runtime's arithmetic between convolutions, code by code.
#include "graph/arithmetic.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace lowbit {

namespace {

constexpr float kMostSum = 1e6f;  // sums of larger steps are left alone: the runtime saturates 16 bits on the way

int saturated(float value, int shift) {
    return std::min(std::max(static_cast<int>(std::nearbyintf(value)) + shift, 0), 255);
}

float file_zero(const Grid& grid) { return static_cast<float>(grid.zero - grid.shift()); }

// zero_c - (ratio_a * zero_a + ratio_b * zero_b), with either product fused into the sum, or none.
std::vector<float> fixed_parts(float ratio_a, float ratio_b, const Grid& a, const Grid& b, const Grid& to) {
    const float za = file_zero(a), zb = file_zero(b), zc = file_zero(to);
    const volatile float pa = ratio_a * za, pb = ratio_b * zb;  // rounded each, whatever the compiler would like
    return {zc - (pa + pb), zc - std::fmaf(ratio_a, za, pb), zc - std::fmaf(ratio_b, zb, pa)};
}

bool all_equal(const std::vector<float>& values) {
    return std::all_of(values.begin(), values.end(), [&](float value) { return value == values[0]; });
}

// On Arm the runtime adds in integers: ratios as multiples of 2^-right, of which the larger has 22 bits. Returns false
// where it would not.
bool integer_sum(const Grid& a, const Grid& b, const Grid& to, AddJob* job) {
    constexpr float kLeast = 1.0f / (1 << 14), kMost = 256;
    constexpr int kBits = 22;
    const float ratio_a = a.scale / to.scale, ratio_b = b.scale / to.scale;
    if (!(std::min(ratio_a, ratio_b) >= kLeast && std::max(ratio_a, ratio_b) < kMost)) return false;
    job->right = kBits - 1 - std::ilogb(std::max(ratio_a, ratio_b));
    job->multiplier_a = static_cast<int32_t>(std::lrint(std::ldexp(ratio_a, job->right)));
    job->multiplier_b = static_cast<int32_t>(std::lrint(std::ldexp(ratio_b, job->right)));
    job->is_fused = false;
    job->zero_a = a.zero;
    job->zero_b = b.zero;
    job->zero_c = to.zero;
    return std::max(job->multiplier_a, job->multiplier_b) < 1 << kBits;  // rounding may have made it one bit longer
}

bool add_constant_in_integers(const Grid& from, const Grid& constant, int code, const Grid& to, std::array<uint8_t, 256>* table) {
    AddJob job;
    if (!integer_sum(from, constant, to, &job)) return false;
    std::array<uint8_t, 256> all, others;
    for (int i = 0; i < 256; ++i) all[i] = static_cast<uint8_t>(i);
    others.fill(static_cast<uint8_t>(code));
    portable_kernels()->add(job, all.data(), others.data(), table->data(), table->size());
    return true;
}

bool in_range(float ratio_a, float ratio_b, float fixed) {
    return std::isfinite(fixed) && 255 * (ratio_a + ratio_b) + std::fabs(fixed) < kMostSum;
}

}  // namespace

int quantized(float value, const Grid& grid) {
    value = value / grid.scale;
    value = std::min(std::max(value, static_cast<float>(-grid.zero)), static_cast<float>(255 - grid.zero));
    return static_cast<int>(std::nearbyintf(value)) + grid.zero;
}

float dequantized(int code, const Grid& grid) { return static_cast<float>(code - grid.zero) * grid.scale; }

std::array<uint8_t, 256> requantize_table(const Grid& from, const Grid& to) {
    std::array<uint8_t, 256> table;
    for (int code = 0; code < 256; ++code) table[code] = static_cast<uint8_t>(quantized(dequantized(code, from), to));
    return table;
}

bool add_constant_table(const Grid& from, const Grid& constant, int code, bool is_first, const Grid& to,
                        std::array<uint8_t, 256>* table) {
    const Grid& a = is_first ? constant : from;
    const Grid& b = is_first ? from : constant;
    if (kIsArm) return add_constant_in_integers(from, constant, code, to, table);
    const float ratio = from.scale / to.scale, constant_ratio = constant.scale / to.scale;
    const std::vector<float> parts = fixed_parts(a.scale / to.scale, b.scale / to.scale, a, b, to);
    const float value = static_cast<float>(code - constant.shift());
    std::vector<float> fixed;
    for (float part : parts) {
        const volatile float product = value * constant_ratio;
        fixed.push_back(part + product);
        fixed.push_back(std::fmaf(value, constant_ratio, part));
    }
    if (!in_range(ratio, constant_ratio, fixed[0])) return false;
    for (int i = 0; i < 256; ++i) {
        const float x = static_cast<float>(i - from.shift());
        const int wanted = saturated(std::fmaf(x, ratio, fixed[0]), to.shift());
        for (float part : fixed)
            if (saturated(std::fmaf(x, ratio, part), to.shift()) != wanted) return false;
        (*table)[i] = static_cast<uint8_t>(wanted);
    }
    return true;
}

bool fused_sum(const Grid& a, const Grid& b, const Grid& to, AddJob* job) {
    if (kIsArm) return integer_sum(a, b, to, job);
    job->is_fused = true;
    job->ratio_a = a.scale / to.scale;
    job->ratio_b = b.scale / to.scale;
    const std::vector<float> parts = fixed_parts(job->ratio_a, job->ratio_b, a, b, to);
    job->fixed = parts[0];
    job->shift_a = a.shift();
    job->shift_b = b.shift();
    job->shift_c = to.shift();
    return all_equal(parts) && in_range(job->ratio_a, job->ratio_b, job->fixed);
}

bool real_sum(const Grid& a, const Grid& b, const Grid& to, AddJob* job) {
    job->is_fused = false;
    job->scale_a = a.scale;
    job->scale_b = b.scale;
    job->scale_c = to.scale;
    job->zero_a = a.zero;
    job->zero_b = b.zero;
    job->zero_c = to.zero;
    return in_range(a.scale / to.scale, b.scale / to.scale, 0);
}

}  // namespace lowbit
