// Single operations for the tests, which call them through ctypes.
#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "runtime/processor.h"
#include "program/program.h"

#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))

namespace lowbit {
namespace {

enum Answer : int { kDone = 0, kNoKernels = 1, kRefused = 2 };

// Tasks last to first, or each on its own thread: they must not depend on an order.
class TestThreads : public Threads {
public:
    explicit TestThreads(bool is_parallel) : is_parallel_(is_parallel) {}
    void run(size_t tasks, void (*work)(void*, size_t), void* data) override {
        if (!is_parallel_) {
            for (size_t i = tasks; i-- > 0;) work(data, i);
            return;
        }
        std::vector<std::thread> threads;
        for (size_t i = 0; i < tasks; ++i) threads.emplace_back(work, data, i);
        for (std::thread& thread : threads) thread.join();
    }

private:
    bool is_parallel_;
};

int run_region(const char* isa, const Region& region, const std::vector<const uint8_t*>& inputs, uint8_t* out, bool is_parallel) {
    const Choice choice = choose_kernels(isa);
    if (choice.kernels == nullptr) return kNoKernels;
    try {
        const std::unique_ptr<Program> program = build_program(region, choice.kernels);
        Buffer arena(program->arena_bytes);
        std::memset(arena.as<uint8_t>(), 0xA5, program->arena_bytes);  // nothing may rely on fresh memory
        TestThreads threads(is_parallel);
        run_program(*program, inputs, {out}, arena.as<uint8_t>(), &threads);
    } catch (const std::exception&) {
        return kRefused;
    }
    return kDone;
}

Port port(const char* name, int channels, int height, int width) {
    Port made;
    made.name = name;
    made.info.channels = channels;
    made.info.height = height;
    made.info.width = width;
    return made;
}

Region region_of(Step step, const std::vector<Port>& inputs, const Port& output) {
    Region region;
    for (const Port& input : inputs) step.inputs.push_back(input.name);
    step.output = output.name;
    region.steps.push_back(std::move(step));
    region.inputs = inputs;
    region.outputs = {output};
    region.tensors = inputs;
    region.tensors.push_back(output);
    return region;
}

}  // namespace
}  // namespace lowbit

// `numbers`: in and out channels, height, width, kernel (2), strides (2), pads (top, left, bottom, right), zero points of
// input and output, lowest and highest code, whether by look-up, whether on threads, base of look-ups, whether depthwise.
LOWBIT_EXPORT int lowbit_test_conv(const char* isa, const int32_t* numbers, const int8_t* weights, const int32_t* bias,
                                   const float* scale, const uint8_t* codes, uint8_t* out) {
    using namespace lowbit;
    const int32_t* n = numbers;
    Step step;
    ConvSpec& spec = step.conv;
    spec.shape = {n[0], n[1], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11]};
    const ConvShape& s = spec.shape;
    spec.weights.assign(weights, weights + static_cast<size_t>(n[19] ? 1 : n[0]) * n[1] * n[4] * n[5]);
    spec.requantize.bias.assign(bias, bias + n[1]);
    spec.requantize.scale.assign(scale, scale + n[1]);
    spec.requantize.zero = n[13];
    spec.requantize.low = n[14];
    spec.requantize.high = n[15];
    spec.zero = n[12];
    spec.base = n[18];
    spec.is_depthwise = n[19] != 0;
    spec.is_lut = n[16] != 0;
    const size_t count = static_cast<size_t>(s.in_channels) * n[2] * n[3];
    spec.span = spec.zero - spec.base;
    for (size_t i = 0; i < count; ++i) spec.span = std::max(spec.span, codes[i] - spec.base);
    if (spec.is_lut) {
        const auto [lowest, highest] = std::minmax_element(spec.weights.begin(), spec.weights.end());
        const Choice choice = choose_kernels(isa);
        if (choice.kernels == nullptr) return kNoKernels;
        const LutFormat* const format = fitting_format(*choice.kernels, *lowest, *highest, spec.span);
        if (format == nullptr) return kRefused;
        spec.format = *format;
    }
    step.kind = spec.is_lut ? OpKind::kLutConv : spec.is_depthwise ? OpKind::kDepthwise : OpKind::kDotConv;
    const Region region = region_of(std::move(step), {port("x", n[0], n[2], n[3])},
                                    port("y", n[1], s.out_height(n[2]), s.out_width(n[3])));
    return run_region(isa, region, {codes}, out, n[17] != 0);
}

LOWBIT_EXPORT int lowbit_test_add(const char* isa, const lowbit::AddJob* job, int channels, int height, int width,
                                  const uint8_t* a, const uint8_t* b, uint8_t* out) {
    using namespace lowbit;
    Step step;
    step.kind = OpKind::kAdd;
    step.add = *job;
    const Region region = region_of(std::move(step), {port("a", channels, height, width), port("b", channels, height, width)},
                                    port("y", channels, height, width));
    return run_region(isa, region, {a, b}, out, false);
}

LOWBIT_EXPORT int lowbit_test_map(const char* isa, const uint8_t* table, int channels, int height, int width,
                                  const uint8_t* codes, uint8_t* out) {
    using namespace lowbit;
    Step step;
    step.kind = OpKind::kMap;
    std::memcpy(step.table.data(), table, 256);
    const Region region = region_of(std::move(step), {port("x", channels, height, width)}, port("y", channels, height, width));
    return run_region(isa, region, {codes}, out, false);
}

// `numbers`: channels, height, width, kernel (2), strides (2), pads (4).
LOWBIT_EXPORT int lowbit_test_max_pool(const char* isa, const int32_t* numbers, const uint8_t* codes, uint8_t* out) {
    using namespace lowbit;
    const int32_t* n = numbers;
    const ConvShape shape = {n[0], n[0], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10]};
    Step step;
    step.kind = OpKind::kMaxPool;
    step.pool = PoolJob{nullptr, nullptr, 0, 0, 0, 0, n[3], n[4], n[5], n[6], n[7], n[8]};
    const Region region = region_of(std::move(step), {port("x", n[0], n[1], n[2])},
                                    port("y", n[0], shape.out_height(n[1]), shape.out_width(n[2])));
    return run_region(isa, region, {codes}, out, false);
}
