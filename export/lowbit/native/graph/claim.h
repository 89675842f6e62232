// Which parts of a graph this provider computes.
//
// A step is claimed only where its whole function is understood: constant grids of one scale, known shapes, weights
// and codes proven to fit into two bits. Steps that hang together without leaving the provider become one region; a
// region without a convolution on look-up tables is not worth the change of layout and is left alone.
#pragma once

#include <vector>

#include "graph/graph.h"
#include "program/program.h"

namespace lowbit {

std::vector<Region> claim(const Graph& graph, const Kernels* kernels);

}  // namespace lowbit
