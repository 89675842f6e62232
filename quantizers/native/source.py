"""The C++ of fake quantization: one forward and one backward pass, in the arithmetic of the PyTorch functions."""

from __future__ import annotations

from quantizers.native.building import WIDE, is_x86

# No contraction into fused multiply-adds: it must round like PyTorch's separate operations. Vector code for
# comparisons and rounding needs to know that nobody reads the floating-point flags; results do not depend on that.
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-trapping-math",
    "-fno-math-errno", *([WIDE] if is_x86() else []),
)  # fmt: skip

BLOCK = 1024  # terms of a step size's gradient that are summed as one tree

SOURCE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>

typedef int64_t i64;

const i64 BLOCK = 1024;
const i64 CHUNK = 32 * BLOCK;  // fewer values are not worth a second thread

struct bf16 { uint16_t bits; };

static inline float wide(float x) { return x; }

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline void narrow(float x, float* to) { *to = x; }

static inline void narrow(float x, bf16* to) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = (uint16_t)(x != x ? 0x7fc0u : rounded);
}

static inline float clipped(float v, float low, float high) {  // a NaN passes, as in torch.clamp
    v = v < low ? low : v;
    return v > high ? high : v;
}

template <typename T>
static void quantize(const T* x, T* out, i64 n, float scale, float low, float high) {
    for (i64 i = 0; i < n; ++i) narrow(clipped(rintf(wide(x[i]) / scale), low, high) * scale, out + i);
}

// Halves added to halves: the order of a sum depends on nothing but the place of its terms.
static float tree(float* terms) {
    for (i64 half = BLOCK / 2; half >= 1; half /= 2)
        for (i64 i = 0; i < half; ++i) terms[i] = terms[i] + terms[i + half];
    return terms[0];
}

// One block in float32; `grad_x` may be `grad`. Its loops are of one width each, which is what compilers vectorize.
template <bool RESIDUAL>
static float wide_block(const float* grad, const float* x, float* grad_x, i64 n, float scale, float low, float high) {
    float terms[BLOCK];
    for (i64 i = 0; i < n; ++i) {
        float v = x[i] / scale, g = grad[i];
        bool inside = (v > low) & (v < high);
        float end = clipped(v, low, high);
        float slope = RESIDUAL ? (inside ? rintf(v) - v : end) : end;
        terms[i] = (RESIDUAL ? g : inside ? 0.0f : g) * slope;
        grad_x[i] = inside ? g : 0.0f;
    }
    for (i64 i = n; i < BLOCK; ++i) terms[i] = 0.0f;
    return tree(terms);
}

template <bool RESIDUAL>
static float block(const float* grad, const float* x, float* grad_x, i64 n, float scale, float low, float high) {
    return wide_block<RESIDUAL>(grad, x, grad_x, n, scale, low, high);
}

template <bool RESIDUAL>
static float block(const bf16* grad, const bf16* x, bf16* grad_x, i64 n, float scale, float low, float high) {
    float g[BLOCK], v[BLOCK];
    for (i64 i = 0; i < n; ++i) g[i] = wide(grad[i]);
    for (i64 i = 0; i < n; ++i) v[i] = wide(x[i]);
    float sum = wide_block<RESIDUAL>(g, v, g, n, scale, low, high);
    for (i64 i = 0; i < n; ++i) narrow(g[i], grad_x + i);  // exact: they were narrow, or are zero
    return sum;
}

static float all_blocks(float* sums, i64 blocks) {  // `sums` has room for the next power of two
    i64 size = 1;
    while (size < blocks) size *= 2;
    for (i64 i = blocks; i < size; ++i) sums[i] = 0.0f;
    for (i64 half = size / 2; half >= 1; half /= 2)
        for (i64 i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    return blocks ? sums[0] : 0.0f;
}

template <typename T, bool RESIDUAL>
static float gradients(const T* grad, const T* x, T* grad_x, i64 n, float scale, float low, float high, float* sums,
                       i64 threads) {
    i64 blocks = (n + BLOCK - 1) / BLOCK;
    #pragma omp parallel for num_threads((int)threads) if (threads > 1 && n > CHUNK)
    for (i64 b = 0; b < blocks; ++b) {
        i64 at = b * BLOCK, size = n - at < BLOCK ? n - at : BLOCK;
        sums[b] = block<RESIDUAL>(grad + at, x + at, grad_x + at, size, scale, low, high);
    }
    return all_blocks(sums, blocks);
}

template <typename T>
static void forward(const T* x, T* out, i64 n, float scale, float low, float high, i64 threads) {
    i64 chunks = (n + CHUNK - 1) / CHUNK;
    #pragma omp parallel for num_threads((int)threads) if (threads > 1 && chunks > 1)
    for (i64 c = 0; c < chunks; ++c) {
        i64 at = c * CHUNK, size = n - at < CHUNK ? n - at : CHUNK;
        quantize(x + at, out + at, size, scale, low, high);
    }
}

extern "C" void qkd_quantize(const void* x, void* out, i64 n, const float* scale, const float* low, const float* high,
                             i64 is_half, i64 threads) {
    if (is_half) forward((const bf16*)x, (bf16*)out, n, *scale, *low, *high, threads);
    else forward((const float*)x, (float*)out, n, *scale, *low, *high, threads);
}

extern "C" void qkd_gradients(const void* grad, const void* x, void* grad_x, i64 n, const float* scale,
                              const float* low, const float* high, float* sums, float* total, i64 is_half,
                              i64 residual, i64 threads) {
    const bf16 *g = (const bf16*)grad, *v = (const bf16*)x;
    const float *gf = (const float*)grad, *vf = (const float*)x;
    float s = *scale, l = *low, h = *high;
    if (is_half)
        *total = residual ? gradients<bf16, true>(g, v, (bf16*)grad_x, n, s, l, h, sums, threads)
                          : gradients<bf16, false>(g, v, (bf16*)grad_x, n, s, l, h, sums, threads);
    else
        *total = residual ? gradients<float, true>(gf, vf, (float*)grad_x, n, s, l, h, sums, threads)
                          : gradients<float, false>(gf, vf, (float*)grad_x, n, s, l, h, sums, threads);
}

template <typename T>
static i64 codes(const T* x, uint8_t* out, i64 n, float scale, i64 threads) {
    i64 chunks = (n + CHUNK - 1) / CHUNK, nans = 0;
    #pragma omp parallel for num_threads((int)threads) if (threads > 1 && chunks > 1) reduction(+ : nans)
    for (i64 c = 0; c < chunks; ++c) {
        i64 end = n < (c + 1) * CHUNK ? n : (c + 1) * CHUNK;
        int32_t found = 0;
        for (i64 i = c * CHUNK; i < end; ++i) {
            float code = rintf(wide(x[i]) / scale);
            found |= code != code;
            out[i] = (uint8_t)(int32_t)code;
        }
        nans += found;
    }
    return nans;
}

// Returns 0, or something else if a value is NaN, which has no code.
extern "C" i64 qkd_codes(const void* x, void* out, i64 n, const float* scale, i64 is_half, i64 threads) {
    return is_half ? codes((const bf16*)x, (uint8_t*)out, n, *scale, threads)
                   : codes((const float*)x, (uint8_t*)out, n, *scale, threads);
}

extern "C" void qkd_quantize_rows(const float* x, float* out, i64 rows, i64 n, const float* scales, const float* low,
                                  const float* high) {
    for (i64 r = 0; r < rows; ++r) quantize(x + r * n, out + r * n, n, scales[r], *low, *high);
}

extern "C" void qkd_gradients_rows(const float* grad, const float* x, float* grad_x, i64 rows, i64 n,
                                   const float* scales, const float* low, const float* high, float* sums,
                                   float* totals) {
    for (i64 r = 0; r < rows; ++r)
        totals[r] = gradients<float, true>(grad + r * n, x + r * n, grad_x + r * n, n, scales[r], *low, *high, sums, 1);
}
"""
