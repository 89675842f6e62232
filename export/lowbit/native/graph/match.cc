// Steps that could be claimed: each rule takes a node and gives up at the first thing that it does not know.
#include "graph/match.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace lowbit {

namespace {

bool is_default_padding(const Node& node) {
    const auto found = node.strings.find("auto_pad");
    return found == node.strings.end() || found->second.empty() || found->second == "NOTSET";
}

}  // namespace

std::vector<int64_t> ints(const Node& node, const char* name, std::vector<int64_t> otherwise) {
    const auto found = node.ints.find(name);
    return found == node.ints.end() ? std::move(otherwise) : found->second;
}

// Whether windows are within the padded tensor and are as many as the output has positions.
bool makes(const ConvShape& shape, const TensorInfo& in, const TensorInfo& out) {
    return in.height + shape.pad_top + shape.pad_bottom >= shape.kernel_h &&
           in.width + shape.pad_left + shape.pad_right >= shape.kernel_w && shape.out_height(in.height) == out.height &&
           shape.out_width(in.width) == out.width;
}

bool in_limits(const std::vector<int64_t>& values, size_t count, int64_t low, int64_t high) {
    return values.size() == count &&
           std::all_of(values.begin(), values.end(), [&](int64_t v) { return low <= v && v <= high; });
}

Matcher::Matcher(const Graph& graph, const Kernels* kernels)
    : graph_(graph),
      kernels_(kernels),
      ranges_(find_ranges(graph)),
      uncertain_sizes_(find_uncertain_sizes(graph)),
      batches_(find_batches(graph)) {}

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
    if (op == "AveragePool" || op == "GlobalAveragePool") return average_pool(node);
    if (op == "Concat") return concat(node);
    return std::nullopt;
}

bool Matcher::tensor_info(int value, TensorInfo* info) const {
    const Value& it = graph_.values[value];
    if (!it.has_shape || it.shape.size() != 4 || uncertain_sizes_[value]) return false;
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
    const int64_t rows = graph_.values[node.inputs[0]].shape[0];
    if (rows != graph_.values[node.inputs[1]].shape[0]) return std::nullopt;
    if (rows < 0 && batches_[node.inputs[0]] != batches_[node.inputs[1]]) return std::nullopt;  // either may be one
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
