// Which codes and real values can occur: intervals, pushed through the operators that are understood.
#include "graph/ranges.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>

namespace lowbit {

namespace {

constexpr double kEverything = std::numeric_limits<double>::infinity();
constexpr double kCodes = 256;          // more than any code's distance from its zero point
constexpr double kMostSummed = 0x1p24;  // products in a sum
constexpr double kMostReach = 1e30;     // so that no sum of so many, as in a mean, overflows float32
constexpr double kNear = 1e-3;  // of a step: this close to a tie, rounding is not relied upon

Range unknown(const Value& value) { return is_code(value) ? Range{0, 255} : Range{-kEverything, kEverything}; }

Range hull(const Range& a, const Range& b) { return {std::min(a.low, b.low), std::max(a.high, b.high)}; }

class Ranges {
public:
    explicit Ranges(const Graph& graph) : graph_(graph) {
        for (const Value& value : graph.values) {
            found_.push_back(unknown(value));
            reach_.push_back(reach_of(value));
        }
    }

    std::vector<Range> find() {
        for (const Node& node : graph_.nodes) {
            if (!node.outputs.empty() && node.outputs[0] != kNone && !is_code(graph_.values[node.outputs[0]])) {
                const double reach = has(node, 0) ? reach_after(node) : kEverything;
                reach_[node.outputs[0]] = reach < kMostReach ? reach : kEverything;  // not where it is NaN, either
            }
            Range range;
            if (node.outputs.empty() || node.outputs[0] == kNone || !of(node, &range)) continue;
            if (std::isnan(range.low) || std::isnan(range.high) || range.low > range.high) continue;
            found_[node.outputs[0]] = range;
        }
        return std::move(found_);
    }

private:
    // The largest magnitude of a constant; infinite if one of its values is not finite, or is not known here.
    static double reach_of(const Value& value) {
        if (is_code(value)) return kCodes;
        if (value.constant == nullptr || value.type != Type::kFloat) return kEverything;
        const float* const first = static_cast<const float*>(value.constant);
        double reach = 0;
        for (size_t i = 0; i < value.count; ++i) {
            if (!std::isfinite(first[i])) return kEverything;
            reach = std::max(reach, std::abs(static_cast<double>(first[i])));
        }
        return reach;
    }

    // How large a tensor of floats can become in any run; infinite where it could be an infinity or NaN, too. Operators that
    // are not named here, and those whose attributes could make NaN, are not followed.
    double reach_after(const Node& node) const {
        static const std::set<std::string> keep = {
            "Abs", "AveragePool", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "HardSwish", "Identity", "MaxPool",
            "Neg", "ReduceMean", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze"};
        static const std::set<std::string> product = {"Conv", "ConvTranspose", "MatMul"};
        const auto reach = [&](size_t place) { return has(node, place) ? reach_[node.inputs[place]] : 0.0; };
        const std::string& op = node.op;
        if (keep.count(op)) return reach(0);
        if (op == "Clip") return std::isinf(reach(1)) || std::isinf(reach(2)) ? kEverything : reach(0);
        if (op == "Sigmoid" || op == "Tanh" || op == "Erf") return std::isinf(reach(0)) ? kEverything : 1;
        if (op == "DequantizeLinear") {
            if (!has(node, 1)) return kEverything;
            const Type type = graph_.values[node.inputs[0]].type;
            return type == Type::kInt32 ? 0x1p31 * reach(1) : is_code(graph_.values[node.inputs[0]]) ? kCodes * reach(1) : kEverything;
        }
        if (product.count(op)) return reach(0) * reach(1) * kMostSummed + reach(2);
        if (op == "Add" || op == "Sub") return reach(0) + reach(1);
        if (op == "Mul") return reach(0) * reach(1);
        if (op == "PRelu") return reach(0) * std::max(1.0, reach(1));
        if (op == "Max" || op == "Min" || op == "Concat") {
            double most = 0;
            for (size_t i = 0; i < node.inputs.size(); ++i) most = std::max(most, reach(i));
            return most;
        }
        return kEverything;
    }

    const Range& input(const Node& node, size_t place) const { return found_[node.inputs[place]]; }
    bool has(const Node& node, size_t place) const { return place < node.inputs.size() && node.inputs[place] != kNone; }

    bool of(const Node& node, Range* range) const {
        if (!has(node, 0)) return false;
        if (node.op == "QuantizeLinear") return quantize(node, range);
        if (node.op == "DequantizeLinear") return dequantize(node, range);
        if (node.op == "Clip") return clip(node, range);
        *range = input(node, 0);
        if (node.op == "Relu") {
            *range = {std::max(range->low, 0.0), std::max(range->high, 0.0)};
            return !is_code(graph_.values[node.outputs[0]]);
        }
        if (node.op == "Add") {
            if (!has(node, 1) || is_code(graph_.values[node.outputs[0]])) return false;
            *range = {range->low + input(node, 1).low, range->high + input(node, 1).high};
            return true;
        }
        if (node.op == "Concat") {
            for (size_t i = 1; i < node.inputs.size(); ++i) *range = hull(*range, input(node, i));
            return true;
        }
        if (node.op == "AveragePool") {
            *range = hull(*range, {0, 0});
            return !is_code(graph_.values[node.outputs[0]]);
        }
        return node.op == "MaxPool" || node.op == "Reshape" || node.op == "Flatten" || node.op == "Transpose" ||
               node.op == "Identity" || node.op == "Squeeze" || node.op == "Unsqueeze" || node.op == "GlobalMaxPool" ||
               (node.op == "GlobalAveragePool" && !is_code(graph_.values[node.outputs[0]]));
    }

    bool quantize(const Node& node, Range* range) const {
        float scale;
        int zero;
        bool is_signed;
        if (std::isinf(reach_[node.inputs[0]])) return false;  // of NaN the runtime makes any code
        if (!scalar_grid(graph_, node, &scale, &zero, &is_signed)) return false;
        const Range& real = input(node, 0);
        const auto code = [&](double value, double slack) {
            return std::min(std::max(std::nearbyint(value / scale + slack) + zero, 0.0), 255.0);
        };
        // Zero is the zero point in every arithmetic; elsewhere a value at a tie may go either way.
        *range = {real.low == 0 ? zero : code(real.low, -kNear), real.high == 0 ? zero : code(real.high, kNear)};
        return true;
    }

    bool dequantize(const Node& node, Range* range) const {
        float scale;
        int zero;
        bool is_signed;
        if (!scalar_grid(graph_, node, &scale, &zero, &is_signed)) return false;
        *range = {(input(node, 0).low - zero) * scale, (input(node, 0).high - zero) * scale};
        return true;
    }

    bool clip(const Node& node, Range* range) const {
        const Value& in = graph_.values[node.inputs[0]];
        if (!is_code(in)) return false;
        int low = 0, high = 255;
        for (size_t place = 1; place <= 2; ++place) {
            if (!has(node, place)) continue;
            const Value& limit = graph_.values[node.inputs[place]];
            if (limit.constant == nullptr || limit.count != 1 || limit.type != in.type) return false;
            (place == 1 ? low : high) = code_at(limit, 0);
        }
        if (low > high) return false;
        *range = {std::min<double>(std::max<double>(input(node, 0).low, low), high),
                  std::min<double>(std::max<double>(input(node, 0).high, low), high)};
        return true;
    }

    const Graph& graph_;
    std::vector<Range> found_;
    std::vector<double> reach_;  // largest magnitude of each value; infinite if it can be an infinity or NaN
};

}  // namespace

bool is_plain(const Node& node) {
    for (const char* name : {"block_size", "precision"}) {
        const auto found = node.ints.find(name);
        if (found != node.ints.end() && found->second != std::vector<int64_t>{0}) return false;
    }
    return true;
}

bool is_code(const Value& value) { return value.type == Type::kUint8 || value.type == Type::kInt8; }

int code_at(const Value& constant, size_t place) {
    return constant.type == Type::kInt8 ? static_cast<const int8_t*>(constant.constant)[place] + 128
                                        : static_cast<const uint8_t*>(constant.constant)[place];
}

bool scalar_grid(const Graph& graph, const Node& node, float* scale, int* zero, bool* is_signed) {
    if (node.inputs.size() < 2 || node.inputs[1] == kNone || node.inputs[0] == kNone || node.outputs.empty()) return false;
    const int coded = node.op == "QuantizeLinear" ? node.outputs[0] : node.inputs[0];
    if (coded == kNone || !is_plain(node)) return false;
    const Value& codes = graph.values[coded];
    const Value& step = graph.values[node.inputs[1]];
    if (!is_code(codes) || step.type != Type::kFloat || step.constant == nullptr || step.count != 1) return false;
    *scale = *static_cast<const float*>(step.constant);
    *is_signed = codes.type == Type::kInt8;
    *zero = *is_signed ? 128 : 0;
    if (!(*scale > 0) || !std::isfinite(*scale)) return false;
    if (node.inputs.size() < 3 || node.inputs[2] == kNone) return true;
    const Value& zeros = graph.values[node.inputs[2]];
    if (zeros.constant == nullptr || zeros.count != 1 || zeros.type != codes.type) return false;
    *zero = code_at(zeros, 0);
    return true;
}

std::vector<Range> find_ranges(const Graph& graph) { return Ranges(graph).find(); }

}  // namespace lowbit
