// Which codes and real values can occur at each place of a graph.
#pragma once

#include <vector>

#include "graph/graph.h"

namespace lowbit {

struct Range {
    double low, high;  // of codes (int8: with 128 added) or of real values
};

// The scale and zero point of a QuantizeLinear or DequantizeLinear; false where they are not one constant each.
bool scalar_grid(const Graph& graph, const Node& node, float* scale, int* zero, bool* is_signed);

// Neither blocks nor an explicit precision (operators of opset 21 and later, where 0 is the default of both).
bool is_plain(const Node& node);

bool is_code(const Value& value);
int code_at(const Value& constant, size_t place);  // int8: with 128 added

std::vector<Range> find_ranges(const Graph& graph);

}  // namespace lowbit
