"""Resize images in compiled code, bit-identical to Pillow, computing only the pixels that are kept.

Pillow resizes the whole image row by row; its result is then cropped and converted from interleaved channels to planes.
Here the coefficients and rounding are the same (fixed point with 22 fractional bits, columns first), but pixels that
are cropped off are never computed, and planes are written directly. Without a C++ compiler, or with ``QKD_NATIVE=0``,
Pillow does the work.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from quantizers.native.building import loaded_library

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
FILTERS = {"bilinear": 0, "bicubic": 1}  # numbers of the source

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef uint8_t u8;

const int BITS = 22;  // after the point: eight for the value, two for sums that overshoot
const int32_t HALF = 1 << (BITS - 1);

static double weight_of(double x, bool is_cubic) {
    x = std::fabs(x);
    if (!is_cubic) return x < 1.0 ? 1.0 - x : 0.0;
    const double a = -0.5;  // Keys' cubic
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

// For some places of a resized side: which pixels they are made of, and by what weights.
struct Weights {
    std::vector<i64> first, count;
    std::vector<int32_t> values;
    i64 most;

    Weights(i64 size, i64 resized, i64 start, i64 end, bool is_cubic) : first(end - start), count(end - start) {
        const double scale = (double)size / (double)resized, wide = std::max(scale, 1.0);
        const double support = (is_cubic ? 2.0 : 1.0) * wide, inverse = 1.0 / wide;
        most = (i64)std::ceil(support) * 2 + 1;
        values.assign((end - start) * most, 0);
        std::vector<double> found(most);
        for (i64 place = start; place < end; ++place) {
            const double center = (place + 0.5) * scale;
            const i64 low = std::max<i64>((i64)(center - support + 0.5), 0);
            const i64 n = std::min<i64>((i64)(center + support + 0.5), size) - low;
            double total = 0.0;
            for (i64 i = 0; i < n; ++i) total += found[i] = weight_of((i + low - center + 0.5) * inverse, is_cubic);
            for (i64 i = 0; i < n; ++i) {
                const double share = (total != 0.0 ? found[i] / total : found[i]) * (1 << BITS);
                values[(place - start) * most + i] = (int32_t)(share < 0 ? share - 0.5 : share + 0.5);
            }
            first[place - start] = low;
            count[place - start] = n;
        }
    }
};

static inline u8 rounded(int32_t sum) {
    return (u8)std::min(std::max(sum >> BITS, 0), 255);
}

const i64 SIDE = 16;

// Weighted sums of 16 lanes, rounded.
static inline void sums_of(const u8* from, i64 step, const int32_t* k, i64 count, u8* to) {
#ifdef __AVX2__
    __m256i low = _mm256_set1_epi32(HALF), high = low;
    for (i64 i = 0; i < count; ++i, from += step) {
        const __m128i pixels = _mm_loadu_si128((const __m128i*)from);
        const __m256i weight = _mm256_set1_epi32(k[i]);
        low = _mm256_add_epi32(low, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(pixels), weight));
        high = _mm256_add_epi32(high, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(pixels, 8)), weight));
    }
    const __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(low, BITS), _mm256_srai_epi32(high, BITS));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);  // packing keeps halves apart
    _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(
        _mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
#else
    int32_t sums[SIDE];
    for (i64 lane = 0; lane < SIDE; ++lane) sums[lane] = HALF;
    for (i64 i = 0; i < count; ++i, from += step)
        for (i64 lane = 0; lane < SIDE; ++lane) sums[lane] += from[lane] * k[i];
    for (i64 lane = 0; lane < SIDE; ++lane) to[lane] = rounded(sums[lane]);
#endif
}

// Write rows of 16 by 16 bytes as columns.
static void turn(const u8* in, i64 in_step, u8* out, i64 out_step) {
#ifdef __SSE2__
    __m128i rows[SIDE], mixed[SIDE];
    for (int i = 0; i < SIDE; ++i) rows[i] = _mm_loadu_si128((const __m128i*)(in + i * in_step));
    for (int round = 0; round < 4; ++round) {  // four times each row with the eighth behind it, byte by byte
        for (int i = 0; i < SIDE / 2; ++i) {
            mixed[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + SIDE / 2]);
            mixed[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + SIDE / 2]);
        }
        for (int i = 0; i < SIDE; ++i) rows[i] = mixed[i];
    }
    for (int i = 0; i < SIDE; ++i) _mm_storeu_si128((__m128i*)(out + i * out_step), rows[i]);
#else
    for (i64 y = 0; y < SIDE; ++y)
        for (i64 x = 0; x < SIDE; ++x) out[x * out_step + y] = in[y * in_step + x];
#endif
}

// The needed columns of 16 rows at once, each in a lane: lines of `bytes` values become lines of planes.
struct RowsAtOnce {
    const Weights& columns;
    i64 C, first, bytes, values;  // first: column; bytes, values: of a row before and after
    std::vector<u8> in, out, padded;

    RowsAtOnce(const Weights& columns, i64 C)
        : columns(columns), C(C), first(columns.first[0]),
          bytes((columns.first.back() + columns.count.back() - columns.first[0]) * C),
          values((i64)columns.first.size() * C), in((bytes + SIDE) * SIDE), out((values + SIDE) * SIDE),
          padded(SIDE * (std::max(bytes, values) + SIDE)) {}

    void resize(const u8* image, i64 stride, i64 rows, u8* lines) {
        const u8* source = image + first * C;
        if (rows < SIDE || bytes < SIDE) {  // no byte is read that is not of the image
            for (i64 y = 0; y < rows; ++y) std::memcpy(padded.data() + y * (bytes + SIDE), source + y * stride, bytes);
            source = padded.data();
            stride = bytes + SIDE;
        }
        for (i64 x = 0; x < bytes; x += SIDE) {
            const i64 start = bytes < SIDE ? 0 : std::min(x, bytes - SIDE);
            turn(source + start, stride, in.data() + start * SIDE, SIDE);
        }
        all_lanes();
        u8* target = rows < SIDE || values < SIDE ? padded.data() : lines;
        const i64 step = target == lines ? values : values + SIDE;
        for (i64 x = 0; x < values; x += SIDE) {
            const i64 start = values < SIDE ? 0 : std::min(x, values - SIDE);
            turn(out.data() + start * SIDE, SIDE, target + start, step);
        }
        for (i64 y = 0; y < rows && target != lines; ++y) std::memcpy(lines + y * values, target + y * step, values);
    }

    void all_lanes() {
        const i64 n = (i64)columns.first.size();
        for (i64 x = 0; x < n; ++x) {
            const int32_t* k = columns.values.data() + x * columns.most;
            for (i64 c = 0; c < C; ++c) {
                const u8* from = in.data() + ((columns.first[x] - first) * C + c) * SIDE;
                sums_of(from, C * SIDE, k, columns.count[x], out.data() + (c * n + x) * SIDE);
            }
        }
    }
};

static void resize_columns(const u8* rows, i64 stride, i64 n, u8* out, const int32_t* k, i64 count) {
    const i64 block = 256;
    int32_t sums[block];
    for (i64 start = 0; start < n; start += block) {
        const i64 end = std::min(block, n - start);
        for (i64 x = 0; x < end; ++x) sums[x] = HALF;
        for (i64 i = 0; i < count; ++i) {
            const u8* row = rows + i * stride + start;
            const int32_t weight = k[i];
            for (i64 x = 0; x < end; ++x) sums[x] += row[x] * weight;
        }
        for (i64 x = 0; x < end; ++x) out[start + x] = rounded(sums[x]);
    }
}

// Resize to `wide` by `tall`, and write the window whose corner is (left, top) there; what is beyond is black.
extern "C" void qkd_resize(
    const u8* image, i64 height, i64 width, i64 stride, i64 C, i64 tall, i64 wide, i64 top, i64 left, u8* out,
    i64 out_height, i64 out_width, i64 is_cubic) {
    const i64 x0 = std::max<i64>(left, 0), x1 = std::min(left + out_width, wide), n = x1 - x0;
    const i64 y0 = std::max<i64>(top, 0), y1 = std::min(top + out_height, tall), m = y1 - y0;
    const i64 plane = out_height * out_width;
    if (n < out_width || m < out_height) std::memset(out, 0, C * plane);
    if (n <= 0 || m <= 0) return;
    const Weights columns(width, wide, x0, x1, is_cubic), rows(height, tall, y0, y1, is_cubic);
    const i64 first = rows.first[0], end = rows.first[m - 1] + rows.count[m - 1];
    std::vector<u8> middle((end - first) * C * n);
    RowsAtOnce worker(columns, C);
    for (i64 y = first; y < end; y += SIDE)
        worker.resize(image + y * stride, stride, std::min(SIDE, end - y), middle.data() + (y - first) * C * n);
    for (i64 y = 0; y < m; ++y)
        for (i64 c = 0; c < C; ++c) {
            u8* line = out + c * plane + (y0 - top + y) * out_width + (x0 - left);
            const u8* from = middle.data() + ((rows.first[y] - first) * C + c) * n;
            resize_columns(from, C * n, n, line, rows.values.data() + y * rows.most, rows.count[y]);
        }
}
"""


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """Return the compiled function, or None if there is no compiler or it is switched off."""
    library = loaded_library("resize", SOURCE, FLAGS, without="images are resized by Pillow, several times slower")
    return None if library is None else bound(library)


def bound(library: ctypes.CDLL) -> Any:
    """Return the function of a compiled library."""
    function, number = library.qkd_resize, ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, *[number] * 8, ctypes.c_void_p, *[number] * 3]
    function.restype = None
    return function


def resize_window(
    function: Any, image: npt.NDArray[np.uint8], size: tuple[int, int], corner: tuple[int, int], how: str, out: Tensor
) -> None:
    """Resize an image and write a window of the result to planes.

    Args:
        function: The result of `load`.
        image: Shape ``[height, width, channels]`` (1 or 3) or ``[height, width]``; rows may be strided.
        size: ``(width, height)`` to resize to.
        corner: Column and row of the window in the resized image; anything outside the image is black.
        how: Name of the filter, one of ``FILTERS``.
        out: The window, uint8, contiguous, shape ``[channels, height, width]``.
    """
    channels, height, width = out.shape
    function(
        image.ctypes.data, *image.shape[:2], image.strides[0], channels, size[1], size[0], corner[1], corner[0],
        out.data_ptr(), height, width, FILTERS[how],
    )  # fmt: skip
