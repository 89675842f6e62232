"""The C++ of batch norm in training and the grid after it, for rows of channels (channels_last)."""

from __future__ import annotations

# A tensor is one row of values, channels fastest. Sums over each channel are taken in lanes: value i of a part of the
# row goes to lane i % width, in the order of the row; lanes of a channel are then added in float64, in order. A
# part is an integer multiple of channels, lanes and blocks, so neither threads nor vector widths change a bit.
NORM_SOURCE = r"""
template <typename T>
static inline float rounded(float x) { return x; }

template <>
inline float rounded<bf16>(float x) {
    bf16 narrowed;
    narrow(x, &narrowed);
    return wide(narrowed);
}

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

// Lanes of all parts -> sums of channels.
static void channel_sums(const float* lanes, i64 parts, i64 width, i64 channels, double* sums) {
    for (i64 c = 0; c < channels; ++c) sums[c] = 0.0;
    for (i64 at = 0; at < parts * width; at += channels)
        for (i64 c = 0; c < channels; ++c) sums[c] += lanes[at + c];
}

template <typename T, bool SQUARED>
static void add_up(const T* __restrict__ x, i64 n, i64 part, i64 width, const float* mean, float* lanes, i64 threads) {
    i64 parts = (n + part - 1) / part;
    #pragma omp parallel for num_threads((int)threads) if (threads > 1 && n > CHUNK)
    for (i64 p = 0; p < parts; ++p) {
        float* __restrict__ own = lanes + p * width;
        for (i64 j = 0; j < width; ++j) own[j] = 0.0f;
        for (i64 at = p * part, end = least(n, at + part); at < end; at += width) {
            const T* __restrict__ v = x + at;
            i64 size = least(width, end - at);
            if (SQUARED)
                for (i64 j = 0; j < size; ++j) { float d = wide(v[j]) - mean[j]; own[j] += d * d; }
            else
                for (i64 j = 0; j < size; ++j) own[j] += wide(v[j]);
        }
    }
}

template <typename T>
static void statistics(const T* x, i64 n, i64 channels, i64 part, i64 width, float* mean, float* lanes, double* sums,
                       double* squares, i64 threads) {
    i64 parts = (n + part - 1) / part;
    add_up<T, false>(x, n, part, width, mean, lanes, threads);
    channel_sums(lanes, parts, width, channels, sums);
    for (i64 j = 0; j < width; ++j) mean[j] = (float)(sums[j % channels] / (double)(n / channels));
    add_up<T, true>(x, n, part, width, mean, lanes, threads);
    channel_sums(lanes, parts, width, channels, squares);
}

// `factor`, `shift`: one for each lane.
template <typename T, bool ON_GRID>
static void normalize(const T* x, T* out, i64 n, i64 part, i64 width, const float* __restrict__ factor,
                      const float* __restrict__ shift, float scale, float low, float high, i64 threads) {
    i64 parts = (n + part - 1) / part;
    #pragma omp parallel for num_threads((int)threads) if (threads > 1 && n > CHUNK)
    for (i64 p = 0; p < parts; ++p)
        for (i64 at = p * part, end = least(n, at + part); at < end; at += width) {
            const T* __restrict__ v = x + at;
            T* __restrict__ to = out + at;
            i64 size = least(width, end - at);
            for (i64 j = 0; j < size; ++j) {
                float z = wide(v[j]) * factor[j] + shift[j];
                if (ON_GRID) z = clipped(rintf(rounded<T>(z) / scale), low, high) * scale;
                narrow(z, to + j);
            }
        }
}

// One block of a step size's terms: gradients behind the grid, and what each lane adds up. `place`: of its first value.
template <typename T, bool ON_GRID, bool RESIDUAL>
static float norm_block(const T* grad, const T* x, T* inner, i64 n, i64 place, i64 width, const float* mean,
                        const float* factor, const float* shift, float scale, float low, float high, float* offsets,
                        float* slopes) {
    float terms[BLOCK], kept[BLOCK];
    for (i64 at = 0; at < n;) {
        i64 size = least(width - place, n - at);
        const float *__restrict__ m = mean + place, *__restrict__ f = factor + place, *__restrict__ s = shift + place;
        float *__restrict__ by_offset = offsets + place, *__restrict__ by_slope = slopes + place;
        const T *__restrict__ v = x + at, *__restrict__ g = grad + at;
        if (ON_GRID)
            for (i64 j = 0; j < size; ++j) {
                float u = rounded<T>(wide(v[j]) * f[j] + s[j]) / scale, w = wide(g[j]);
                bool inside = (u > low) & (u < high);
                float end = clipped(u, low, high);
                float slope = RESIDUAL ? (inside ? rintf(u) - u : end) : end;
                terms[at + j] = (RESIDUAL ? w : inside ? 0.0f : w) * slope;
                kept[at + j] = inside ? w : 0.0f;
            }
        else
            for (i64 j = 0; j < size; ++j) kept[at + j] = wide(g[j]);
        for (i64 j = 0; j < size; ++j) by_offset[j] += kept[at + j];
        for (i64 j = 0; j < size; ++j) by_slope[j] += kept[at + j] * (wide(v[j]) - m[j]);
        at += size;
        place = place + size == width ? 0 : place + size;
    }
    if (!ON_GRID) return 0.0f;
    for (i64 i = 0; i < n; ++i) narrow(kept[i], inner + i);
    for (i64 i = n; i < BLOCK; ++i) terms[i] = 0.0f;
    return tree(terms);
}

template <typename T, bool ON_GRID, bool RESIDUAL>
static void norm_gradients(const T* grad, const T* x, T* inner, i64 n, i64 channels, i64 part, i64 width,
                           const float* mean, const float* factor, const float* shift, float scale, float low,
                           float high, float* lanes, float* blocks, double* offsets, double* slopes, float* total,
                           i64 threads) {
    i64 parts = (n + part - 1) / part;
    #pragma omp parallel for num_threads((int)threads) if (threads > 1 && n > CHUNK)
    for (i64 p = 0; p < parts; ++p) {
        float *first = lanes + p * width, *second = lanes + (parts + p) * width;
        for (i64 j = 0; j < width; ++j) first[j] = second[j] = 0.0f;
        for (i64 at = p * part, end = least(n, at + part); at < end; at += BLOCK)
            blocks[at / BLOCK] = norm_block<T, ON_GRID, RESIDUAL>(
                grad + at, x + at, inner + at, least(BLOCK, end - at), (at - p * part) % width, width, mean, factor,
                shift, scale, low, high, first, second);
    }
    channel_sums(lanes, parts, width, channels, offsets);
    channel_sums(lanes + parts * width, parts, width, channels, slopes);
    *total = ON_GRID ? all_blocks(blocks, (n + BLOCK - 1) / BLOCK) : 0.0f;
}

// `out` may be `grad`.
template <typename T>
static void norm_finish(const T* grad, const T* x, T* out, i64 n, i64 part, i64 width, const float* mean,
                        const float* factor, const float* slope, const float* offset, i64 threads) {
    i64 parts = (n + part - 1) / part;
    #pragma omp parallel for num_threads((int)threads) if (threads > 1 && n > CHUNK)
    for (i64 p = 0; p < parts; ++p)
        for (i64 at = p * part, end = least(n, at + part); at < end; at += width) {
            const T *v = x + at, *g = grad + at;
            T* to = out + at;
            i64 size = least(width, end - at);
            for (i64 j = 0; j < size; ++j)
                narrow(wide(g[j]) * factor[j] + ((wide(v[j]) - mean[j]) * slope[j] + offset[j]), to + j);
        }
}

extern "C" void qkd_norm_statistics(const void* x, i64 n, i64 channels, i64 part, i64 width, float* mean, float* lanes,
                                    double* sums, double* squares, i64 is_half, i64 threads) {
    if (is_half) statistics((const bf16*)x, n, channels, part, width, mean, lanes, sums, squares, threads);
    else statistics((const float*)x, n, channels, part, width, mean, lanes, sums, squares, threads);
}

template <typename T>
static void any_normalize(const void* x, void* out, i64 n, i64 part, i64 width, const float* factor,
                          const float* shift, const float* grid, i64 threads) {
    const T* from = (const T*)x;
    T* to = (T*)out;
    if (grid) normalize<T, true>(from, to, n, part, width, factor, shift, grid[0], grid[1], grid[2], threads);
    else normalize<T, false>(from, to, n, part, width, factor, shift, 0.0f, 0.0f, 0.0f, threads);
}

extern "C" void qkd_normalize(const void* x, void* out, i64 n, i64 part, i64 width, const float* factor,
                              const float* shift, const float* grid, i64 is_half, i64 threads) {
    if (is_half) any_normalize<bf16>(x, out, n, part, width, factor, shift, grid, threads);
    else any_normalize<float>(x, out, n, part, width, factor, shift, grid, threads);
}

template <typename T>
static void any_gradients(const T* grad, const T* x, T* inner, i64 n, i64 channels, i64 part, i64 width,
                          const float* table, const float* grid, i64 residual, float* lanes, float* blocks,
                          double* offsets, double* slopes, float* total, i64 threads) {
    const float *mean = table, *factor = table + width, *shift = table + 2 * width;
    float scale = grid ? grid[0] : 0.0f, low = grid ? grid[1] : 0.0f, high = grid ? grid[2] : 0.0f;
    auto run = !grid ? norm_gradients<T, false, false>
                     : residual ? norm_gradients<T, true, true> : norm_gradients<T, true, false>;
    run(grad, x, inner, n, channels, part, width, mean, factor, shift, scale, low, high, lanes, blocks, offsets, slopes,
        total, threads);
}

extern "C" void qkd_norm_gradients(const void* grad, const void* x, void* inner, i64 n, i64 channels, i64 part,
                                   i64 width, const float* table, const float* grid, i64 residual, float* lanes,
                                   float* blocks, double* offsets, double* slopes, float* total, i64 is_half,
                                   i64 threads) {
    if (is_half)
        any_gradients((const bf16*)grad, (const bf16*)x, (bf16*)inner, n, channels, part, width, table, grid, residual,
                      lanes, blocks, offsets, slopes, total, threads);
    else
        any_gradients((const float*)grad, (const float*)x, (float*)inner, n, channels, part, width, table, grid,
                      residual, lanes, blocks, offsets, slopes, total, threads);
}

template <typename T>
static void any_finish(const void* grad, const void* x, void* out, i64 n, i64 part, i64 width, const float* table,
                       i64 threads) {
    const float *mean = table, *factor = table + width, *slope = table + 2 * width, *offset = table + 3 * width;
    norm_finish((const T*)grad, (const T*)x, (T*)out, n, part, width, mean, factor, slope, offset, threads);
}

extern "C" void qkd_norm_finish(const void* grad, const void* x, void* out, i64 n, i64 part, i64 width,
                                const float* table, i64 is_half, i64 threads) {
    if (is_half) any_finish<bf16>(grad, x, out, n, part, width, table, threads);
    else any_finish<float>(grad, x, out, n, part, width, table, threads);
}

static void to_lanes(const float* of_channels, i64 channels, i64 width, float* lanes) {
    for (i64 at = 0; at < width; at += channels) std::memcpy(lanes + at, of_channels, channels * sizeof(float));
}

// Statistics of one process: what `channel_sums` found -> mean and biased variance.
extern "C" void qkd_norm_moments(const double* sums, const double* squares, const float* rounded, double count,
                                 i64 channels, double* mean, double* var) {
    for (i64 c = 0; c < channels; ++c) {
        mean[c] = sums[c] / count;
        double off = mean[c] - (double)rounded[c];
        double found = squares[c] / count - off * off;
        var[c] = found < 0.0 ? 0.0 : found;
    }
}

// `table`: mean, factor and shift by lane. `brief`: mean, unbiased variance and factor by channel.
extern "C" void qkd_norm_table(const double* mean, const double* var, const float* weight, const float* bias,
                               double eps, double ratio, i64 channels, i64 width, float* table, float* brief,
                               double* spread) {
    float *means = brief, *unbiased = brief + channels, *factor = brief + 2 * channels;
    float* shift = table + 2 * width;
    for (i64 c = 0; c < channels; ++c) {
        spread[c] = 1.0 / std::sqrt(var[c] + eps);
        means[c] = (float)mean[c];
        unbiased[c] = (float)(var[c] * ratio);
        factor[c] = (float)((double)weight[c] * spread[c]);
        shift[c] = (float)((double)bias[c] - mean[c] * (double)factor[c]);
    }
    to_lanes(means, channels, width, table);
    to_lanes(factor, channels, width, table + width);
    if (width > channels) to_lanes(shift, channels, width - channels, shift + channels);
}

// `before`: the table above; `after`: mean, factor, slope and offset by lane.
extern "C" void qkd_norm_ends(const float* before, const float* factor, const double* spread, const double* offsets,
                              const double* slopes, double count, i64 channels, i64 width, float* after) {
    std::memcpy(after, before, 2 * width * sizeof(float));
    float *slope = after + 2 * width, *offset = after + 3 * width;
    for (i64 c = 0; c < channels; ++c) {
        double each = (double)factor[c] / -count;
        slope[c] = (float)(each * (spread[c] * spread[c]) * slopes[c]);
        offset[c] = (float)(each * offsets[c]);
    }
    if (width == channels) return;
    to_lanes(slope, channels, width - channels, slope + channels);
    to_lanes(offset, channels, width - channels, offset + channels);
}
"""
