// Planes [channels][positions] to positions [positions][stride] and back, 16 x 16 bytes at a time; files of vectors include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/rows.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <emmintrin.h>
#endif

namespace lowbit {
namespace {

#if defined(__aarch64__)
using Line = uint8x16_t;
INLINE Line same_bytes(uint8_t byte) { return vdupq_n_u8(byte); }
INLINE Line load_line(const uint8_t* from, Line flip) { return veorq_u8(vld1q_u8(from), flip); }
INLINE void store_line(uint8_t* to, Line line) { vst1q_u8(to, line); }
INLINE Line lower_pairs(Line a, Line b) { return vzip1q_u8(a, b); }
INLINE Line upper_pairs(Line a, Line b) { return vzip2q_u8(a, b); }
#else
using Line = __m128i;
INLINE Line same_bytes(uint8_t byte) { return _mm_set1_epi8(static_cast<char>(byte)); }
INLINE Line load_line(const uint8_t* from, Line flip) {
    return _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), flip);
}
INLINE void store_line(uint8_t* to, Line line) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), line); }
INLINE Line lower_pairs(Line a, Line b) { return _mm_unpacklo_epi8(a, b); }
INLINE Line upper_pairs(Line a, Line b) { return _mm_unpackhi_epi8(a, b); }
#endif

// Four rounds of interleaving rows i and i + 8 transpose a square of 16 bytes.
INLINE void transpose_square(const uint8_t* from, size_t from_row, uint8_t* to, size_t to_row, Line flip) {
    Line rows[16], mixed[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = load_line(from + i * from_row, flip);
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            mixed[2 * i] = lower_pairs(rows[i], rows[i + 8]);
            mixed[2 * i + 1] = upper_pairs(rows[i], rows[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) rows[i] = mixed[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store_line(to + i * to_row, rows[i]);
}

// to[c][r] = from[r][c] ^ flip for rows [r0, r1) and columns [c0, c1); squares at the end overlap their neighbors.
INLINE void transpose_part(const uint8_t* from, size_t from_row, uint8_t* to, size_t to_row, uint8_t flip,
                                  size_t r0, size_t r1, size_t c0, size_t c1) {
    if (r1 - r0 < 16 || c1 - c0 < 16) {
        for (size_t r = r0; r < r1; ++r)
            for (size_t c = c0; c < c1; ++c) to[c * to_row + r] = static_cast<uint8_t>(from[r * from_row + c] ^ flip);
        return;
    }
    const Line flips = same_bytes(flip);
    for (size_t r = r0; r < r1; r += 16)
        for (size_t c = c0; c < c1; c += 16) {
            const size_t row = r + 16 > r1 ? r1 - 16 : r, column = c + 16 > c1 ? c1 - 16 : c;
            transpose_square(from + row * from_row + column, from_row, to + column * to_row + row, to_row, flips);
        }
}

[[maybe_unused]] void transpose_in(const uint8_t* planes, int channels, size_t positions, uint8_t* out, size_t stride, uint8_t flip,
                  size_t first, size_t last) {
    if (first < last) transpose_part(planes, positions, out, stride, flip, 0, channels, first, last);
}

[[maybe_unused]] void transpose_out(const uint8_t* codes, size_t stride, int channels, size_t positions, uint8_t* planes, uint8_t flip,
                   int first_channel, int last_channel) {
    (void)channels;
    if (first_channel < last_channel)
        transpose_part(codes, stride, planes, positions, flip, 0, positions, first_channel, last_channel);
}

}  // namespace
}  // namespace lowbit
