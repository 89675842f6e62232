"""The engine's work on a CPU as one compiled function: image by image, its operations one after the other.

On a CPU an image of 32x32 fits into the innermost cache, and what a batched engine pays is the number of its calls. So
where a C++ compiler is at hand, this source is compiled once a machine (into the user's cache folder) and called once a
batch; without one the batched engine does the same work, with the same bits. ``QKD_NATIVE=0`` switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkd.agents.operations.counting import IntArray
from quantizers.native.building import cached_library, cpp_compiler

NOTHING, AFFINE, CUT, TABLE, EQUALIZE, AUTOCONTRAST, CONTRAST, COLOR, SHARPNESS = range(9)  # codes of the source
# No contraction into fused multiply-adds: roundings must be those of the batched engine, and of Pillow.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

typedef int64_t i64;
typedef uint8_t u8;

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))  // chosen when the library is loaded
#else
#define WIDE
#endif

static void look_up(u8* p, i64 n, const u8* table) {
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {  // eight values a load and a store
        uint64_t old, made = 0;
        std::memcpy(&old, p + i, 8);
        for (int k = 0; k < 64; k += 8) made |= (uint64_t)table[(old >> k) & 255] << k;
        std::memcpy(p + i, &made, 8);
    }
    for (; i < n; ++i) p[i] = table[p[i]];
}

static inline u8 mixed(float x, float base, float factor) {
    float v = (x - base) * factor;
    v = v + base;
    v = v < 0.0f ? 0.0f : v;
    v = v > 255.0f ? 255.0f : v;
    return (u8)(int)v;
}

// Source places of a line, as T: 32 bits do for sides up to 4,096. A place outside is 0, and marked.
template <typename T>
static inline void places_of(T* from, u8* outside, T W, T H, T a, T cx, T d, T cy) {
    for (T x = 0; x < W; ++x) {
        T column = (a * x + cx) >> 16, row = (d * x + cy) >> 16;
        bool is_out = (column | row | (W - 1 - column) | (H - 1 - row)) < 0;
        from[x] = is_out ? 0 : row * W + column;
        outside[x] = is_out ? 255 : 0;
    }
}

WIDE static void short_places(int32_t* from, u8* outside, i64 W, i64 H, i64 a, i64 cx, i64 d, i64 cy) {
    places_of<int32_t>(from, outside, (int32_t)W, (int32_t)H, (int32_t)a, (int32_t)cx, (int32_t)d, (int32_t)cy);
}

static void long_places(i64* from, u8* outside, i64 W, i64 H, i64 a, i64 cx, i64 d, i64 cy) {
    places_of<i64>(from, outside, W, H, a, cx, d, cy);
}

template <typename T>
static void affine(const u8* in, u8* out, i64 C, i64 H, i64 W, const i64* m, const u8* fill,
                   void (*places)(T*, u8*, i64, i64, i64, i64, i64, i64)) {
    std::vector<T> from(W);
    std::vector<u8> outside(W);
    for (i64 y = 0; y < H; ++y) {
        places(from.data(), outside.data(), W, H, m[0], m[1] * y + m[2], m[3], m[4] * y + m[5]);
        for (i64 c = 0; c < C; ++c) {
            const u8* plane = in + c * H * W;
            u8* line = out + (c * H + y) * W;
            for (i64 x = 0; x < W; ++x) line[x] = plane[from[x]];
            for (i64 x = 0; x < W; ++x) line[x] = (line[x] & ~outside[x]) | (fill[c] & outside[x]);
        }
    }
}

static void move(const u8* in, u8* out, i64 C, i64 H, i64 W, const i64* m, const u8* fill) {
    if (std::max(H, W) <= 4096) affine<int32_t>(in, out, C, H, W, m, fill, short_places);
    else affine<i64>(in, out, C, H, W, m, fill, long_places);
}

static void cut(u8* p, i64 C, i64 H, i64 W, const i64* box, const u8* fill) {
    i64 x0 = std::max<i64>(box[0], 0), x1 = std::min(box[1], W);
    i64 y0 = std::max<i64>(box[2], 0), y1 = std::min(box[3], H);
    if (x1 <= x0) return;
    for (i64 c = 0; c < C; ++c)
        for (i64 y = y0; y < y1; ++y) std::memset(p + (c * H + y) * W + x0, fill[c], x1 - x0);
}

static void count(const u8* p, i64 n, i64* counts) {
    i64 parts[4][256] = {};  // four, so that runs of one value do not wait for each other
    i64 i = 0;
    for (; i + 4 <= n; i += 4) { ++parts[0][p[i]]; ++parts[1][p[i + 1]]; ++parts[2][p[i + 2]]; ++parts[3][p[i + 3]]; }
    for (; i < n; ++i) ++parts[0][p[i]];
    for (int v = 0; v < 256; ++v) counts[v] = parts[0][v] + parts[1][v] + parts[2][v] + parts[3][v];
}

static void equalize(u8* p, i64 n) {
    i64 counts[256];
    count(p, n, counts);
    int last = 255;
    while (last > 0 && !counts[last]) --last;
    i64 step = (n - counts[last]) / 255;
    if (!step) return;
    u8 table[256];
    i64 below = step / 2;
    for (int v = 0; v < 256; ++v) { table[v] = (u8)std::min<i64>(below / step, 255); below += counts[v]; }
    look_up(p, n, table);
}

WIDE static void range_of(const u8* p, i64 n, u8* low, u8* high) {
    u8 least = 255, most = 0;
    for (i64 i = 0; i < n; ++i) { least = std::min(least, p[i]); most = std::max(most, p[i]); }
    *low = least;
    *high = most;
}

static void autocontrast(u8* p, i64 n) {
    u8 low, high;
    range_of(p, n, &low, &high);
    if (high <= low) return;
    double scale = 255.0 / (double)(high - low), offset = -(double)low * scale;
    u8 table[256];
    for (int v = 0; v < 256; ++v) {
        double value = (double)v * scale;
        value = std::trunc(value + offset);
        table[v] = (u8)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
    look_up(p, n, table);
}

WIDE static void light_of(const u8* p, i64 C, i64 n, u8* light) {
    if (C == 1) { std::memcpy(light, p, n); return; }
    if (C == 3) {
        for (i64 i = 0; i < n; ++i)
            light[i] = (u8)((p[i] * 19595u + p[n + i] * 38470u + p[2 * n + i] * 7471u + 32768u) >> 16);
        return;
    }
    for (i64 i = 0; i < n; ++i) {
        i64 sum = 0;
        for (i64 c = 0; c < C; ++c) sum += p[c * n + i];
        light[i] = (u8)std::floor((float)sum / (float)C + 0.5f);
    }
}

static void contrast(u8* p, i64 C, i64 n, float factor, u8* light) {
    light_of(p, C, n, light);
    i64 sum = 0;
    for (i64 i = 0; i < n; ++i) sum += light[i];
    float mean = (float)((2 * sum + n) / (2 * n));
    u8 table[256];
    for (int v = 0; v < 256; ++v) table[v] = mixed((float)v, mean, factor);
    look_up(p, C * n, table);
}

WIDE static void color(u8* __restrict p, i64 C, i64 n, float factor, u8* __restrict light) {
    if (C == 1) return;
    light_of(p, C, n, light);
    for (i64 c = 0; c < C; ++c)
        for (i64 i = 0; i < n; ++i) p[c * n + i] = mixed((float)p[c * n + i], (float)light[i], factor);
}

WIDE static void sharpness(const u8* __restrict in, u8* __restrict out, i64 C, i64 H, i64 W, float factor) {
    std::memcpy(out, in, C * H * W);
    if (H < 3 || W < 3) return;
    std::vector<uint16_t> sums(W), totals(W);
    uint16_t *__restrict columns = sums.data(), *__restrict total = totals.data();
    for (i64 c = 0; c < C; ++c)
        for (i64 y = 1; y < H - 1; ++y) {
            const u8* p = in + (c * H + y) * W;
            u8* line = out + (c * H + y) * W;
            for (i64 x = 0; x < W; ++x) columns[x] = (uint16_t)(p[x - W] + p[x] + p[x + W]);
            for (i64 x = 1; x < W - 1; ++x)
                total[x] = (uint16_t)(columns[x - 1] + columns[x] + columns[x + 1] + 4 * p[x]);
            for (i64 x = 1; x < W - 1; ++x)  // rounded division by 13: no ties, for 13 is odd
                line[x] = mixed((float)p[x], (float)((2 * total[x] + 13) * 80660 >> 21), factor);
        }
}

static void crop(const u8* in, u8* out, i64 C, i64 H, i64 W, const i64* window, const u8* fill) {
    i64 dx = window[0], dy = window[1];
    for (i64 c = 0; c < C; ++c)
        for (i64 y = 0; y < H; ++y) {
            u8* line = out + (c * H + y) * W;
            i64 row = y + dy;
            std::memset(line, fill[c], W);
            if (row < 0 || row >= H) continue;
            const u8* source = in + (c * H + row) * W;
            i64 first = std::max<i64>(0, -dx), end = std::min(W, W - dx);
            if (end > first) std::memcpy(line + first, source + first + dx, end - first);
        }
    if (!window[2]) return;
    // The window is mirrored, so the image is, after the padding on its other side: column W - 1 - x of the window.
    for (i64 line = 0; line < C * H; ++line) std::reverse(out + line * W, out + (line + 1) * W);
}

extern "C" void qkd_augment(
    const u8* images, u8* result, i64 batch, i64 C, i64 H, i64 W, i64 rounds, const i64* codes, const i64* maps,
    const float* factors, const u8* tables, const i64* table_rows, const i64* boxes, const i64* windows,
    const u8* fill, i64 has_window, i64 has_cut) {
    i64 n = H * W, size = C * n;
    std::vector<u8> first(has_window ? size : 0), second(size), light(n);
    for (i64 b = 0; b < batch; ++b) {
        const u8* image = images + b * size;
        u8* out = result + b * size;
        u8 *now = has_window ? first.data() : out, *next = second.data();
        bool is_read = false;  // whether the image is in `now`
        for (i64 r = 0; r < rounds; ++r) {
            i64 at = b * rounds + r;
            if (codes[at] != 0 && codes[at] != 1 && !is_read) { std::memcpy(now, image, size); is_read = true; }
            switch (codes[at]) {
                case 1:
                    move(is_read ? now : image, next, C, H, W, maps + 6 * at, fill);
                    std::swap(now, next);
                    is_read = true;
                    break;
                case 2: cut(now, C, H, W, boxes + 4 * (b * (rounds + 1) + r), fill); break;
                case 3: look_up(now, size, tables + 256 * table_rows[at]); break;
                case 4: for (i64 c = 0; c < C; ++c) equalize(now + c * n, n); break;
                case 5: for (i64 c = 0; c < C; ++c) autocontrast(now + c * n, n); break;
                case 6: contrast(now, C, n, factors[at], light.data()); break;
                case 7: color(now, C, n, factors[at], light.data()); break;
                case 8: sharpness(now, next, C, H, W, factors[at]); std::swap(now, next); break;
            }
        }
        const u8* done = is_read ? now : image;
        if (has_window) crop(done, out, C, H, W, windows + 3 * b, fill);
        else if (done != out) std::memcpy(out, done, size);
        if (has_cut) cut(out, C, H, W, boxes + 4 * (b * (rounds + 1) + rounds), fill);
    }
}
"""

logger = logging.getLogger(__name__)


def run(
    images: Tensor,
    fill: Tensor,
    codes: IntArray,
    maps: IntArray,
    factors: npt.NDArray[np.float32],
    tables: Tensor,
    table_rows: IntArray,
    boxes: IntArray,
    windows: IntArray | None,
    *,
    has_cut: bool,
) -> Tensor:
    """Return augmented images; `load` must have given a function.

    Args:
        images: uint8 on the CPU, shape ``[batch, channels, height, width]``.
        fill: uint8, shape ``[channels]``.
        codes: What each round does, shape ``[batch, rounds]``.
        maps: Fixed-point affine maps, shape ``[batch, rounds, 6]``.
        factors: Of the enhancing operations, shape ``[batch, rounds]``.
        tables: uint8, shape ``[n, 256]``.
        table_rows: Positions in ``tables``, shape ``[batch, rounds]``.
        boxes: Squares ``(x0, x1, y0, y1)`` to cut out, the last one at the very end, shape ``[batch, rounds + 1, 4]``.
        windows: ``(x, y, is_flipped)`` of the final crop, shape ``[batch, 3]``; None: no crop, no flip.
        has_cut: Whether the last box of each image is cut.
    """
    function = load()
    if function is None:
        raise RuntimeError("the compiled engine is not available")
    source = images.contiguous()
    result = torch.empty_like(source)
    batch, channels, height, width = source.shape
    arrays: Sequence[Any] = (codes, maps, factors, table_rows, boxes, windows if windows is not None else codes)
    codes, maps, factors, table_rows, boxes, window = (np.ascontiguousarray(one) for one in arrays)
    function(
        source.data_ptr(), result.data_ptr(), batch, channels, height, width, codes.shape[1], codes.ctypes.data,
        maps.ctypes.data, factors.ctypes.data, tables.data_ptr(), table_rows.ctypes.data, boxes.ctypes.data,
        window.ctypes.data, fill.data_ptr(), int(windows is not None), int(has_cut),
    )  # fmt: skip
    return result


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """Return the compiled function, or None where there is no compiler or it is switched off; says so once."""
    if os.environ.get("QKD_NATIVE") == "0":
        return None
    compiler = cpp_compiler()
    if compiler is None:
        logger.info("no C++ compiler: augmentation on the CPU is several times slower; g++ or clang++ would do")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("augmentation was not compiled (%s): it is several times slower on the CPU", error)
        return None
    function = library.qkd_augment
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, *[number] * 5, *[pointer] * 8, number, number]
    function.restype = None
    return function


def _compiled(compiler: str) -> Path:
    """Return the library, compiled now if it is not in the cache."""
    words = "\n".join((SOURCE, *FLAGS, compiler, platform.machine(), platform.system()))

    def make(folder: Path) -> Path:
        source, library = folder / "augment.cpp", folder / "unfinished.so"
        source.write_text(SOURCE, encoding="utf-8")
        subprocess.run(
            [compiler, *FLAGS, str(source), "-o", str(library)], check=True, capture_output=True, timeout=120
        )
        return library

    return cached_library(f"augment-{hashlib.sha256(words.encode()).hexdigest()[:20]}.so", make)
