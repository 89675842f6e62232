// Which declared sizes a run can be relied on to have.
#include "graph/sizes.h"

#include <set>
#include <string>

namespace lowbit {

namespace {

constexpr int kConstant = -1;  // the batch of what is the same in every run

// Each row of the output is made from the same row of the first input, or of all inputs.
const std::set<std::string> kOfFirst = {
    "AveragePool", "BatchNormalization", "Clip", "Conv", "DequantizeLinear", "Elu", "Erf", "GlobalAveragePool",
    "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "PRelu", "QuantizeLinear", "Relu",
    "Sigmoid", "Tanh",
};
const std::set<std::string> kOfAll = {"Add", "Concat", "Div", "Mul", "Sub"};

const std::vector<int64_t>* attribute(const Node& node, const char* name) {
    const auto found = node.ints.find(name);
    return found == node.ints.end() ? nullptr : &found->second;
}

bool is_pooling(const Node& node) { return node.op == "MaxPool" || node.op == "AveragePool" || node.op == "LpPool"; }

// Whether rounding up makes a last window that begins behind the tensor and the padding before it, which may be none.
bool has_window_in_padding(const Graph& graph, const Node& node) {
    const auto *ceil = attribute(node, "ceil_mode"), *pads = attribute(node, "pads");
    if (ceil == nullptr || *ceil == std::vector<int64_t>{0}) return false;
    const auto *kernel = attribute(node, "kernel_shape"), *strides = attribute(node, "strides"),
               *dilations = attribute(node, "dilations");
    const Value& in = graph.values[node.inputs[0]];
    if (kernel == nullptr || !in.has_shape || in.shape.size() != kernel->size() + 2 ||
        (pads != nullptr && pads->size() != 2 * kernel->size()))
        return true;
    for (size_t axis = 0; axis < kernel->size(); ++axis) {
        const int64_t size = in.shape[axis + 2], before = pads != nullptr ? (*pads)[axis] : 0;
        const int64_t after = pads != nullptr ? (*pads)[axis + kernel->size()] : 0;
        const int64_t stride = strides != nullptr && axis < strides->size() ? (*strides)[axis] : 1;
        const int64_t dilation = dilations != nullptr && axis < dilations->size() ? (*dilations)[axis] : 1;
        const int64_t span = dilation * ((*kernel)[axis] - 1) + 1, rest = size + before + after - span;
        if (size < 1 || stride < 1 || before < 0 || after < 0 || rest < 0) return true;
        if ((rest + stride - 1) / stride * stride >= size + before) return true;
    }
    return false;
}

}  // namespace

std::vector<bool> find_uncertain_sizes(const Graph& graph) {
    std::vector<bool> found(graph.values.size(), false);
    for (const Node& node : graph.nodes) {
        // A transposed convolution's size by auto_pad is inferred in another way than the runtime computes it.
        const auto padding = node.strings.find("auto_pad");
        bool is_uncertain = node.op == "ConvTranspose" && padding != node.strings.end() && !padding->second.empty() &&
                            padding->second != "NOTSET";
        is_uncertain = is_uncertain || (is_pooling(node) && !node.inputs.empty() && node.inputs[0] != kNone &&
                                        has_window_in_padding(graph, node));
        for (int input : node.inputs) is_uncertain = is_uncertain || (input != kNone && found[input]);
        if (!is_uncertain) continue;
        for (int output : node.outputs)
            if (output != kNone) found[output] = true;
    }
    return found;
}

std::vector<int> find_batches(const Graph& graph) {
    std::vector<int> found(graph.values.size());
    for (size_t i = 0; i < found.size(); ++i)  // unless more is understood: a batch of which nothing is known
        found[i] = graph.values[i].constant != nullptr ? kConstant : static_cast<int>(i);
    for (const Node& node : graph.nodes) {
        if (node.outputs.empty() || node.outputs[0] == kNone || node.inputs.empty() || node.inputs[0] == kNone) continue;
        if (kOfFirst.count(node.op)) {
            found[node.outputs[0]] = found[node.inputs[0]];
            continue;
        }
        const std::vector<int64_t>* axis = attribute(node, "axis");
        // a negative axis could be the batch's
        if (!kOfAll.count(node.op) || (node.op == "Concat" && (axis == nullptr || axis->size() != 1 || (*axis)[0] < 1))) continue;
        int batch = kConstant;
        bool is_known = true;
        for (int input : node.inputs) {
            if (input == kNone) continue;
            if (found[input] == kConstant) {  // rows of its own would be repeated, or repeat the other's
                const int made_by = graph.values[input].producer;  // a DequantizeLinear, of a scalar maybe
                const Value& value = graph.values[made_by == kNone ? input : graph.nodes[made_by].inputs[0]];
                is_known = is_known && value.has_shape && (value.shape.size() < 4 || value.shape[0] == 1);
                continue;
            }
            is_known = is_known && (batch == kConstant || batch == found[input]);
            batch = found[input];
        }
        if (is_known) found[node.outputs[0]] = batch;
    }
    return found;
}

}  // namespace lowbit
