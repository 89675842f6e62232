// Convolutions: their weights and biases, and whether look-ups or dot products compute them exactly.
#include "graph/match.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace lowbit {

namespace {

constexpr int kFewestLutChannels = 16;  // of inputs: below, a look-up's third channel is mostly padding
constexpr size_t kMostWeights = 1 << 23; // of a channel: their sum fits 31 bits
constexpr int kHighestShortWeight = 8, kHighestShortActivation = 15;  // four bits: sums of 16 bits hold hundreds of products
constexpr double kSameScale = 1e-6;     // relative: a product of two scales, rounded to single precision

// The least and the greatest weight, and sum |w| of each channel: parts of 256, whose sums fit 16 bits, in one go.
std::pair<int, int> magnitudes(const int8_t* weights, size_t channels, size_t count, std::vector<int32_t>* sums) {
    constexpr size_t kPart = 256;
    uint8_t lowest = 255, highest = 0;  // with 128 added: smallest instructions
    for (size_t o = 0; o < channels; ++o, weights += count) {
        int32_t sum = 0;
        for (size_t first = 0; first < count; first += kPart) {
            const size_t end = std::min(first + kPart, count);
            uint16_t part = 0;
            for (size_t i = first; i < end; ++i) {
                const uint8_t code = static_cast<uint8_t>(weights[i] ^ 0x80);
                lowest = std::min(lowest, code);
                highest = std::max(highest, code);
            }
            for (size_t i = first; i < end; ++i) {
                const int16_t w = weights[i];
                part = static_cast<uint16_t>(part + (w < 0 ? -w : w));
            }
            sum += part;
        }
        sums->push_back(sum);
    }
    return {lowest - 128, highest - 128};
}

}  // namespace

// The node that makes real numbers of stored codes, for one reader alone; else kNone.
int Matcher::dequantizer_of(int value) const {
    const int made_by = graph_.values[value].producer;
    if (made_by == kNone || single_reader(value) == kNone) return kNone;
    const Node& node = graph_.nodes[made_by];
    const bool has_grid = node.inputs.size() >= 2 && node.inputs[0] != kNone && node.inputs[1] != kNone;
    return node.op == "DequantizeLinear" && has_grid && is_plain(node) ? made_by : kNone;
}

bool Matcher::weights_of(const Node& node, ConvSpec* spec, std::vector<float>* scales, std::vector<int>* nodes) const {
    const int made_by = dequantizer_of(node.inputs[1]);
    if (made_by == kNone) return false;
    const Node& dequantize = graph_.nodes[made_by];
    const Value& codes = graph_.values[dequantize.inputs[0]];
    const Value& steps = graph_.values[dequantize.inputs[1]];
    ConvShape& s = spec->shape;
    const size_t size = static_cast<size_t>(s.out_channels) * (spec->is_depthwise ? 1 : s.in_channels) * s.kernel_h * s.kernel_w;
    if (!is_code(codes) || codes.constant == nullptr || codes.count != size) return false;
    if (steps.type != Type::kFloat || steps.constant == nullptr) return false;
    const bool is_one = steps.count == 1;
    if (!is_one && (steps.count != static_cast<size_t>(s.out_channels) || ints(dequantize, "axis", {1}) != std::vector<int64_t>{0}))
        return false;
    int zero = codes.type == Type::kInt8 ? 128 : 0;
    if (dequantize.inputs.size() > 2 && dequantize.inputs[2] != kNone) {
        const Value& zeros = graph_.values[dequantize.inputs[2]];
        if (zeros.constant == nullptr || zeros.type != codes.type || zeros.count != steps.count || zeros.count == 0) return false;
        zero = code_at(zeros, 0);
        for (size_t i = 1; i < zeros.count; ++i)
            if (code_at(zeros, i) != zero) return false;
    }
    const int8_t* const from = static_cast<const int8_t*>(codes.constant);
    spec->weights.assign(from, from + size);
    // Both types' zero points are told with 128 added to those of int8: mostly there is nothing to take off.
    const int shift = zero - (codes.type == Type::kInt8 ? 128 : 0);
    if (shift != 0) {
        for (int8_t& weight : spec->weights) {
            const int code = codes.type == Type::kInt8 ? weight : static_cast<uint8_t>(weight);
            if (code - shift < -128 || code - shift > 127) return false;
            weight = static_cast<int8_t>(code - shift);
        }
    }
    for (int o = 0; o < s.out_channels; ++o) {
        scales->push_back(static_cast<const float*>(steps.constant)[is_one ? 0 : o]);
        if (!(scales->back() > 0) || !std::isfinite(scales->back())) return false;
    }
    nodes->push_back(made_by);
    return true;
}

bool Matcher::bias_of(const Node& node, float input_scale, const std::vector<float>& scales, ConvSpec* spec,
                      std::vector<int>* nodes) const {
    const int channels = spec->shape.out_channels;
    spec->requantize.bias.assign(channels, 0);
    if (node.inputs.size() < 3 || node.inputs[2] == kNone) return true;
    const int made_by = dequantizer_of(node.inputs[2]);
    if (made_by == kNone) return false;
    const Node& dequantize = graph_.nodes[made_by];
    const Value& codes = graph_.values[dequantize.inputs[0]];
    const Value& steps = graph_.values[dequantize.inputs[1]];
    if (codes.type != Type::kInt32 || codes.constant == nullptr || codes.count != static_cast<size_t>(channels)) return false;
    if (steps.type != Type::kFloat || steps.constant == nullptr || (steps.count != 1 && steps.count != codes.count)) return false;
    if (steps.count != 1 && ints(dequantize, "axis", {1}) != std::vector<int64_t>{0}) return false;
    if (dequantize.inputs.size() > 2 && dequantize.inputs[2] != kNone) {
        const Value& zeros = graph_.values[dequantize.inputs[2]];
        if (zeros.constant == nullptr || zeros.type != Type::kInt32) return false;
        for (size_t i = 0; i < zeros.count; ++i)
            if (static_cast<const int32_t*>(zeros.constant)[i] != 0) return false;
    }
    for (int o = 0; o < channels; ++o) {  // the integer kernels take the bias unchanged: its grid must be the accumulator's
        const float step = static_cast<const float*>(steps.constant)[steps.count == 1 ? 0 : o];
        const double expected = static_cast<double>(input_scale) * scales[o];
        const int32_t code = static_cast<const int32_t*>(codes.constant)[o];
        if (!std::isfinite(step)) return false;  // even times a code of 0, it is NaN
        if (code != 0 && !(std::fabs(step - expected) <= kSameScale * expected))
            return false;
        spec->requantize.bias[o] = code;
    }
    nodes->push_back(made_by);
    return true;
}

// Which codes a tensor holds; what an operator on real values made has a range of real values.
Range Matcher::codes_of(const Real& real) const {
    const Range& found = ranges_[real.codes];
    if (is_code(graph_.values[real.codes])) return found;
    const auto code = [&](double value) {
        return std::min(std::max(std::nearbyint(value / real.grid.scale) + real.grid.zero, 0.0), 255.0);
    };
    return {code(found.low), code(found.high)};
}

// Decide between look-up tables and dot products; false where neither is exact.
bool Matcher::fits(ConvSpec* spec, const Real& real) const {
    const ConvShape& s = spec->shape;
    const size_t count = static_cast<size_t>(spec->is_depthwise ? 1 : s.in_channels) * s.kernel_h * s.kernel_w;
    if (count > kMostWeights) return false;
    const Range range = codes_of(real);
    const int base = static_cast<int>(std::min<double>(range.low, spec->zero));  // borders are the zero point
    const int span = static_cast<int>(std::max<double>(range.high, spec->zero)) - base;
    std::vector<int32_t> sums;
    const auto [lowest, highest] = magnitudes(spec->weights.data(), s.out_channels, count, &sums);
    const bool is_dense = !spec->is_depthwise && s.in_channels >= kFewestLutChannels;
    const LutFormat* const format = is_dense ? fitting_format(*kernels_, lowest, highest, span) : nullptr;
    const bool is_short = kernels_->has_short_sums && !spec->is_depthwise;
    const int dot_span = is_short ? span : 255, most = std::max(-lowest, highest);
    bool is_low = format != nullptr, fits_dot = kernels_->has_exact_dot || 2 * dot_span * most <= INT16_MAX;
    fits_dot = fits_dot && (spec->is_depthwise || (kernels_->dot.lowest_weight <= lowest && highest <= kernels_->dot.highest_weight));
    for (int o = 0; o < s.out_channels; ++o) {
        const int32_t sum = sums[o];
        const int64_t bias = std::llabs(static_cast<int64_t>(spec->requantize.bias[o])), reach = int64_t{255} * sum;
        const float scale = spec->requantize.scale[o];
        if (is_low) {
            const int64_t total = static_cast<int64_t>(sum) * format->highest_activation();
            is_low = total <= kTotalLimit && bias < (1 << 30) && is_tame(spec->requantize.bias[o], scale, 2 * total);
        }
        fits_dot = fits_dot && 2 * reach + 2 * bias <= INT32_MAX && (!spec->is_depthwise || reach <= INT16_MAX) &&
                   is_tame(spec->requantize.bias[o], scale, 2 * reach);
    }
    spec->is_lut = is_low;
    if (is_low) spec->format = *format;
    if (is_low || is_short) spec->base = base, spec->span = span;
    const bool has_few_bits = most <= kHighestShortWeight && span <= kHighestShortActivation;
    spec->is_faster = is_low || (is_dense && has_few_bits && (is_short || (kernels_->dot.is_tiled && fits_dot)));
    return is_low || fits_dot;
}

std::optional<Candidate> Matcher::convolution(int place) {
    const Node& node = graph_.nodes[place];
    const auto real = reals_.find(node.inputs[0]);
    if (real == reals_.end() || node.inputs.size() < 2 || node.inputs[1] == kNone) return std::nullopt;
    const std::vector<int64_t> group = ints(node, "group", {1});
    Grid to;
    const int quantize = quantizer_of(place, &to);
    if (quantize == kNone) return std::nullopt;
    Candidate found;
    found.output = graph_.nodes[quantize].outputs[0];
    TensorInfo in, out;
    if (!tensor_info(real->second.codes, &in) || !tensor_info(found.output, &out)) return std::nullopt;
    ConvSpec& spec = found.step.conv;
    const Value& weights = graph_.values[node.inputs[1]];
    if (!weights.has_shape || !in_limits(weights.shape, 4, 1, kLongestSide)) return std::nullopt;
    spec.is_depthwise = group != std::vector<int64_t>{1};
    if (spec.is_depthwise && (group != std::vector<int64_t>{in.channels} || in.channels != out.channels)) return std::nullopt;
    if (weights.shape[0] != out.channels || weights.shape[1] != (spec.is_depthwise ? 1 : in.channels)) return std::nullopt;
    spec.shape.in_channels = in.channels;
    spec.shape.out_channels = out.channels;
    spec.shape.kernel_h = static_cast<int>(std::min<int64_t>(weights.shape[2], kMostKernel + 1));
    spec.shape.kernel_w = static_cast<int>(std::min<int64_t>(weights.shape[3], kMostKernel + 1));
    const ConvShape expected = spec.shape;
    if (!window_of(node, &spec.shape) || !makes(spec.shape, in, out)) return std::nullopt;
    if (expected.kernel_h != spec.shape.kernel_h || expected.kernel_w != spec.shape.kernel_w) return std::nullopt;
    std::vector<float> scales;
    const Grid& from = real->second.grid;
    found.nodes = {place, quantize};
    if (!weights_of(node, &spec, &scales, &found.nodes) || !bias_of(node, from.scale, scales, &spec, &found.nodes))
        return std::nullopt;
    for (float scale : scales) {
        const float product = from.scale * scale;
        spec.requantize.scale.push_back(product / to.scale);
        if (!(spec.requantize.scale.back() > 0) || !std::isfinite(spec.requantize.scale.back())) return std::nullopt;
    }
    spec.requantize.zero = to.zero;
    spec.zero = from.zero;
    if (!fits(&spec, real->second)) return std::nullopt;
    found.step.kind = spec.is_lut ? OpKind::kLutConv : spec.is_depthwise ? OpKind::kDepthwise : OpKind::kDotConv;
    found.reals = {node.inputs[0]};
    found.inputs = {real->second.codes};
    return found;
}

}  // namespace lowbit
