// What a claimed region computes: operations on tensors of codes, in order.
//
// Codes are bytes. A tensor that is int8 in the file is kept with 128 added (`is_signed` of its port says so).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "layers/layer.h"

namespace lowbit {

enum class OpKind { kImport, kExport, kIndex, kBorder, kPlanes, kLutConv, kNarrowConv, kDotConv, kDepthwise, kAdd, kMap, kMaxPool, kConcat, kAverage };

struct TensorInfo {
    int channels = 0, height = 0, width = 0;
    size_t stride = 0;  // bytes a position
    size_t positions() const { return static_cast<size_t>(height) * width; }
    size_t bytes() const { return positions() * stride; }
};

// Averages, as ONNX Runtime computes them. Of a whole tensor, an integer sum:
//     round(float(sum of (code - zero)) * scale) + out_zero, scale = input scale / (output scale * positions)
// Of a window, single precision all the way, row by row; padding is no code, and counts only where the file says so:
//     round(sum of (scale * (code - zero)) / count / out_scale + out_zero)
struct AverageJob {
    bool is_global = false, counts_border = false;
    float scale = 0, out_scale = 1;
    int zero = 0, out_zero = 0;
};

struct Op {
    OpKind kind;
    std::array<int, 2> in{-1, -1};  // tensors; of kImport: a port
    int out = -1;                   // a tensor; of kExport: a port
    int payload = -1;               // place in the program's layers, sums or tables
    std::string name;               // of the tensor it makes, as in the file
};

// An operation of the region as the file has it, with all its constants copied.
struct ConvSpec {
    ConvShape shape;
    std::vector<int8_t> weights;
    Requantize requantize;
    int zero = 0;  // of the input's codes
    int base = 0;  // the code that counts as activation 0
    int span = 255;  // the highest activation
    bool is_lut = false;
    LutFormat format{};    // of look-ups
    bool is_faster = false;  // than the runtime's own convolution of 8 bits
    bool is_depthwise = false;  // weights [channels][1][kh][kw]
};

struct Step {  // what the claimer hands over: one tensor from one or two others, by value names
    OpKind kind;
    std::vector<std::string> inputs;
    std::string output;
    ConvSpec conv;
    AddJob add;
    std::array<uint8_t, 256> table{};
    PoolJob pool{};
    AverageJob average{};
};

struct Port {
    std::string name;
    bool is_signed = false;
    TensorInfo info;
};

struct Region {
    std::vector<Step> steps;      // in order
    std::vector<Port> inputs;     // codes that come from outside
    std::vector<Port> outputs;
    std::vector<Port> tensors;    // every tensor by name, inputs included
    std::vector<const void*> nodes;
};

// Padded rows of a tensor: indices of look-up layers, or bytes of dot-product layers.
struct Staging {
    int source = -1;  // tensor
    int zero = 0;     // bytes: what the border is filled with; indices: the code that is activation 0
    int less = 0;     // bytes: taken off each code
    int top = 0, left = 0, bottom = 0, right = 0;
    const LutLayer* layer = nullptr;  // of indices
    const NarrowLayer* narrow = nullptr;  // of planes
    size_t plane = 0;                 // bytes from one group to the next
    size_t position = 0;              // elements: groups, or bytes
    size_t row = 0;                   // elements
    int height = 0;
    size_t elements() const { return row * height; }
};

// The shortest time of each operation over all images; kept where the environment variable LOWBIT_PROFILE names a file.
struct Profile {
    explicit Profile(size_t operations) : nanoseconds(operations) {
        for (auto& each : nanoseconds) each = INT64_MAX;
    }
    std::vector<std::atomic<int64_t>> nanoseconds;
};

struct Program {
    const Kernels* kernels = nullptr;
    std::unique_ptr<Profile> profile;  // null: not asked for
    std::vector<TensorInfo> tensors;   // stagings have an entry too (bytes in `sizes`)
    std::vector<size_t> offsets;       // in the arena
    std::vector<Op> ops;
    std::vector<std::unique_ptr<LutLayer>> lut_layers;
    std::vector<std::unique_ptr<NarrowLayer>> narrow_layers;
    std::vector<std::unique_ptr<DotLayer>> dot_layers;
    std::vector<std::unique_ptr<DepthwiseLayer>> depthwise_layers;
    std::vector<Staging> stagings;
    std::vector<AddJob> sums;
    std::vector<std::array<uint8_t, 256>> tables;
    std::vector<PoolJob> pools;
    std::vector<AverageJob> averages;  // by the place of their window in `pools`
    std::vector<Port> inputs, outputs;
    size_t arena_bytes = 0;
};

// Runs `work(i)` for i below `tasks`, on as many threads as there are.
class Threads {
public:
    virtual ~Threads() = default;
    virtual void run(size_t tasks, void (*work)(void*, size_t), void* data) = 0;
};

std::unique_ptr<Program> build_program(const Region& region, const Kernels* kernels);

// Inputs and outputs are one image each, [channels][height][width], in the order of the program's ports.
void run_program(const Program& program, const std::vector<const uint8_t*>& inputs, const std::vector<uint8_t*>& outputs,
                 uint8_t* arena, Threads* threads);

// Append one line of JSON: name, kind and nanoseconds of each operation.
void write_profile(const Program& program, const char* path);

// Averages of the windows of some rows of the output.
void average_pool(const PoolJob& pool, const AverageJob& average, int channels, int first_row, int last_row);

bool pack_dot(const ConvSpec& spec, const Kernels& kernels, DotLayer* layer);
bool pack_depthwise(const ConvSpec& spec, DepthwiseLayer* layer);

}  // namespace lowbit
