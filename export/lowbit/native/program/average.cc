// Average pooling in ONNX Runtime's own arithmetic.
#include <algorithm>
#include <cmath>
#include <vector>

#include "program/program.h"

namespace lowbit {

namespace {

uint8_t code_of(float value, int zero) {
    return static_cast<uint8_t>(std::min(std::max(static_cast<int>(std::nearbyintf(value)) + zero, 0), 255));
}

// Sums fit 31 bits: at most 2^20 codes are averaged.
void global_average(const PoolJob& pool, const AverageJob& average, int channels) {
    std::vector<int32_t> sums(channels, -average.zero * pool.height * pool.width);
    const uint8_t* codes = pool.source;
    for (int i = 0; i < pool.height * pool.width; ++i, codes += pool.stride)
        for (int c = 0; c < channels; ++c) sums[c] += codes[c];
    for (int c = 0; c < channels; ++c) {
        const float value = static_cast<float>(sums[c]) * average.scale;
        const float low = static_cast<float>(-average.out_zero), high = static_cast<float>(255 - average.out_zero);
        pool.out[c] = code_of(std::min(std::max(value, low), high), average.out_zero);
    }
}

}  // namespace

void average_pool(const PoolJob& pool, const AverageJob& average, int channels, int first_row, int last_row) {
    if (average.is_global) {
        if (first_row < last_row) global_average(pool, average, channels);
        return;
    }
    float real[256];
    for (int code = 0; code < 256; ++code) real[code] = average.scale * static_cast<float>(code - average.zero);
    std::vector<float> sums(channels);
    for (int y = first_row; y < last_row; ++y) {
        const int top = y * pool.stride_h - pool.pad_top;
        const int y0 = std::max(top, 0), y1 = std::min(top + pool.kernel_h, pool.height);
        for (int x = 0; x < pool.out_width; ++x) {
            const int left = x * pool.stride_w - pool.pad_left;
            const int x0 = std::max(left, 0), x1 = std::min(left + pool.kernel_w, pool.width);
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int sy = y0; sy < y1; ++sy)
                for (int sx = x0; sx < x1; ++sx) {
                    const uint8_t* const codes = pool.source + (static_cast<size_t>(sy) * pool.width + sx) * pool.stride;
                    for (int c = 0; c < channels; ++c) sums[c] += real[codes[c]];
                }
            const int count = average.counts_border ? pool.kernel_h * pool.kernel_w : (y1 - y0) * (x1 - x0);
            uint8_t* const out = pool.out + (static_cast<size_t>(y) * pool.out_width + x) * pool.stride;
            for (int c = 0; c < channels; ++c) {
                const float mean = sums[c] / static_cast<float>(count);
                out[c] = code_of(mean / average.out_scale + static_cast<float>(average.out_zero), 0);
            }
        }
    }
}

}  // namespace lowbit
