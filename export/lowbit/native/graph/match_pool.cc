// Pooling: the greatest code of a window, or the runtime's averages.
#include "graph/match.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace lowbit {

namespace {

#if defined(__x86_64__)
constexpr bool kKnowsAverages = true;
#else
constexpr bool kKnowsAverages = false;  // elsewhere the runtime rounds averages of whole tensors in fixed point
#endif
constexpr float kMostRatio = 1e4f;         // of scales: a mean in steps of the output fits 31 bits
constexpr size_t kMostAveraged = 1 << 20;  // codes, so that their sum fits 31 bits

}  // namespace

std::optional<Candidate> Matcher::max_pool(int place) {
    const Node& node = graph_.nodes[place];
    if (node.outputs.size() > 1 && node.outputs[1] != kNone) return std::nullopt;
    if (!node.ints.count("kernel_shape")) return std::nullopt;
    const auto real = reals_.find(node.inputs[0]);
    const bool is_real = real != reals_.end();
    const int codes = is_real ? real->second.codes : node.inputs[0];
    if (!is_code(graph_.values[node.inputs[0]]) && !is_real) return std::nullopt;
    TensorInfo in, out;
    ConvShape shape;
    if (graph_.values[codes].constant != nullptr || !tensor_info(node.inputs[0], &in) || !tensor_info(node.outputs[0], &out) ||
        in.channels != out.channels || !window_of(node, &shape))
        return std::nullopt;
    // With ceil_mode the last windows may hang over; every window must hold a part of the tensor.
    const bool has_parts = shape.pad_top < shape.kernel_h && shape.pad_left < shape.kernel_w &&
                           (out.height - 1) * shape.stride_h - shape.pad_top < in.height &&
                           (out.width - 1) * shape.stride_w - shape.pad_left < in.width;
    const bool is_floor = ints(node, "ceil_mode", {0}) == std::vector<int64_t>{0};
    if (!has_parts || (is_floor && !makes(shape, in, out))) return std::nullopt;
    Candidate found;
    found.step.kind = OpKind::kMaxPool;
    found.step.pool = PoolJob{nullptr, nullptr, 0, 0, 0, 0, shape.kernel_h, shape.kernel_w, shape.stride_h, shape.stride_w,
                              shape.pad_top, shape.pad_left};
    found.nodes = {place};
    found.inputs = {codes};
    found.output = node.outputs[0];
    if (is_real) {
        found.reals = {node.inputs[0]};
        found.makes_real = true;
        const Grid grid = real->second.grid;
        reals_[node.outputs[0]] = {node.outputs[0], grid, place};
    }
    return found;
}

// What the runtime fuses to QLinearAveragePool and QLinearGlobalAveragePool; `average_pool` in program.h computes it.
std::optional<Candidate> Matcher::average_pool(int place) {
    const Node& node = graph_.nodes[place];
    const auto real = reals_.find(node.inputs[0]);
    Grid to;
    const int quantize = quantizer_of(place, &to);
    if (!kKnowsAverages || quantize == kNone || real == reals_.end() || graph_.nodes[real->second.node].op != "DequantizeLinear") return std::nullopt;
    const Grid& from = real->second.grid;
    Candidate found;
    found.output = graph_.nodes[quantize].outputs[0];
    TensorInfo in, out;
    const int codes = real->second.codes;
    if (!tensor_info(codes, &in) || !tensor_info(found.output, &out) || in.channels != out.channels) return std::nullopt;
    if (from.is_signed || to.is_signed || in.positions() > kMostAveraged) return std::nullopt;
    AverageJob& job = found.step.average;
    job.is_global = node.op == "GlobalAveragePool";
    ConvShape shape;
    if (job.is_global) {
        const float scale = from.scale / (to.scale * static_cast<float>(in.positions()));
        if (out.positions() != 1 || !(scale >= 0x1p-32f && scale < 256.0f)) return std::nullopt;  // it throws otherwise
        job.scale = scale;
    } else {
        const auto counted = ints(node, "count_include_pad", {0});
        if (!node.ints.count("kernel_shape") || !window_of(node, &shape) || !makes(shape, in, out) || counted.size() != 1 ||
            ints(node, "ceil_mode", {0}) != std::vector<int64_t>{0} || shape.pad_top >= shape.kernel_h ||
            shape.pad_left >= shape.kernel_w || shape.pad_bottom >= shape.kernel_h || shape.pad_right >= shape.kernel_w)
            return std::nullopt;
        if (!(from.scale / to.scale < kMostRatio)) return std::nullopt;
        job.counts_border = counted[0] != 0;
        job.scale = from.scale;
        job.out_scale = to.scale;
    }
    job.zero = from.zero;
    job.out_zero = to.zero;
    found.step.pool = PoolJob{nullptr, nullptr, 0, 0, 0, 0, shape.kernel_h, shape.kernel_w, shape.stride_h, shape.stride_w,
                              shape.pad_top, shape.pad_left};
    found.step.kind = OpKind::kAverage;
    found.nodes = {place, quantize};
    found.reals = {node.inputs[0]};
    found.inputs = {codes};
    return found;
}

}  // namespace lowbit
