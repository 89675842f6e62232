// Steps that could be claimed, each by itself.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "graph/arithmetic.h"
#include "graph/graph.h"
#include "program/program.h"
#include "graph/ranges.h"
#include "graph/sizes.h"

namespace lowbit {

constexpr int64_t kLongestSide = 1 << 15, kMostBytes = int64_t{1} << 30;
constexpr int kMostBorder = 64, kMostKernel = 64, kMostStride = 64;

struct Real {    // a real tensor that is known to be a grid's values
    int codes;   // the value that holds the codes; the tensor itself where an operator on real values made them
    Grid grid;
    int node;    // that made it: a DequantizeLinear, or a MaxPool
};

struct Candidate {
    Step step;
    std::vector<int> nodes;     // without DequantizeLinear of its tensors
    std::vector<int> reals;     // real tensors that it reads
    std::vector<int> inputs;    // values that hold codes
    int output = kNone;         // value that holds codes
    bool makes_real = false;    // the output is a real tensor of the graph
};

class Matcher {
public:
    Matcher(const Graph& graph, const Kernels* kernels);
    std::vector<Candidate> match();

    const std::map<int, Real>& reals() const { return reals_; }
    // Channels, height and width where all are known, certain and small enough; no stride.
    bool tensor_info(int value, TensorInfo* info) const;
    bool is_signed(int value) const;
    bool becomes_unsigned(int codes) const;  // the runtime turns int8 into uint8 there

private:
    std::optional<Candidate> at(int node);
    std::optional<Candidate> convolution(int node);
    std::optional<Candidate> sum(int node);
    std::optional<Candidate> requantize(int node);
    std::optional<Candidate> clip(int node);
    std::optional<Candidate> max_pool(int node);
    std::optional<Candidate> average_pool(int node);
    std::optional<Candidate> concat(int node);
    std::optional<Candidate> sum_with_constant(int node, int constant, int real, const Grid& to, int quantize);

    bool window_of(const Node& node, ConvShape* shape) const;
    int dequantizer_of(int value) const;
    bool weights_of(const Node& node, ConvSpec* spec, std::vector<float>* scales, std::vector<int>* nodes) const;
    bool bias_of(const Node& node, float input_scale, const std::vector<float>& scales, ConvSpec* spec,
                 std::vector<int>* nodes) const;
    bool fits(ConvSpec* spec, const Real& real) const;
    Range codes_of(const Real& real) const;

    int single_reader(int value) const;      // the only node that uses it, else kNone
    int quantizer_of(int node, Grid* grid) const;
    bool grid_of(int node, Grid* grid) const;
    bool fuses(const std::vector<int>& codes) const;

    const Graph& graph_;
    const Kernels* kernels_;
    std::vector<Range> ranges_;
    std::vector<bool> uncertain_sizes_;
    std::vector<int> batches_;
    std::map<int, Real> reals_;
};

// An attribute of integers, or what stands for it where it is absent.
std::vector<int64_t> ints(const Node& node, const char* name, std::vector<int64_t> otherwise);

// Whether windows are within the padded tensor and as many as the output has positions.
bool makes(const ConvShape& shape, const TensorInfo& in, const TensorInfo& out);

bool in_limits(const std::vector<int64_t>& values, size_t count, int64_t low, int64_t high);

}  // namespace lowbit
