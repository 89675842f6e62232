// Running a program on one image: each operation cut into tasks for the runtime's threads.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>

#include "program/program.h"

namespace lowbit {

namespace {

constexpr size_t kTaskWork = 1 << 16;  // look-up lanes, bytes or so: less is not worth a separate task
constexpr size_t kMostTasks = 16;

struct Running {
    const Program& program;
    const std::vector<const uint8_t*>& inputs;
    const std::vector<uint8_t*>& outputs;
    uint8_t* arena;

    template <typename T = uint8_t> T* at(int tensor) const {
        return reinterpret_cast<T*>(arena + program.offsets[tensor]);
    }
};

// One operation: `units` may be done in any order and in any ranges.
struct Work {
    const Running& run;
    const Op& op;
    size_t units, tasks;
    void (*part)(const Running&, const Op&, size_t first, size_t last);
};

void import_part(const Running& run, const Op& op, size_t first, size_t last) {
    const TensorInfo& to = run.program.tensors[op.out];
    const uint8_t flip = run.program.inputs[op.in[0]].is_signed ? 0x80 : 0;
    run.program.kernels->import_planes(run.inputs[op.in[0]], to.channels, to.positions(), run.at(op.out), to.stride, flip,
                                       first * to.width, last * to.width);
}

void export_part(const Running& run, const Op& op, size_t first, size_t last) {
    const TensorInfo& from = run.program.tensors[op.in[0]];
    const uint8_t flip = run.program.outputs[op.out].is_signed ? 0x80 : 0;
    run.program.kernels->export_planes(run.at(op.in[0]), from.stride, from.channels, from.positions(), run.outputs[op.out],
                                       flip, static_cast<int>(first), static_cast<int>(last));
}

void fill(uint16_t* to, size_t count, int value) {
    for (size_t i = 0; i < count; ++i) to[i] = static_cast<uint16_t>(value);
}

void index_part(const Running& run, const Op& op, size_t first, size_t last) {
    const Staging& staging = run.program.stagings[op.payload];
    const TensorInfo& from = run.program.tensors[staging.source];
    const size_t groups = staging.layer->groups;
    for (size_t y = first; y < last; ++y) {
        uint16_t* const row = run.at<uint16_t>(op.out) + y * staging.row;
        const ptrdiff_t source = static_cast<ptrdiff_t>(y) - staging.top;
        if (source < 0 || source >= from.height) {
            fill(row, staging.row, staging.layer->border);
            continue;
        }
        fill(row, staging.left * groups, staging.layer->border);
        run.program.kernels->pack_index(run.at(staging.source) + source * from.width * from.stride, from.stride, from.width,
                                        *staging.layer, staging.zero, row + staging.left * groups);
        fill(row + (staging.left + from.width) * groups, staging.right * groups, staging.layer->border);
    }
}

void planes_part(const Running& run, const Op& op, size_t first, size_t last) {
    const Staging& staging = run.program.stagings[op.payload];
    const TensorInfo& from = run.program.tensors[staging.source];
    const NarrowLayer& layer = *staging.narrow;
    for (size_t y = first; y < last; ++y) {
        uint8_t* const row = run.at(op.out) + y * staging.row;
        const ptrdiff_t source = static_cast<ptrdiff_t>(y) - staging.top;
        const bool is_outside = source < 0 || source >= from.height;
        const size_t left = is_outside ? staging.row : staging.left, right = is_outside ? 0 : staging.right;
        for (int g = 0; g < layer.groups; ++g) {  // a byte or two each, but for the rows outside
            uint8_t *const first = row + g * staging.plane, *const last = first + staging.row;
            for (uint8_t* at = first; at < first + left; ++at) *at = static_cast<uint8_t>(layer.border);
            for (uint8_t* at = last - right; at < last; ++at) *at = static_cast<uint8_t>(layer.border);
        }
        if (is_outside) continue;
        run.program.kernels->pack_planes(run.at(staging.source) + source * from.width * from.stride, from.stride, from.width, layer,
                                         staging.zero, row + staging.left, staging.plane);
    }
}

// Vectors of 64 positions from the first to the last output, counted along padded rows.
size_t narrow_vectors(const Staging& staging, const TensorInfo& out) {
    return ((out.height - 1) * staging.row + out.width + 63) / 64;
}

void narrow_part(const Running& run, const Op& op, size_t first, size_t last) {
    const Staging& staging = run.program.stagings[op.in[1]];
    const TensorInfo& to = run.program.tensors[op.out];
    run.program.kernels->narrow_conv({run.program.narrow_layers[op.payload].get(), run.at(op.in[0]), staging.plane, staging.row,
                                      run.at(op.out), to.stride, to.height, to.width},
                                     static_cast<int>(first), static_cast<int>(last));
}

void subtract(const uint8_t* codes, size_t stride, int width, size_t position, int less, uint8_t* to) {
    for (int x = 0; x < width; ++x, codes += stride, to += position)
        for (size_t c = 0; c < position; ++c) to[c] = static_cast<uint8_t>(codes[c] - less);
}

void border_part(const Running& run, const Op& op, size_t first, size_t last) {
    const Staging& staging = run.program.stagings[op.payload];
    const TensorInfo& from = run.program.tensors[staging.source];
    const size_t position = staging.position;
    for (size_t y = first; y < last; ++y) {
        uint8_t* const row = run.at(op.out) + y * staging.row;
        const ptrdiff_t source = static_cast<ptrdiff_t>(y) - staging.top;
        if (source < 0 || source >= from.height) {
            std::memset(row, staging.zero, staging.row);
            continue;
        }
        std::memset(row, staging.zero, staging.left * position);
        const uint8_t* codes = run.at(staging.source) + source * from.width * from.stride;
        uint8_t* to = row + staging.left * position;
        if (staging.less != 0) subtract(codes, from.stride, from.width, position, staging.less, to);
        else if (from.stride == position) std::memcpy(to, codes, from.width * position);
        else for (int x = 0; x < from.width; ++x) std::memcpy(to + x * position, codes + x * from.stride, position);
        std::memset(to + from.width * position, staging.zero, staging.right * position);
    }
}

struct Window {  // of a convolution in its staging
    size_t offset;
    size_t row;
    int rows, width;  // of the output
};

// A 1x1 convolution of stride 1 without borders is one long row of positions.
Window window_of(const Staging& staging, const ConvShape& shape, const TensorInfo& out, size_t position) {
    const size_t offset = (staging.top - shape.pad_top) * staging.row + (staging.left - shape.pad_left) * position;
    const bool is_flat = shape.is_point() && shape.stride_h == 1 && shape.stride_w == 1 &&
                         staging.row == out.width * position && offset == 0;
    if (is_flat) return {0, 0, 1, out.height * out.width};
    return {offset, staging.row, out.height, out.width};
}

constexpr int kFlatPart = 28;  // positions of a flat convolution in one unit: four tiles of seven

// Units of a convolution: blocks of channels outside, rows (or parts of a flat row) inside.
size_t conv_rows(const Window& window) {
    return window.rows == 1 ? (window.width + kFlatPart - 1) / kFlatPart : window.rows;
}

template <typename Job, typename Element, typename Call>
void conv_part(Job job, const Window& window, size_t step, Element* source, uint8_t* out, size_t first, size_t last,
               Call call) {
    const size_t rows = conv_rows(window);
    for (size_t unit = first; unit < last;) {
        const size_t block = unit / rows, row = unit % rows, end = std::min(last - block * rows, rows);
        if (window.rows == 1) {
            const int x0 = static_cast<int>(row) * kFlatPart, x1 = std::min<int>(static_cast<int>(end) * kFlatPart, window.width);
            job.out = out + x0 * job.out_stride;
            job.out_width = x1 - x0;
            call(job, source + window.offset + x0 * step, block, 0, 1);
        } else {
            job.out = out;
            job.out_width = window.width;
            call(job, source + window.offset, block, static_cast<int>(row), static_cast<int>(end));
        }
        unit = block * rows + end;
    }
}

Window lut_window(const Running& run, const Op& op) {
    const LutLayer& layer = *run.program.lut_layers[op.payload];
    return window_of(run.program.stagings[op.in[1]], layer.shape, run.program.tensors[op.out], layer.groups);
}

void lut_part(const Running& run, const Op& op, size_t first, size_t last) {
    const LutLayer& layer = *run.program.lut_layers[op.payload];
    const Window window = lut_window(run, op);
    LutJob job{&layer, nullptr, window.row, nullptr, run.program.tensors[op.out].stride, 0};
    conv_part(job, window, static_cast<size_t>(layer.shape.stride_w) * layer.groups, run.at<const uint16_t>(op.in[0]),
              run.at(op.out), first, last, [&](LutJob& j, const uint16_t* from, size_t block, int y0, int y1) {
                  j.index = from;
                  run.program.kernels->lut_conv(j, layer.blocks[block], y0, y1);
              });
}

Window dot_window(const Running& run, const Op& op) {
    const DotLayer& layer = *run.program.dot_layers[op.payload];
    return window_of(run.program.stagings[op.in[1]], layer.shape, run.program.tensors[op.out], layer.shape.in_channels);
}

void dot_part(const Running& run, const Op& op, size_t first, size_t last) {
    const DotLayer& layer = *run.program.dot_layers[op.payload];
    const Window window = dot_window(run, op);
    DotJob job{&layer, nullptr, window.row, nullptr, run.program.tensors[op.out].stride, 0};
    conv_part(job, window, static_cast<size_t>(layer.shape.stride_w) * layer.shape.in_channels,
              run.at<const uint8_t>(op.in[0]), run.at(op.out), first, last,
              [&](DotJob& j, const uint8_t* from, size_t block, int y0, int y1) {
                  j.source = from;
                  run.program.kernels->dot_conv(j, static_cast<int>(block), y0, y1);
              });
}

void depthwise_part(const Running& run, const Op& op, size_t first, size_t last) {
    const DepthwiseLayer& layer = *run.program.depthwise_layers[op.payload];
    const Staging& staging = run.program.stagings[op.in[1]];
    const TensorInfo& to = run.program.tensors[op.out];
    run.program.kernels->depthwise({&layer, run.at(op.in[0]), staging.row, run.at(op.out), to.stride, to.width},
                                   static_cast<int>(first), static_cast<int>(last));
}

void concat_part(const Running& run, const Op& op, size_t first, size_t last) {
    const TensorInfo &from = run.program.tensors[op.in[0]], &to = run.program.tensors[op.out];
    const uint8_t* source = run.at(op.in[0]) + first * from.width * from.stride;
    uint8_t* out = run.at(op.out) + first * to.width * to.stride + op.payload;
    for (size_t i = 0; i < (last - first) * to.width; ++i, source += from.stride, out += to.stride)
        std::memcpy(out, source, from.channels);
}

// Rows, or the whole tensor where rows are no whole vectors: a vector that hangs over must not meet another task.
size_t element_units(const TensorInfo& info) { return info.width * info.stride % kLineBytes == 0 ? info.height : 1; }
size_t unit_bytes(const TensorInfo& info) { return info.bytes() / element_units(info); }

void add_part(const Running& run, const Op& op, size_t first, size_t last) {
    const size_t row = unit_bytes(run.program.tensors[op.out]), from = first * row;
    run.program.kernels->add(run.program.sums[op.payload], run.at(op.in[0]) + from, run.at(op.in[1]) + from,
                             run.at(op.out) + from, (last - first) * row);
}

void map_part(const Running& run, const Op& op, size_t first, size_t last) {
    const size_t row = unit_bytes(run.program.tensors[op.out]), from = first * row;
    run.program.kernels->map(run.program.tables[op.payload].data(), run.at(op.in[0]) + from, run.at(op.out) + from,
                             (last - first) * row);
}

void pool_part(const Running& run, const Op& op, size_t first, size_t last) {
    PoolJob job = run.program.pools[op.payload];
    job.source = run.at(op.in[0]);
    job.out = run.at(op.out);
    run.program.kernels->max_pool(job, static_cast<int>(first), static_cast<int>(last));
}

void average_part(const Running& run, const Op& op, size_t first, size_t last) {
    PoolJob job = run.program.pools[op.payload];
    job.source = run.at(op.in[0]);
    job.out = run.at(op.out);
    average_pool(job, run.program.averages[op.payload], run.program.tensors[op.out].channels, static_cast<int>(first), static_cast<int>(last));
}

size_t lut_work(const LutLayer& layer, const TensorInfo& out) {
    return out.positions() * layer.groups * layer.shape.kernel_h * layer.shape.kernel_w * layer.shape.out_channels;
}

Work work_of(const Running& run, const Op& op) {
    const Program& p = run.program;
    auto make = [&](size_t units, size_t work, decltype(Work::part) part) {
        return Work{run, op, units, std::max<size_t>(1, std::min({units, work / kTaskWork, kMostTasks})), part};
    };
    switch (op.kind) {
        case OpKind::kImport: return make(p.tensors[op.out].height, p.tensors[op.out].bytes(), import_part);
        case OpKind::kExport: return make(p.tensors[op.in[0]].channels, p.tensors[op.in[0]].bytes(), export_part);
        case OpKind::kIndex: return make(p.stagings[op.payload].height, p.tensors[p.stagings[op.payload].source].bytes(), index_part);
        case OpKind::kBorder: return make(p.stagings[op.payload].height, p.tensors[p.stagings[op.payload].source].bytes(), border_part);
        case OpKind::kPlanes: return make(p.stagings[op.payload].height, p.tensors[p.stagings[op.payload].source].bytes(), planes_part);
        case OpKind::kNarrowConv: {
            const NarrowLayer& layer = *p.narrow_layers[op.payload];
            const size_t taps = static_cast<size_t>(layer.groups) * layer.shape.kernel_h * layer.shape.kernel_w;
            return make(narrow_vectors(p.stagings[op.in[1]], p.tensors[op.out]),
                        p.tensors[op.out].positions() * taps * layer.shape.out_channels, narrow_part);
        }
        case OpKind::kLutConv: {
            const LutLayer& layer = *p.lut_layers[op.payload];
            return make(layer.blocks.size() * conv_rows(lut_window(run, op)), lut_work(layer, p.tensors[op.out]), lut_part);
        }
        case OpKind::kDotConv: {
            const ConvShape& shape = p.dot_layers[op.payload]->shape;
            const size_t blocks = round_up(shape.out_channels, kChannelUnit) / kChannelUnit;
            return make(blocks * conv_rows(dot_window(run, op)),
                        p.tensors[op.out].positions() * shape.out_channels * shape.in_channels * shape.kernel_h, dot_part);
        }
        case OpKind::kDepthwise: return make(p.tensors[op.out].height, 8 * p.tensors[op.out].bytes(), depthwise_part);
        case OpKind::kConcat: return make(p.tensors[op.out].height, p.tensors[op.in[0]].bytes(), concat_part);
        case OpKind::kAdd: return make(element_units(p.tensors[op.out]), p.tensors[op.out].bytes(), add_part);
        case OpKind::kMap: return make(element_units(p.tensors[op.out]), p.tensors[op.out].bytes(), map_part);
        case OpKind::kAverage: return make(p.tensors[op.out].height, 4 * p.tensors[op.in[0]].bytes(), average_part);
        case OpKind::kMaxPool: break;
    }
    return make(p.tensors[op.out].height, p.tensors[op.out].bytes(), pool_part);
}

void run_task(void* data, size_t task) {
    const Work& work = *static_cast<const Work*>(data);
    work.part(work.run, work.op, work.units * task / work.tasks, work.units * (task + 1) / work.tasks);
}

}  // namespace

void run_program(const Program& program, const std::vector<const uint8_t*>& inputs, const std::vector<uint8_t*>& outputs,
                 uint8_t* arena, Threads* threads) {
    const Running run{program, inputs, outputs, arena};
    using Clock = std::chrono::steady_clock;
    for (size_t i = 0; i < program.ops.size(); ++i) {
        const Clock::time_point start = program.profile ? Clock::now() : Clock::time_point();
        Work work = work_of(run, program.ops[i]);
        if (work.tasks == 1) run_task(&work, 0);
        else threads->run(work.tasks, run_task, &work);
        if (!program.profile) continue;
        const int64_t spent = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
        std::atomic<int64_t>& least = program.profile->nanoseconds[i];
        least = std::min(least.load(), spent);
    }
}

// Names come from files: quotes, backslashes and control characters are escaped.
static std::string json_text(const std::string& text) {
    std::string out;
    char code[8];
    for (const unsigned char each : text)
        if (each == '"' || each == '\\') {
            out += '\\';
            out += static_cast<char>(each);
        } else if (each < 0x20) {
            std::snprintf(code, sizeof code, "\\u%04x", each);
            out += code;
        } else {
            out += static_cast<char>(each);
        }
    return out;
}

void write_profile(const Program& program, const char* path) {
    constexpr const char* kinds[] = {"import", "export", "index", "border", "planes", "lut_conv", "narrow_conv", "dot_conv", "depthwise",
                                     "add",    "map",    "max_pool", "concat", "average"};
    std::FILE* const file = std::fopen(path, "a");
    if (file == nullptr) return;
    std::fprintf(file, "{\"kernels\": \"%s\", \"operations\": [", program.kernels->name);
    for (size_t i = 0; i < program.ops.size(); ++i) {
        const int64_t least = program.profile->nanoseconds[i].load();
        std::fprintf(file, "%s{\"name\": \"%s\", \"kind\": \"%s\", \"nanoseconds\": %s}", i ? ", " : "",
                     json_text(program.ops[i].name).c_str(), kinds[static_cast<int>(program.ops[i].kind)],
                     least == INT64_MAX ? "null" : std::to_string(least).c_str());  // null: it has never run
    }
    std::fprintf(file, "]}\n");
    std::fclose(file);
}

}  // namespace lowbit
