// ONNX Runtime's single-precision arithmetic between convolutions, code by code, where both of its ways agree.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/kernels.h"

namespace lowbit {

// A grid of codes: real value = scale * (code - zero). Codes of int8 tensors are kept with 128 added.
struct Grid {
    float scale = 1;
    int zero = 0;
    bool is_signed = false;
    int shift() const { return is_signed ? 128 : 0; }
    bool operator==(const Grid& other) const {
        return scale == other.scale && zero == other.zero && is_signed == other.is_signed;
    }
};

#if defined(__aarch64__)
constexpr bool kIsArm = true;
#else
constexpr bool kIsArm = false;
#endif

// round_half_even(value / scale) + zero within 0..255, as QuantizeLinear.
int quantized(float value, const Grid& grid);
float dequantized(int code, const Grid& grid);

// QuantizeLinear of DequantizeLinear, for every code.
std::array<uint8_t, 256> requantize_table(const Grid& from, const Grid& to);

// QLinearAdd of a tensor and one constant code. Returns false where the compiler's choice of fused products, which is
// not ours, could change a code.
bool add_constant_table(const Grid& from, const Grid& constant, int code, bool is_first, const Grid& to,
                        std::array<uint8_t, 256>* table);

// The numbers of a sum. Returns false as above, or where they are out of range. On Arm the runtime fuses in integers.
bool fused_sum(const Grid& a, const Grid& b, const Grid& to, AddJob* job);
bool real_sum(const Grid& a, const Grid& b, const Grid& to, AddJob* job);

}  // namespace lowbit
