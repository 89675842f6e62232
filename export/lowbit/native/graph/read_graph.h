// A runtime's graph as plain values.
#pragma once

#include "graph/graph.h"
#include "runtime/ort_abi.h"

namespace lowbit {

// Throws std::runtime_error with the runtime's status released where it refuses to answer.
Graph read_graph(const ort::Api& api, const OrtGraph* graph);

void check(const ort::Api& api, OrtStatus* status);

}  // namespace lowbit
