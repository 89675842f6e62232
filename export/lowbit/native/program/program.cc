// From a region's steps to a program: layouts, packed weights, places in the arena.
#include "program/program.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>

namespace lowbit {

namespace {

constexpr int kFewChannels = 16;
constexpr int kMostNarrowOutputs = 16, kMostNarrowInputs = 64;
constexpr size_t kFewestPositions = 192;  // three vectors

class Builder {
public:
    Builder(const Region& region, const Kernels* kernels) : region_(region), program_(std::make_unique<Program>()) {
        program_->kernels = kernels;
        program_->inputs = region.inputs;
        program_->outputs = region.outputs;
        is_slim_ = can_be_slim();
        for (const Port& port : region.tensors) ids_[port.name] = add_tensor(port.info, is_compact(port.name));
        for (const Step& step : region.steps)
            if (step.conv.is_lut && !is_flat(step.conv.shape)) widen_border(step);
    }

    std::unique_ptr<Program> build() {
        for (size_t i = 0; i < region_.inputs.size(); ++i)
            current_ = region_.inputs[i].name, push({OpKind::kImport, {static_cast<int>(i), -1}, ids_.at(region_.inputs[i].name), -1, {}});
        for (const Step& step : region_.steps) current_ = step.output, add_step(step);
        for (size_t i = 0; i < region_.outputs.size(); ++i)
            current_ = region_.outputs[i].name, push({OpKind::kExport, {ids_.at(region_.outputs[i].name), -1}, static_cast<int>(i), -1, {}});
        place();
        if (std::getenv("LOWBIT_PROFILE") != nullptr) program_->profile = std::make_unique<Profile>(program_->ops.size());
        return std::move(program_);
    }

private:
    // An image of few channels that only dot products read is kept without padding channels.
    bool is_compact(const std::string& name) const {
        const auto is_it = [&](const Port& port) { return port.name == name && port.info.channels < kFewChannels; };
        if (std::none_of(region_.inputs.begin(), region_.inputs.end(), is_it)) return false;
        return std::all_of(region_.steps.begin(), region_.steps.end(), [&](const Step& step) {
            const bool reads = std::count(step.inputs.begin(), step.inputs.end(), name) > 0;
            return !reads || step.kind == OpKind::kDotConv;
        });
    }

    const TensorInfo& info_of(const std::string& name) const {
        return std::find_if(region_.tensors.begin(), region_.tensors.end(), [&](const Port& port) { return port.name == name; })->info;
    }

    // Tensors of up to 16 channels are kept in 16 bytes a position where every step that touches one can do with that.
    bool can_be_slim() const {
        const auto is_few = [&](const std::string& name) { return info_of(name).channels <= kMostNarrowOutputs; };
        return program_->kernels->narrow_conv != nullptr &&
               std::all_of(region_.steps.begin(), region_.steps.end(), [&](const Step& step) {
                   const bool touches = is_few(step.output) || std::any_of(step.inputs.begin(), step.inputs.end(), is_few);
                   switch (step.kind) {
                       case OpKind::kLutConv: return !is_few(step.output) || is_narrow(step.conv, info_of(step.output));
                       case OpKind::kMaxPool:
                       case OpKind::kAverage:
                       case OpKind::kDepthwise:
                       case OpKind::kConcat: return !touches;
                       default: return true;
                   }
               });
    }

    static bool is_flat(const ConvShape& shape) {
        return shape.is_point() && shape.stride_h == 1 && shape.stride_w == 1 && shape.pad_top == 0 &&
               shape.pad_left == 0 && shape.pad_bottom == 0 && shape.pad_right == 0;
    }

    // Convolutions of one tensor share its indices, with the widest border that any of them wants.
    void widen_border(const Step& step) {
        const ConvShape& s = step.conv.shape;
        std::array<int, 4>& border = borders_[{step.inputs[0], step.conv.base}];
        border = {std::max(border[0], s.pad_top), std::max(border[1], s.pad_left), std::max(border[2], s.pad_bottom),
                  std::max(border[3], s.pad_right)};
    }

    int add_tensor(TensorInfo info, bool is_compact) {
        const size_t unit = is_slim_ && info.channels <= kMostNarrowOutputs ? kMostNarrowOutputs : kChannelUnit;
        info.stride = is_compact ? info.channels : round_up(info.channels, unit);
        program_->tensors.push_back(info);
        sizes_.push_back(info.bytes());
        return static_cast<int>(sizes_.size()) - 1;
    }

    void push(Op op) {
        op.name = current_;
        program_->ops.push_back(std::move(op));
    }

    void add_step(const Step& step) {
        const int in = ids_.at(step.inputs[0]), out = ids_.at(step.output);
        switch (step.kind) {
            case OpKind::kAdd:
                program_->sums.push_back(step.add);
                push({OpKind::kAdd, {in, ids_.at(step.inputs[1])}, out, static_cast<int>(program_->sums.size()) - 1, {}});
                break;
            case OpKind::kMap:
                program_->tables.push_back(step.table);
                push({OpKind::kMap, {in, -1}, out, static_cast<int>(program_->tables.size()) - 1, {}});
                break;
            case OpKind::kMaxPool:
            case OpKind::kAverage: add_pool(step, in, out); break;
            case OpKind::kConcat: add_concat(step, out); break;
            case OpKind::kDepthwise: add_depthwise(step.conv, in, out); break;
            default:
                if (step.conv.is_lut && is_narrow(step.conv, program_->tensors[out])) add_narrow(step.conv, in, out);
                else if (step.conv.is_lut) add_lut(step, in, out);
                else add_dot(step.conv, in, out);
        }
    }

    void add_pool(const Step& step, int in, int out) {
        PoolJob job = step.pool;
        job.height = program_->tensors[in].height;
        job.width = program_->tensors[in].width;
        job.stride = static_cast<int>(program_->tensors[in].stride);
        job.out_width = program_->tensors[out].width;
        if (step.average.is_global) job.kernel_h = job.height, job.kernel_w = job.width;
        program_->pools.push_back(job);
        program_->averages.push_back(step.average);
        push({step.kind, {in, -1}, out, static_cast<int>(program_->pools.size()) - 1, {}});
    }

    void add_concat(const Step& step, int out) {
        int channel = 0;  // one operation an input: the payload is where its channels go
        for (const std::string& name : step.inputs) {
            const int in = ids_.at(name);
            push({OpKind::kConcat, {in, -1}, out, channel, {}});
            channel += program_->tensors[in].channels;
        }
    }

    int stage(const Staging& staging, size_t bytes, OpKind kind) {
        for (size_t i = 0; i < program_->stagings.size(); ++i)
            if (serves(program_->stagings[i], staging)) return static_cast<int>(i);
        program_->stagings.push_back(staging);
        sizes_.push_back(bytes);
        program_->tensors.emplace_back();
        const int place = static_cast<int>(program_->stagings.size()) - 1;
        staging_tensor_.push_back(static_cast<int>(sizes_.size()) - 1);
        push({kind, {staging.source, -1}, staging_tensor_.back(), place, {}});
        return place;
    }

    // Whether indices that were made already hold what another convolution of the same tensor wants: the same activations
    // to a look-up, written in as many bits. Layers of one tensor may have weights of other widths, and so other formats.
    static bool serves(const Staging& made, const Staging& wanted) {
        if (made.layer == nullptr || wanted.layer == nullptr) return false;
        const LutLayer &a = *made.layer, &b = *wanted.layer;
        return a.format.group == b.format.group && a.format.act_bits == b.format.act_bits &&
               a.format.table_stride == b.format.table_stride && a.groups == b.groups && a.border == b.border &&
               a.shape.in_channels == b.shape.in_channels && made.source == wanted.source && made.zero == wanted.zero &&
               made.top == wanted.top && made.left == wanted.left && made.bottom == wanted.bottom && made.right == wanted.right;
    }

    Staging staging_of(int zero, int in, const std::array<int, 4>& border, size_t position) const {
        Staging staging;
        staging.source = in;
        staging.zero = zero;
        staging.top = border[0];
        staging.left = border[1];
        staging.bottom = border[2];
        staging.right = border[3];
        staging.position = position;
        staging.row = (program_->tensors[in].width + staging.left + staging.right) * position;
        staging.height = program_->tensors[in].height + staging.top + staging.bottom;
        return staging;
    }

    // Few channels on many positions: lanes are positions.
    bool is_narrow(const ConvSpec& spec, const TensorInfo& out) const {
        const ConvShape& s = spec.shape;
        return program_->kernels->narrow_conv != nullptr && spec.format.act_bits == 2 && s.out_channels <= kMostNarrowOutputs && s.stride_h == 1 &&
               s.stride_w == 1 && s.in_channels <= kMostNarrowInputs && out.positions() >= kFewestPositions;
    }

    void add_narrow(const ConvSpec& spec, int in, int out) {
        auto layer = std::make_unique<NarrowLayer>();
        if (!pack_narrow(spec.weights.data(), spec.shape, spec.requantize, spec.zero - spec.base, layer.get()))
            throw std::runtime_error("a claimed convolution does not fit 16-bit totals");
        const ConvShape& s = spec.shape;
        Staging staging = staging_of(spec.base, in, {s.pad_top, s.pad_left, s.pad_bottom, s.pad_right}, 1);
        staging.narrow = layer.get();
        staging.plane = round_up(staging.elements(), kLineBytes);
        const int place = stage(staging, staging.plane * layer->groups, OpKind::kPlanes);
        program_->narrow_layers.push_back(std::move(layer));
        push({OpKind::kNarrowConv, {staging_tensor_[place], place}, out, static_cast<int>(program_->narrow_layers.size()) - 1, {}});
    }

    void add_lut(const Step& step, int in, int out) {
        const ConvSpec& spec = step.conv;
        auto layer = std::make_unique<LutLayer>();
        if (!pack_lut(spec.weights.data(), spec.shape, spec.format, spec.requantize, spec.zero - spec.base, layer.get()))
            throw std::runtime_error("a claimed convolution does not fit 16-bit totals");
        const std::array<int, 4> border = is_flat(spec.shape) ? std::array<int, 4>{} : borders_.at({step.inputs[0], spec.base});
        Staging staging = staging_of(spec.base, in, border, layer->groups);
        staging.layer = layer.get();
        const int place = stage(staging, staging.elements() * sizeof(uint16_t), OpKind::kIndex);
        program_->lut_layers.push_back(std::move(layer));
        push({OpKind::kLutConv, {staging_tensor_[place], place}, out, static_cast<int>(program_->lut_layers.size()) - 1, {}});
    }

    void add_dot(const ConvSpec& spec, int in, int out) {
        auto layer = std::make_unique<DotLayer>();
        if (!pack_dot(spec, *program_->kernels, layer.get()))
            throw std::runtime_error("a claimed convolution does not fit 32-bit sums");
        const ConvShape& s = spec.shape;
        Staging staging = staging_of(spec.zero - spec.base, in, {s.pad_top, s.pad_left, s.pad_bottom, s.pad_right}, s.in_channels);
        staging.less = spec.base;
        const int place = stage(staging, staging.elements(), OpKind::kBorder);
        program_->dot_layers.push_back(std::move(layer));
        push({OpKind::kDotConv, {staging_tensor_[place], place}, out, static_cast<int>(program_->dot_layers.size()) - 1, {}});
    }

    void add_depthwise(const ConvSpec& spec, int in, int out) {
        auto layer = std::make_unique<DepthwiseLayer>();
        if (!pack_depthwise(spec, layer.get())) throw std::runtime_error("a claimed convolution does not fit 16-bit sums");
        const ConvShape& s = spec.shape;
        const Staging staging = staging_of(spec.zero, in, {s.pad_top, s.pad_left, s.pad_bottom, s.pad_right}, program_->tensors[in].stride);
        const int place = stage(staging, staging.elements(), OpKind::kBorder);
        program_->depthwise_layers.push_back(std::move(layer));
        push({OpKind::kDepthwise, {staging_tensor_[place], place}, out, static_cast<int>(program_->depthwise_layers.size()) - 1, {}});
    }

    // Tensors share memory where one is not needed any more when the other begins: first fit, in order of first use.
    void place() {
        const int count = static_cast<int>(sizes_.size()), steps = static_cast<int>(program_->ops.size());
        std::vector<int> first(count, steps), last(count, -1);
        for (int i = 0; i < steps; ++i) {
            const Op& op = program_->ops[i];
            const bool reads_second = op.kind == OpKind::kAdd;
            auto use = [&](int tensor) { first[tensor] = std::min(first[tensor], i); last[tensor] = std::max(last[tensor], i); };
            if (op.kind != OpKind::kImport) use(op.in[0]);
            if (reads_second) use(op.in[1]);
            if (op.kind != OpKind::kExport) use(op.out);
        }
        program_->offsets.assign(count, 0);
        std::vector<int> order;
        for (int t = 0; t < count; ++t)
            if (last[t] >= 0) order.push_back(t);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return first[a] < first[b]; });
        std::vector<int> placed;
        for (int t : order) {
            const size_t size = round_up(sizes_[t] + kSlack, kLineBytes);
            std::vector<std::pair<size_t, size_t>> taken;
            for (int other : placed)
                if (first[other] <= last[t] && first[t] <= last[other])
                    taken.emplace_back(program_->offsets[other], program_->offsets[other] + round_up(sizes_[other] + kSlack, kLineBytes));
            std::sort(taken.begin(), taken.end());
            size_t at = 0;
            for (const auto& range : taken) {
                if (at + size <= range.first) break;
                at = std::max(at, range.second);
            }
            program_->offsets[t] = at;
            program_->arena_bytes = std::max(program_->arena_bytes, at + size);
            placed.push_back(t);
        }
    }

    const Region& region_;
    std::unique_ptr<Program> program_;
    std::map<std::string, int> ids_;
    std::map<std::pair<std::string, int>, std::array<int, 4>> borders_;  // of a tensor's indices, with a base
    std::vector<size_t> sizes_;
    std::string current_;  // the tensor that is being made
    std::vector<int> staging_tensor_;
    bool is_slim_ = false;
};

}  // namespace

std::unique_ptr<Program> build_program(const Region& region, const Kernels* kernels) {
    return Builder(region, kernels).build();
}

}  // namespace lowbit
