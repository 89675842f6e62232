// Walks along rows of positions that the files of vectors share; all of it is inlined into each of them.
#pragma once

#include "kernels/kernels.h"

namespace lowbit {
namespace {

#define INLINED __attribute__((always_inline))  // of a lambda
#define INLINE inline INLINED

// Cut positions 0..count into as few tiles as `most` allows, of nearly one width: call(first position, width).
template <typename Call> INLINE void for_tiles(int count, int most, const Call& call) {
    for (int left = (count + most - 1) / most, x = 0; left > 0; --left) {
        const int width = (count - x + left - 1) / left;
        call(x, width);
        x += width;
    }
}

// Depthwise convolutions, `Lanes` channels at a time: position(first byte of the window, first channel, where codes go).
template <int Lanes, typename Position>
INLINE void for_depthwise(const DepthwiseJob& job, int first_row, int last_row, const Position& position) {
    const ConvShape& shape = job.layer->shape;
    for (int y = first_row; y < last_row; ++y)
        for (int x = 0; x < job.out_width; ++x) {
            const uint8_t* const source = job.source + y * shape.stride_h * job.source_row + x * shape.stride_w * job.stride;
            uint8_t* const out = job.out + (static_cast<size_t>(y) * job.out_width + x) * job.stride;
            for (size_t c = 0; c < job.stride; c += Lanes) position(source + c, static_cast<int>(c), out + c);
        }
}

// The greatest codes of windows, cut off at the tensor's edges. `Most` holds those
// of some channels so far: take(from), store(to).
template <typename Most, int Lanes> INLINE void pool_rows(const PoolJob& job, int first_row, int last_row) {
    for (int y = first_row; y < last_row; ++y) {
        const int top = y * job.stride_h - job.pad_top;
        const int y0 = top < 0 ? 0 : top, y1 = top + job.kernel_h > job.height ? job.height : top + job.kernel_h;
        for (int x = 0; x < job.out_width; ++x) {
            const int left = x * job.stride_w - job.pad_left;
            const int x0 = left < 0 ? 0 : left, x1 = left + job.kernel_w > job.width ? job.width : left + job.kernel_w;
            uint8_t* const out = job.out + (static_cast<size_t>(y) * job.out_width + x) * job.stride;
            for (int c = 0; c < job.stride; c += Lanes) {
                Most most;
                for (int sy = y0; sy < y1; ++sy) {
                    const uint8_t* from = job.source + (static_cast<size_t>(sy) * job.width + x0) * job.stride + c;
                    for (int sx = x0; sx < x1; ++sx, from += job.stride) most.take(from);
                }
                most.store(out + c);
            }
        }
    }
}

}  // namespace
}  // namespace lowbit
