// Which declared sizes a run can be relied on to have.
#pragma once

#include <vector>

#include "graph/graph.h"

namespace lowbit {

// For each value, whether its height and width may be others in a run than the graph declares: behind a pooling with
// ceil_mode whose last window is wholly outside the tensor. Shape inference counts that window up to opset 21, and the
// runtime's kernel leaves it out. Likewise behind a transposed convolution with auto_pad.
std::vector<bool> find_uncertain_sizes(const Graph& graph);

// For each value, a number that is the same where the batch is: two values of one number have equally many rows in every
// run, even if the graph does not say how many.
std::vector<int> find_batches(const Graph& graph);

}  // namespace lowbit
