"""The C++ of augmentation: image by image, one operation after another, in Pillow's arithmetic."""

from __future__ import annotations

# No contraction into fused multiply-adds: roundings must be those of the batched engine, and of Pillow. Vector code for
# comparisons needs to know that nobody reads the floating-point flags; results do not depend on that.
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-trapping-math",
    "-fno-math-errno",
)  # fmt: skip

_POINTS = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef uint8_t u8;

// Every value replaced by its table's; `out` may be `in`.
static void look_up(const u8* in, u8* out, i64 n, const u8* table) {
    i64 i = 0;
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
    const __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
    const __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
    for (; i + 64 <= n; i += 64) {  // seven bits of the value choose among 128 entries, the eighth between halves
        const __m512i old = _mm512_loadu_si512(in + i);
        const __m512i low = _mm512_permutex2var_epi8(a, old, b), high = _mm512_permutex2var_epi8(c, old, d);
        _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(old), low, high));
    }
#elif defined(__AVX2__)
    __m256i parts[16];
    for (int k = 0; k < 16; ++k) parts[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table + k));
    for (; i + 32 <= n; i += 32) {  // the low half of the value chooses in 16 tables, the high one among these
        const __m256i old = _mm256_loadu_si256((const __m256i*)(in + i));
        const __m256i low = _mm256_and_si256(old, _mm256_set1_epi8(15));
        __m256i found[16];
        for (int k = 0; k < 16; ++k) found[k] = _mm256_shuffle_epi8(parts[k], low);
        for (int bit = 4, left = 8; bit < 8; ++bit, left /= 2) {
            const __m256i chooser = _mm256_slli_epi16(old, 7 - bit);  // this bit on top of its byte
            for (int k = 0; k < left; ++k) found[k] = _mm256_blendv_epi8(found[2 * k], found[2 * k + 1], chooser);
        }
        _mm256_storeu_si256((__m256i*)(out + i), found[0]);
    }
#endif
    for (; i + 8 <= n; i += 8) {  // eight values a load and a store
        uint64_t old, made = 0;
        std::memcpy(&old, in + i, 8);
        for (int k = 0; k < 64; k += 8) made |= (uint64_t)table[(old >> k) & 255] << k;
        std::memcpy(out + i, &made, 8);
    }
    for (; i < n; ++i) out[i] = table[in[i]];
}

// Truncation first and the bounds second: the same, for what is below 0 is not above it when truncated.
static inline u8 mixed(float x, float base, float factor) {
    float v = (x - base) * factor;
    int32_t whole = (int32_t)(v + base);
    return (u8)std::min(std::max(whole, 0), 255);
}

static void count(const u8* p, i64 n, i64* counts) {
    uint32_t parts[4][256] = {};  // four, so that runs of one value do not wait for each other
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t values;
        std::memcpy(&values, p + i, 8);
        for (int k = 0; k < 8; ++k) ++parts[k & 3][(values >> (8 * k)) & 255];
    }
    for (; i < n; ++i) ++parts[0][p[i]];
    for (int v = 0; v < 256; ++v) counts[v] = (i64)parts[0][v] + parts[1][v] + parts[2][v] + parts[3][v];
}

static void equalize(const u8* in, u8* out, i64 n) {
    i64 counts[256];
    count(in, n, counts);
    int last = 255;
    while (last > 0 && !counts[last]) --last;
    i64 step = (n - counts[last]) / 255;
    u8 table[256];
    i64 below = step / 2;
    for (int v = 0; v < 256; ++v) {
        table[v] = step ? (u8)std::min<i64>(below / step, 255) : (u8)v;
        below += counts[v];
    }
    look_up(in, out, n, table);
}

static void range_of(const u8* p, i64 n, u8* low, u8* high) {
    u8 least = 255, most = 0;
    for (i64 i = 0; i < n; ++i) { least = std::min(least, p[i]); most = std::max(most, p[i]); }
    *low = least;
    *high = most;
}

static void autocontrast(const u8* in, u8* out, i64 n) {
    u8 low, high;
    range_of(in, n, &low, &high);
    double scale = 255.0 / (double)(high - low), offset = -(double)low * scale;
    u8 table[256];
    for (int v = 0; v < 256; ++v) {
        double value = (double)v * scale;
        value = std::trunc(value + offset);
        table[v] = high <= low ? (u8)v : (u8)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
    look_up(in, out, n, table);
}

static inline uint32_t light_of(uint32_t red, uint32_t green, uint32_t blue) {
    return (red * 19595u + green * 38470u + blue * 7471u + 32768u) >> 16;
}

static inline u8 mean_of(const u8* p, i64 C, i64 n) {  // of the channels of one pixel
    i64 sum = 0;
    for (i64 c = 0; c < C; ++c) sum += p[c * n];
    return (u8)std::floor((float)sum / (float)C + 0.5f);
}

static i64 total_light(const u8* p, i64 C, i64 n) {
    i64 total = 0;
    for (i64 start = 0; start < n; start += 65536) {  // 32 bits hold the sum of so many
        const i64 end = std::min(n, start + 65536);
        uint32_t sum = 0;
        if (C == 3) for (i64 i = start; i < end; ++i) sum += light_of(p[i], p[n + i], p[2 * n + i]);
        else if (C == 1) for (i64 i = start; i < end; ++i) sum += p[i];
        else for (i64 i = start; i < end; ++i) sum += mean_of(p + i, C, n);
        total += sum;
    }
    return total;
}

static void contrast(const u8* in, u8* out, i64 C, i64 n, float factor) {
    float mean = (float)((2 * total_light(in, C, n) + n) / (2 * n));
    u8 table[256];
    for (int v = 0; v < 256; ++v) table[v] = mixed((float)v, mean, factor);
    look_up(in, out, C * n, table);
}

static void color(const u8* in, u8* out, i64 C, i64 n, float factor) {
    if (C == 3) {
        const u8 *red = in, *green = in + n, *blue = in + 2 * n;
        const i64 block = 256;  // its values are read before they are written: `out` may be `in`
        float light[block];
        for (i64 start = 0; start < n; start += block) {
            const i64 end = std::min(block, n - start);
            for (i64 i = 0; i < end; ++i)
                light[i] = (float)(int32_t)light_of(red[start + i], green[start + i], blue[start + i]);
            for (i64 c = 0; c < C; ++c)
#pragma GCC ivdep
                for (i64 i = 0; i < end; ++i)
                    out[c * n + start + i] = mixed((float)in[c * n + start + i], light[i], factor);
        }
        return;
    }
    for (i64 i = 0; i < n; ++i) {
        float light = C == 1 ? 0.0f : (float)mean_of(in + i, C, n);
        for (i64 c = 0; c < C; ++c) out[c * n + i] = C == 1 ? in[i] : mixed((float)in[c * n + i], light, factor);
    }
}

static void sharpness(const u8* __restrict in, u8* __restrict out, i64 C, i64 H, i64 W, float factor) {
    if (H < 3 || W < 3) { std::memcpy(out, in, C * H * W); return; }
    for (i64 c = 0; c < C; ++c) {
        const u8* plane = in + c * H * W;
        u8* made = out + c * H * W;
        // All pixels between two that have eight neighbors, as one line; those on the border are put back below.
        for (i64 i = W + 1; i < (H - 1) * W - 1; ++i) {
            const u8* p = plane + i;
            uint16_t total = (uint16_t)(
                p[-W - 1] + p[-W] + p[-W + 1] + p[-1] + 5 * p[0] + p[1] + p[W - 1] + p[W] + p[W + 1]);
            uint16_t mean = (uint16_t)(((total + 6u) * 5042u) >> 16);  // total / 13, rounded: exact below 6,553
            made[i] = mixed((float)p[0], (float)mean, factor);
        }
        std::memcpy(made, plane, W);
        std::memcpy(made + (H - 1) * W, plane + (H - 1) * W, W);
        for (i64 y = 1; y < H - 1; ++y) {
            made[y * W] = plane[y * W];
            made[y * W + W - 1] = plane[y * W + W - 1];
        }
    }
}
"""

_MOVES = r"""
static i64 floor_ratio(i64 a, i64 b) {  // b is positive
    return a / b - (a % b < 0);
}

// Narrow [first, end) to where 0 <= slope * x + start < limit.
static void narrow(i64 slope, i64 start, i64 limit, i64* first, i64* end) {
    if (slope == 0) {
        if (start < 0 || start >= limit) *end = *first;
        return;
    }
    i64 least = -start, most = limit - 1 - start;  // of slope * x
    if (slope < 0) { std::swap(least, most); least = -least; most = -most; slope = -slope; }
    *first = std::min(*end, std::max(*first, -floor_ratio(-least, slope)));
    *end = std::max(*first, std::min(*end, floor_ratio(most, slope) + 1));
}

// Source places of [first, end) of a line, as T: 32 bits do for sides up to 4,096.
template <typename T>
static void places_of(T* from, i64 first, i64 end, T W, T a, T cx, T d, T cy) {
    for (T x = (T)first; x < (T)end; ++x) from[x] = ((d * x + cy) >> 16) * W + ((a * x + cx) >> 16);
}

// Where runs of neighbors begin: places that do not follow the one before. Returns their number.
template <typename T>
static i64 runs_of(const T* from, i64 first, i64 end, u8* breaks, int32_t* starts) {
    i64 found = 0, x = first + 1;
    starts[found++] = (int32_t)first;
#ifdef __AVX512F__
    if (sizeof(T) == 4)
        for (; x + 16 <= end; x += 16) {
            const __m512i before = _mm512_loadu_si512(from + x - 1), now = _mm512_loadu_si512(from + x);
            const __mmask16 breaks = _mm512_cmpneq_epi32_mask(now, _mm512_add_epi32(before, _mm512_set1_epi32(1)));
            const __m512i places = _mm512_add_epi32(
                _mm512_set1_epi32((int32_t)x), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
            _mm512_storeu_si512(starts + found, _mm512_maskz_compress_epi32(breaks, places));
            found += __builtin_popcount(breaks);
        }
#endif
    for (i64 i = x; i < end; ++i) breaks[i] = from[i] != from[i - 1] + 1;
    for (; x < end; ++x) {  // without a branch that nobody could foresee
        starts[found] = (int32_t)x;
        found += breaks[x];
    }
    starts[found] = (int32_t)end;
    return found;
}

const i64 STRIDE = 16;  // bytes that a run is copied by: some more than it has, which the next one overwrites

// Copy the runs of a line in every channel, and up to STRIDE - 1 bytes behind them. `rest`: bytes behind the last
// channel's first pixel that may be read.
template <typename T>
static void copy_runs(
    const u8* in, u8* line, i64 C, i64 n, i64 line_step, i64 rest, const T* from, const int32_t* starts, i64 runs) {
    for (i64 r = 0; r < runs; ++r) {
        const i64 x = starts[r], count = starts[r + 1] - x, place = from[x];
        const u8* source = in + place;
        u8* target = line + x;
        if (place + count + STRIDE > rest) {
            for (i64 c = 0; c < C; ++c) std::memcpy(target + c * line_step, source + c * n, count);
        } else if (count <= STRIDE) {
            for (i64 c = 0; c < C; ++c) std::memcpy(target + c * line_step, source + c * n, STRIDE);
        } else {
            for (i64 c = 0; c < C; ++c)
                for (i64 i = 0; i < count; i += STRIDE)
                    std::memcpy(target + c * line_step + i, source + c * n + i, STRIDE);
        }
    }
}

// An affine map of 16 bits after the point: (x, y) comes from (m0 x + m1 y + m2, m3 x + m4 y + m5), rounded down.
// What is inside on a line is one piece of it; the rest takes the fill.
template <typename T>
static void affine(const u8* in, u8* out, i64 C, i64 H, i64 W, const i64* m, const u8* fill) {
    std::vector<T> from(W);
    std::vector<u8> breaks(W), last(C * (W + STRIDE));
    std::vector<int32_t> starts(W + 17);
    const i64 n = H * W;
    const bool shifts = m[0] == 65536 && m[3] == 0;  // a line of the result is a piece of a line
    const bool has_runs = std::abs(m[3]) + std::abs(m[0] - 65536) < 65536 / 3;  // of three pixels and more
    for (i64 y = 0; y < H; ++y) {
        i64 cx = m[1] * y + m[2], cy = m[4] * y + m[5], first = 0, end = W;
        narrow(m[0], cx, W << 16, &first, &end);
        narrow(m[3], cy, H << 16, &first, &end);
        u8* line = out + y * W;
        if (shifts) {
            const u8* source = in + (cy >> 16) * W + (cx >> 16) + first;
            for (i64 c = 0; c < C && first < end; ++c) std::memcpy(line + c * n + first, source + c * n, end - first);
        } else if (first < end) {
            places_of<T>(from.data(), first, end, (T)W, (T)m[0], (T)cx, (T)m[3], (T)cy);
            if (!has_runs) {
                for (i64 c = 0; c < C; ++c)
                    for (i64 x = first; x < end; ++x) line[c * n + x] = in[c * n + from[x]];
            } else {
                i64 runs = runs_of(from.data(), first, end, breaks.data(), starts.data());
                // What is too much is in later lines, which are written later. Where these have less than STRIDE pixels
                // it would be in another channel, in an image of another thread, or behind the buffer.
                const bool is_last = (H - 1 - y) * W < STRIDE;
                u8* target = is_last ? last.data() : line;
                copy_runs(in, target, C, n, is_last ? W + STRIDE : n, n, from.data(), starts.data(), runs);
                for (i64 c = 0; c < C && is_last; ++c)
                    std::memcpy(line + c * n + first, target + c * (W + STRIDE) + first, end - first);
            }
        }
        for (i64 c = 0; c < C; ++c) {
            std::memset(line + c * n, fill[c], first);
            std::memset(line + c * n + end, fill[c], W - end);
        }
    }
}

static void move(const u8* in, u8* out, i64 C, i64 H, i64 W, const i64* m, const u8* fill) {
    if (std::max(H, W) <= 4096) affine<int32_t>(in, out, C, H, W, m, fill);
    else affine<i64>(in, out, C, H, W, m, fill);
}

static void cut(u8* p, i64 C, i64 H, i64 W, const i64* box, const u8* fill) {
    i64 x0 = std::max<i64>(box[0], 0), x1 = std::min(box[1], W);
    i64 y0 = std::max<i64>(box[2], 0), y1 = std::min(box[3], H);
    if (x1 <= x0) return;
    for (i64 c = 0; c < C; ++c)
        for (i64 y = y0; y < y1; ++y) std::memset(p + (c * H + y) * W + x0, fill[c], x1 - x0);
}

static void copy_mirrored(const u8* in, u8* out, i64 n) {  // eight at a time, each turned around
    i64 i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t values;
        std::memcpy(&values, in + n - 8 - i, 8);
        values = __builtin_bswap64(values);
        std::memcpy(out + i, &values, 8);
    }
    for (; i < n; ++i) out[i] = in[n - 1 - i];
}

// The window is mirrored, so the image is, after the padding on its other side: column W - 1 - x of the window.
static void crop(const u8* in, u8* out, i64 C, i64 H, i64 W, const i64* window, const u8* fill) {
    i64 dx = window[0], dy = window[1], first = std::max<i64>(0, -dx), end = std::max(first, std::min(W, W - dx));
    for (i64 c = 0; c < C; ++c)
        for (i64 y = 0; y < H; ++y) {
            u8* line = out + (c * H + y) * W;
            i64 row = y + dy;
            if (row < 0 || row >= H || first >= W) { std::memset(line, fill[c], W); continue; }
            const u8* source = in + (c * H + row) * W + first + dx;
            i64 left = window[2] ? W - end : first;
            std::memset(line, fill[c], left);
            if (window[2]) copy_mirrored(source, line + left, end - first);
            else std::memcpy(line + left, source, end - first);
            std::memset(line + left + end - first, fill[c], W - left - (end - first));
        }
}
"""

_BATCH = r"""
struct Rounds {  // what is done to one image
    i64 count;
    const i64 *codes, *maps, *table_rows, *boxes;
    const float* factors;
    const u8* tables;
};

// Returns where the image is after its rounds: `image` itself where none did anything. One of both buffers is `out`.
static const u8* all_rounds(
    const u8* image, u8* now, u8* next, i64 C, i64 H, i64 W, const Rounds& rounds, const u8* fill) {
    const i64 n = H * W, size = C * n;
    const u8* from = image;  // or `now`, once something was done
    for (i64 r = 0; r < rounds.count; ++r) {
        const float factor = rounds.factors[r];
        switch (rounds.codes[r]) {
            case 0: continue;
            case 1: move(from, next, C, H, W, rounds.maps + 6 * r, fill); std::swap(now, next); break;
            case 2:
                if (from != now) std::memcpy(now, from, size);
                cut(now, C, H, W, rounds.boxes + 4 * r, fill);
                break;
            case 3: look_up(from, now, size, rounds.tables + 256 * rounds.table_rows[r]); break;
            case 4: for (i64 c = 0; c < C; ++c) equalize(from + c * n, now + c * n, n); break;
            case 5: for (i64 c = 0; c < C; ++c) autocontrast(from + c * n, now + c * n, n); break;
            case 6: contrast(from, now, C, n, factor); break;
            case 7: color(from, now, C, n, factor); break;
            case 8: sharpness(from, next, C, H, W, factor); std::swap(now, next); break;
        }
        from = now;
    }
    return from;
}

extern "C" void qkd_augment(
    const u8* images, u8* result, i64 batch, i64 C, i64 H, i64 W, i64 rounds, const i64* codes, const i64* maps,
    const float* factors, const u8* tables, const i64* table_rows, const i64* boxes, const i64* windows,
    const u8* fill, i64 has_window, i64 has_cut, i64 threads) {
    const i64 size = C * H * W;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)threads) if (threads > 1 && batch > 1)
#endif
    {
        std::vector<u8> first(size), second(has_window ? size : 0);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 4)
#endif
        for (i64 b = 0; b < batch; ++b) {
            const i64 at = b * rounds, *box = boxes + 4 * b * (rounds + 1);
            u8 *out = result + b * size, *now = has_window ? second.data() : out, *next = first.data();
            i64 swaps = 0;
            for (i64 r = 0; r < rounds; ++r) swaps += codes[at + r] == 1 || codes[at + r] == 8;
            if (swaps % 2) std::swap(now, next);  // so that the last one writes to where the image is wanted
            const Rounds own = {rounds, codes + at, maps + 6 * at, table_rows + at, box, factors + at, tables};
            const u8* done = all_rounds(images + b * size, now, next, C, H, W, own, fill);
            if (has_window) crop(done, out, C, H, W, windows + 3 * b, fill);
            else if (done != out) std::memcpy(out, done, size);
            if (has_cut) cut(out, C, H, W, box + 4 * rounds, fill);
        }
    }
}
"""

SOURCE = _POINTS + _MOVES + _BATCH
