// Steps that could be claimed: each rule takes a node and gives up at the first thing that it does not know.
#include "graph/match.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace lowbit {

namespace {

constexpr int64_t kLongestSide = 1 << 15, kMostBytes = int64_t{1} << 30;
constexpr int kMostBorder = 64, kMostKernel = 64, kMostStride = 64;
constexpr int kFewestLutChannels = 16;  // of inputs: below, a look-up's third channel is mostly padding
constexpr size_t kMostWeights = 1 << 23; // of a channel: their sum fits 31 bits
constexpr int kHighestShortWeight = 8, kHighestShortActivation = 15;  // four bits: sums of 16 bits hold hundreds of products
constexpr double kSameScale = 1e-6;     // relative: a product of two scales, rounded to single precision

std::vector<int64_t> ints(const Node& node, const char* name, std::vector<int64_t> otherwise) {
    const auto found = node.ints.find(name);
    return found == node.ints.end() ? std::move(otherwise) : found->second;
}

bool is_default_padding(const Node& node) {
    const auto found = node.strings.find("auto_pad");
    return found == node.strings.end() || found->second.empty() || found->second == "NOTSET";
}

// Whether windows are within the padded tensor and are as many as the output has positions.
bool makes(const ConvShape& shape, const TensorInfo& in, const TensorInfo& out) {
    return in.height + shape.pad_top + shape.pad_bottom >= shape.kernel_h &&
           in.width + shape.pad_left + shape.pad_right >= shape.kernel_w && shape.out_height(in.height) == out.height &&
           shape.out_width(in.width) == out.width;
}

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

bool in_limits(const std::vector<int64_t>& values, size_t count, int64_t low, int64_t high) {
    return values.size() == count &&
           std::all_of(values.begin(), values.end(), [&](int64_t v) { return low <= v && v <= high; });
}

}  // namespace

Matcher::Matcher(const Graph& graph, const Kernels* kernels)
    : graph_(graph), kernels_(kernels), ranges_(find_ranges(graph)) {}

std::vector<Candidate> Matcher::match() {
    std::vector<Candidate> found;
    for (size_t i = 0; i < graph_.nodes.size(); ++i)
        if (auto candidate = at(static_cast<int>(i))) found.push_back(std::move(*candidate));
    return found;
}

std::optional<Candidate> Matcher::at(int node) {
    const std::string& op = graph_.nodes[node].op;
    const Node& it = graph_.nodes[node];
    if (it.outputs.empty() || it.outputs[0] == kNone || it.inputs.empty() || it.inputs[0] == kNone) return std::nullopt;
    if (op == "DequantizeLinear") {
        Grid grid;
        TensorInfo info;
        if (graph_.values[it.inputs[0]].constant == nullptr && grid_of(node, &grid) && tensor_info(it.inputs[0], &info))
            reals_[it.outputs[0]] = {it.inputs[0], grid, node};
        return std::nullopt;
    }
    if (op == "Conv") return convolution(node);
    if (op == "Add") return sum(node);
    if (op == "QuantizeLinear") return requantize(node);
    if (op == "Clip") return clip(node);
    if (op == "MaxPool") return max_pool(node);
    if (op == "Concat") return concat(node);
    return std::nullopt;
}

bool Matcher::tensor_info(int value, TensorInfo* info) const {
    const Value& it = graph_.values[value];
    if (!it.has_shape || it.shape.size() != 4) return false;
    if (!in_limits({it.shape.begin() + 1, it.shape.end()}, 3, 1, kLongestSide)) return false;
    info->channels = static_cast<int>(it.shape[1]);
    info->height = static_cast<int>(it.shape[2]);
    info->width = static_cast<int>(it.shape[3]);
    return static_cast<int64_t>(round_up(info->channels, kChannelUnit)) * info->height * info->width <= kMostBytes / 8;
}

bool Matcher::is_signed(int value) const { return graph_.values[value].type == Type::kInt8; }

int Matcher::single_reader(int value) const {
    const Value& it = graph_.values[value];
    return !it.is_output && it.consumers == 1 && it.readers.size() == 1 ? it.readers[0] : kNone;
}

bool Matcher::grid_of(int node, Grid* grid) const {
    return scalar_grid(graph_, graph_.nodes[node], &grid->scale, &grid->zero, &grid->is_signed);
}

int Matcher::quantizer_of(int node, Grid* grid) const {
    const int reader = single_reader(graph_.nodes[node].outputs[0]);
    if (reader == kNone || graph_.nodes[reader].op != "QuantizeLinear" || !grid_of(reader, grid)) return kNone;
    return graph_.nodes[reader].inputs[0] == graph_.nodes[node].outputs[0] ? reader : kNone;
}

// On x86 the runtime rewrites an int8 QuantizeLinear whose only reader is a DequantizeLinear of the same zero point; on Arm,
// whose dot products are of one kind, it keeps int8.
bool Matcher::becomes_unsigned(int codes) const {
    if (kIsArm) return false;
    const Value& value = graph_.values[codes];
    const int reader = single_reader(codes);
    if (value.producer == kNone || reader == kNone) return false;
    const Node &made = graph_.nodes[value.producer], &read = graph_.nodes[reader];
    if (made.op != "QuantizeLinear" || read.op != "DequantizeLinear") return false;
    Grid a, b;
    return made.inputs.size() == 3 && read.inputs.size() == 3 && grid_of(value.producer, &a) && grid_of(reader, &b) &&
           a.zero == b.zero;
}

// The runtime makes one integer operator of DequantizeLinear, operator, QuantizeLinear where all types are the same.
bool Matcher::fuses(const std::vector<int>& codes) const {
    const auto is_int8 = [&](int value) { return is_signed(value) && !becomes_unsigned(value); };
    return std::all_of(codes.begin(), codes.end(), [&](int value) { return is_int8(value) == is_int8(codes[0]); });
}

bool Matcher::window_of(const Node& node, ConvShape* shape) const {
    const auto kernel = ints(node, "kernel_shape", {shape->kernel_h, shape->kernel_w});
    const auto strides = ints(node, "strides", {1, 1}), dilations = ints(node, "dilations", {1, 1});
    const auto pads = ints(node, "pads", {0, 0, 0, 0});
    if (!is_default_padding(node) || !in_limits(kernel, 2, 1, kMostKernel) || !in_limits(strides, 2, 1, kMostStride) ||
        !in_limits(dilations, 2, 1, 1) || !in_limits(pads, 4, 0, kMostBorder))
        return false;
    shape->kernel_h = static_cast<int>(kernel[0]);
    shape->kernel_w = static_cast<int>(kernel[1]);
    shape->stride_h = static_cast<int>(strides[0]);
    shape->stride_w = static_cast<int>(strides[1]);
    shape->pad_top = static_cast<int>(pads[0]);
    shape->pad_left = static_cast<int>(pads[1]);
    shape->pad_bottom = static_cast<int>(pads[2]);
    shape->pad_right = static_cast<int>(pads[3]);
    return true;
}

bool Matcher::weights_of(const Node& node, ConvSpec* spec, std::vector<float>* scales, std::vector<int>* nodes) const {
    const int made_by = graph_.values[node.inputs[1]].producer;
    if (made_by == kNone || single_reader(node.inputs[1]) == kNone) return false;
    const Node& dequantize = graph_.nodes[made_by];
    if (dequantize.op != "DequantizeLinear" || dequantize.inputs.size() < 2 || dequantize.inputs[0] == kNone ||
        dequantize.inputs[1] == kNone || !is_plain(dequantize))
        return false;
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
    const int made_by = graph_.values[node.inputs[2]].producer;
    if (made_by == kNone || single_reader(node.inputs[2]) == kNone) return false;
    const Node& dequantize = graph_.nodes[made_by];
    if (dequantize.op != "DequantizeLinear" || dequantize.inputs.size() < 2 || dequantize.inputs[0] == kNone ||
        dequantize.inputs[1] == kNone || !is_plain(dequantize))
        return false;
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
    spec->is_faster = is_low || (is_short && is_dense && most <= kHighestShortWeight && span <= kHighestShortActivation);
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

std::optional<Candidate> Matcher::sum_with_constant(int place, int constant, int real, const Grid& to, int quantize) {
    const Node& node = graph_.nodes[place];
    const int made_by = graph_.values[node.inputs[constant]].producer;
    const auto tensor = reals_.find(node.inputs[real]);
    if (made_by == kNone || tensor == reals_.end() || single_reader(node.inputs[constant]) == kNone) return std::nullopt;
    const Node& dequantize = graph_.nodes[made_by];
    Grid grid;
    if (dequantize.op != "DequantizeLinear" || !grid_of(made_by, &grid)) return std::nullopt;
    const Value& code = graph_.values[dequantize.inputs[0]];
    if (code.constant == nullptr || code.count != 1 || !code.has_shape || code.shape.size() > 4) return std::nullopt;
    const Grid& from = tensor->second.grid;
    if (from.is_signed != to.is_signed || from.is_signed != grid.is_signed || from.is_signed) return std::nullopt;
    if (graph_.nodes[tensor->second.node].op != "DequantizeLinear") return std::nullopt;  // not what the runtime fuses
    Candidate found;
    found.step.kind = OpKind::kMap;
    if (!add_constant_table(from, grid, code_at(code, 0), constant == 0, to, &found.step.table)) return std::nullopt;
    found.nodes = {place, quantize, made_by};
    found.reals = {node.inputs[real]};
    found.inputs = {tensor->second.codes};
    found.output = graph_.nodes[quantize].outputs[0];
    return found;
}

std::optional<Candidate> Matcher::sum(int place) {
    const Node& node = graph_.nodes[place];
    Grid to;
    const int quantize = quantizer_of(place, &to);
    if (quantize == kNone || node.inputs.size() != 2 || node.inputs[1] == kNone) return std::nullopt;
    const auto a = reals_.find(node.inputs[0]), b = reals_.find(node.inputs[1]);
    if (b == reals_.end()) return sum_with_constant(place, 1, 0, to, quantize);
    if (a == reals_.end()) return sum_with_constant(place, 0, 1, to, quantize);
    Candidate found;
    found.output = graph_.nodes[quantize].outputs[0];
    TensorInfo in, other, out;
    if (!tensor_info(a->second.codes, &in) || !tensor_info(b->second.codes, &other) || !tensor_info(found.output, &out))
        return std::nullopt;
    const auto same = [](const TensorInfo& x, const TensorInfo& y) {
        return x.channels == y.channels && x.height == y.height && x.width == y.width;
    };
    if (!same(in, other) || !same(in, out)) return std::nullopt;
    if (graph_.values[node.inputs[0]].shape[0] != graph_.values[node.inputs[1]].shape[0]) return std::nullopt;
    const bool is_pattern = graph_.nodes[a->second.node].op == "DequantizeLinear" &&
                            graph_.nodes[b->second.node].op == "DequantizeLinear" && node.inputs[0] != node.inputs[1];
    found.step.kind = OpKind::kAdd;
    if (is_pattern && fuses({a->second.codes, b->second.codes, found.output})) {
        // Codes that the runtime makes unsigned are what is kept here anyway.
        const auto seen = [&](Grid grid, int codes) {
            grid.is_signed = grid.is_signed && !becomes_unsigned(codes);
            return grid;
        };
        if (!fused_sum(seen(a->second.grid, a->second.codes), seen(b->second.grid, b->second.codes), seen(to, found.output),
                       &found.step.add))
            return std::nullopt;
    } else if (!real_sum(a->second.grid, b->second.grid, to, &found.step.add)) {
        return std::nullopt;
    }
    found.nodes = {place, quantize};
    found.reals = {node.inputs[0], node.inputs[1]};
    found.inputs = {a->second.codes, b->second.codes};
    return found;
}

std::optional<Candidate> Matcher::requantize(int place) {
    const Node& node = graph_.nodes[place];
    const auto real = reals_.find(node.inputs[0]);
    Grid to;
    TensorInfo info;
    if (real == reals_.end() || !grid_of(place, &to) || !tensor_info(node.outputs[0], &info)) return std::nullopt;
    Candidate found;
    found.step.kind = OpKind::kMap;
    found.step.table = requantize_table(real->second.grid, to);
    found.nodes = {place};
    found.reals = {node.inputs[0]};
    found.inputs = {real->second.codes};
    found.output = node.outputs[0];
    return found;
}

std::optional<Candidate> Matcher::clip(int place) {
    const Node& node = graph_.nodes[place];
    TensorInfo info;
    const Value& in = graph_.values[node.inputs[0]];
    if (!is_code(in) || in.constant != nullptr || !tensor_info(node.inputs[0], &info)) return std::nullopt;
    int limits[2] = {0, 255};
    for (size_t i = 1; i <= 2; ++i) {
        if (i >= node.inputs.size() || node.inputs[i] == kNone) continue;
        const Value& limit = graph_.values[node.inputs[i]];
        if (limit.constant == nullptr || limit.count != 1 || limit.type != in.type) return std::nullopt;
        limits[i - 1] = code_at(limit, 0);
    }
    if (limits[0] > limits[1]) return std::nullopt;
    Candidate found;
    found.step.kind = OpKind::kMap;
    for (int code = 0; code < 256; ++code)
        found.step.table[code] = static_cast<uint8_t>(std::min(std::max(code, limits[0]), limits[1]));
    found.nodes = {place};
    found.inputs = {node.inputs[0]};
    found.output = node.outputs[0];
    return found;
}

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

// Channels side by side: of codes of one type, or of real tensors of one grid.
std::optional<Candidate> Matcher::concat(int place) {
    const Node& node = graph_.nodes[place];
    TensorInfo out, in;
    if (ints(node, "axis", {}) != std::vector<int64_t>{1} || !tensor_info(node.outputs[0], &out)) return std::nullopt;
    Candidate found;
    found.step.kind = OpKind::kConcat;
    found.nodes = {place};
    found.output = node.outputs[0];
    const auto first = reals_.find(node.inputs[0]);
    found.makes_real = first != reals_.end();
    if (!found.makes_real && !is_code(graph_.values[node.inputs[0]])) return std::nullopt;
    int channels = 0;
    for (int input : node.inputs) {
        if (input == kNone || !tensor_info(input, &in) || in.height != out.height || in.width != out.width) return std::nullopt;
        const auto real = reals_.find(input);
        if ((real != reals_.end()) != found.makes_real) return std::nullopt;
        if (found.makes_real && !(real->second.grid == first->second.grid)) return std::nullopt;
        const int codes = found.makes_real ? real->second.codes : input;
        if (graph_.values[codes].constant != nullptr) return std::nullopt;
        if (found.makes_real && std::count(found.reals.begin(), found.reals.end(), input) == 0) found.reals.push_back(input);
        found.inputs.push_back(codes);
        channels += in.channels;
    }
    if (channels != out.channels) return std::nullopt;
    if (found.makes_real) reals_[found.output] = {found.output, Grid(first->second.grid), place};
    return found;
}

}  // namespace lowbit
