// The execution provider: what ONNX Runtime calls.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "graph/claim.h"
#include "runtime/ort_abi.h"
#include "runtime/processor.h"
#include "program/program.h"
#include "graph/read_graph.h"

#define LOWBIT_EXPORT extern "C" __attribute__((visibility("default")))

namespace lowbit {
namespace {

constexpr const char* kName = "LowBitExecutionProvider";
constexpr const char* kVendor = "qkd-toolkit";
constexpr const char* kVersion = "0.2.0";

ort::Api api;

// No exception may leave the library: it becomes the runtime's status.
template <typename Body> OrtStatus* guarded(Body body) {
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        return api.CreateStatus(ort::kEpFail, (std::string(kName) + ": " + error.what()).c_str());
    } catch (...) {
        return api.CreateStatus(ort::kEpFail, "LowBitExecutionProvider: an unknown error");
    }
}

class RuntimeThreads : public Threads {
public:
    explicit RuntimeThreads(const OrtKernelContext* context) : context_(context) {}
    void run(size_t tasks, void (*work)(void*, size_t), void* data) override {
        check(api, api.KernelContext_ParallelFor(context_, work, tasks, 0, data));
    }

private:
    const OrtKernelContext* context_;
};

// Scratch memory belongs to a call: several may run at once. Returned memory is kept for the next one.
class Arenas {
public:
    explicit Arenas(size_t bytes) : bytes_(bytes) {}

    Buffer take() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!free_.empty()) {
                Buffer arena = std::move(free_.back());
                free_.pop_back();
                return arena;
            }
        }
        return Buffer(bytes_);
    }

    void give(Buffer arena) {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(arena));
    }

private:
    size_t bytes_;
    std::mutex mutex_;
    std::vector<Buffer> free_;
};

struct Kernel : OrtNodeComputeInfo {
    std::unique_ptr<Program> program;
    std::vector<size_t> input_places, output_places;  // of the program's ports among the fused node's
    std::unique_ptr<Arenas> arenas;

    ~Kernel() {
        if (program && program->profile) write_profile(*program, std::getenv("LOWBIT_PROFILE"));
    }

    std::vector<int64_t> input_shape(OrtKernelContext* context, size_t port, const uint8_t** data) const {
        const OrtValue* value = nullptr;
        check(api, api.KernelContext_GetInput(context, input_places[port], &value));
        OrtTensorTypeAndShapeInfo* info = nullptr;
        check(api, api.GetTensorTypeAndShape(value, &info));
        size_t rank = 0;
        std::vector<int64_t> shape;
        OrtStatus* status = api.GetDimensionsCount(info, &rank);
        if (status == nullptr) {
            shape.resize(rank);
            status = api.GetDimensions(info, shape.data(), rank);
        }
        api.ReleaseTensorTypeAndShapeInfo(info);
        check(api, status);
        const void* bytes = nullptr;
        check(api, api.GetTensorData(value, &bytes));
        *data = static_cast<const uint8_t*>(bytes);
        return shape;
    }

    void run(OrtKernelContext* context) const {
        const size_t inputs = program->inputs.size(), outputs = program->outputs.size();
        std::vector<const uint8_t*> from(inputs);
        int64_t batch = -1;
        for (size_t i = 0; i < inputs; ++i) {
            const TensorInfo& info = program->inputs[i].info;
            const std::vector<int64_t> shape = input_shape(context, i, &from[i]);
            if (shape.size() != 4 || shape[1] != info.channels || shape[2] != info.height || shape[3] != info.width ||
                (batch >= 0 && shape[0] != batch))
                throw std::runtime_error("an input has another shape than the file declares: " + program->inputs[i].name);
            batch = shape[0];
        }
        std::vector<uint8_t*> to(outputs);
        for (size_t i = 0; i < outputs; ++i) {
            const TensorInfo& info = program->outputs[i].info;
            const int64_t shape[4] = {batch, info.channels, info.height, info.width};
            OrtValue* value = nullptr;
            void* bytes = nullptr;
            check(api, api.KernelContext_GetOutput(context, output_places[i], shape, 4, &value));
            check(api, api.GetTensorMutableData(value, &bytes));
            to[i] = static_cast<uint8_t*>(bytes);
        }
        RuntimeThreads threads(context);
        Buffer arena = arenas->take();
        for (int64_t image = 0; image < batch; ++image) {
            run_program(*program, from, to, arena.as<uint8_t>(), &threads);
            for (size_t i = 0; i < inputs; ++i) from[i] += program->inputs[i].info.channels * program->inputs[i].info.positions();
            for (size_t i = 0; i < outputs; ++i) to[i] += program->outputs[i].info.channels * program->outputs[i].info.positions();
        }
        arenas->give(std::move(arena));
    }
};

OrtStatus* create_state(OrtNodeComputeInfo* self, OrtNodeComputeContext*, void** state) {
    *state = self;
    return nullptr;
}

OrtStatus* compute(OrtNodeComputeInfo* self, void*, OrtKernelContext* context) {
    return guarded([&] { static_cast<const Kernel*>(self)->run(context); });
}

void release_state(OrtNodeComputeInfo*, void*) {}

struct Provider : OrtEp {
    const Kernels* kernels = nullptr;
    const OrtLogger* logger = nullptr;
    std::vector<Region> regions;  // claimed and not compiled yet

    void claim_parts(const OrtGraph* graph, OrtEpGraphSupportInfo* support) {
        std::vector<Region> found = claim(read_graph(api, graph), kernels);
        OrtNodeFusionOptions options{};
        options.ort_version_supported = kOrtApiVersion;
        options.drop_constant_initializers = true;
        for (Region& region : found) {
            std::vector<const OrtNode*> nodes;
            for (const void* node : region.nodes) nodes.push_back(static_cast<const OrtNode*>(node));
            check(api, api.EpGraphSupportInfo_AddNodesToFuse(support, nodes.data(), nodes.size(), &options));
            regions.push_back(std::move(region));
        }
    }

    static std::vector<std::string> names(const OrtNode* node, OrtStatus* (*count)(const OrtNode*, size_t*),
                                          OrtStatus* (*get)(const OrtNode*, const OrtValueInfo**, size_t)) {
        size_t size = 0;
        check(api, count(node, &size));
        std::vector<const OrtValueInfo*> infos(size);
        if (size) check(api, get(node, infos.data(), size));
        std::vector<std::string> found;
        for (const OrtValueInfo* info : infos) {
            const char* name = nullptr;
            if (info != nullptr) check(api, api.GetValueInfoName(info, &name));
            found.push_back(name ? name : "");
        }
        return found;
    }

    static std::vector<size_t> places(const std::vector<Port>& ports, const std::vector<std::string>& all) {
        std::vector<size_t> found;
        for (const Port& port : ports) {
            size_t place = 0;
            while (place < all.size() && all[place] != port.name) ++place;
            if (place == all.size()) throw std::runtime_error("a fused node lacks the tensor " + port.name);
            found.push_back(place);
        }
        return found;
    }

    std::unique_ptr<Kernel> compile(const OrtNode* fused) {
        const auto inputs = names(fused, api.Node_GetNumInputs, api.Node_GetInputs);
        const auto outputs = names(fused, api.Node_GetNumOutputs, api.Node_GetOutputs);
        for (Region& region : regions) {
            if (region.outputs.empty()) continue;
            bool is_it = false;
            for (const std::string& name : outputs) is_it = is_it || name == region.outputs[0].name;
            if (!is_it) continue;
            auto kernel = std::make_unique<Kernel>();
            OrtNodeComputeInfo& info = *kernel;
            info = {kOrtApiVersion, create_state, compute, release_state};
            kernel->program = build_program(region, kernels);
            kernel->input_places = places(region.inputs, inputs);
            kernel->output_places = places(region.outputs, outputs);
            kernel->arenas = std::make_unique<Arenas>(kernel->program->arena_bytes);
            region = Region{};  // its copies of the weights are not needed any more
            return kernel;
        }
        throw std::runtime_error("asked to compile a node that was not claimed");
    }
};

const char* ep_name(const OrtEp*) { return kName; }

OrtStatus* get_capability(OrtEp* self, const OrtGraph* graph, OrtEpGraphSupportInfo* support) {
    return guarded([&] { static_cast<Provider*>(self)->claim_parts(graph, support); });
}

OrtStatus* compile_nodes(OrtEp* self, const OrtGraph**, const OrtNode** fused, size_t count, OrtNodeComputeInfo** infos,
                         OrtNode**) {
    return guarded([&] {
        std::vector<std::unique_ptr<Kernel>> made;
        for (size_t i = 0; i < count; ++i) made.push_back(static_cast<Provider*>(self)->compile(fused[i]));
        for (size_t i = 0; i < count; ++i) infos[i] = made[i].release();
    });
}

void release_infos(OrtEp*, OrtNodeComputeInfo** infos, size_t count) {
    for (size_t i = 0; i < count; ++i) delete static_cast<Kernel*>(infos[i]);
}

struct Factory : OrtEpFactory {
    Choice choice{};
};

const char* factory_name(const OrtEpFactory*) { return kName; }
const char* factory_vendor(const OrtEpFactory*) { return kVendor; }
uint32_t factory_vendor_id(const OrtEpFactory*) { return 0; }
const char* factory_version(const OrtEpFactory*) { return kVersion; }

OrtStatus* supported_devices(OrtEpFactory* self, const OrtHardwareDevice* const* devices, size_t count,
                             OrtEpDevice** made, size_t most, size_t* made_count) {
    *made_count = 0;
    if (static_cast<Factory*>(self)->choice.kernels == nullptr) return nullptr;
    for (size_t i = 0; i < count && *made_count < most; ++i) {
        if (api.HardwareDevice_Type(devices[i]) != ort::kCpu) continue;
        if (OrtStatus* status = api.CreateEpDevice(self, devices[i], nullptr, nullptr, &made[*made_count])) return status;
        ++*made_count;
        break;  // one processor is enough
    }
    return nullptr;
}

OrtStatus* create_ep(OrtEpFactory* self, const OrtHardwareDevice* const*, const OrtKeyValuePairs* const*, size_t,
                     const OrtSessionOptions*, const OrtLogger* logger, OrtEp** made) {
    return guarded([&] {
        auto provider = std::make_unique<Provider>();
        OrtEp& ep = *provider;
        ep = OrtEp{};
        ep.ort_version_supported = kOrtApiVersion;
        ep.GetName = ep_name;
        ep.GetCapability = get_capability;
        ep.Compile = compile_nodes;
        ep.ReleaseNodeComputeInfos = release_infos;
        provider->kernels = static_cast<Factory*>(self)->choice.kernels;
        provider->logger = logger;
        *made = provider.release();
    });
}

void release_ep(OrtEpFactory*, OrtEp* ep) { delete static_cast<Provider*>(ep); }

OrtStatus* no_allocator(OrtEpFactory*, const OrtMemoryInfo*, const OrtKeyValuePairs*, OrtAllocator** allocator) {
    *allocator = nullptr;
    return nullptr;
}

void release_allocator(OrtEpFactory*, OrtAllocator*) {}

OrtStatus* no_data_transfer(OrtEpFactory*, OrtDataTransferImpl** transfer) {
    *transfer = nullptr;
    return nullptr;
}

bool is_stream_aware(const OrtEpFactory*) { return false; }

std::unique_ptr<Factory> make_factory() {
    auto made = std::make_unique<Factory>();
    OrtEpFactory& factory = *made;
    factory = OrtEpFactory{};
    factory.ort_version_supported = kOrtApiVersion;
    factory.GetName = factory_name;
    factory.GetVendor = factory_vendor;
    factory.GetSupportedDevices = supported_devices;
    factory.CreateEp = create_ep;
    factory.ReleaseEp = release_ep;
    factory.GetVendorId = factory_vendor_id;
    factory.GetVersion = factory_version;
    factory.CreateAllocator = no_allocator;
    factory.ReleaseAllocator = release_allocator;
    factory.CreateDataTransfer = no_data_transfer;
    factory.IsStreamAware = is_stream_aware;
    made->choice = choose_kernels(std::getenv("LOWBIT_ISA"));
    return made;
}

}  // namespace
}  // namespace lowbit

LOWBIT_EXPORT OrtStatus* CreateEpFactories(const char*, const OrtApiBase* base, const OrtLogger*, OrtEpFactory** factories,
                                           size_t most, size_t* made) {
    *made = 0;
    const OrtApi* const runtime = base->GetApi(kOrtApiVersion);
    if (runtime == nullptr) {  // older than 1.23: its first function makes a status in every version
        const OrtApi* const old = base->GetApi(1);
        if (old == nullptr) return nullptr;
        const auto create = reinterpret_cast<decltype(lowbit::api.CreateStatus)>(const_cast<void*>(old->functions[0]));
        return create(ort::kFail, "LowBitExecutionProvider needs onnxruntime 1.23 or newer");
    }
    lowbit::api.load(runtime);
    if (most < 1) return lowbit::api.CreateStatus(ort::kInvalidArgument, "LowBitExecutionProvider needs room for one factory");
    return lowbit::guarded([&] {
        factories[0] = lowbit::make_factory().release();
        *made = 1;
    });
}

LOWBIT_EXPORT OrtStatus* ReleaseEpFactory(OrtEpFactory* factory) {
    delete static_cast<lowbit::Factory*>(factory);
    return nullptr;
}

// Two lines: the kernels' name (empty where none are offered) and the reason.
LOWBIT_EXPORT const char* lowbit_describe() {
    static const std::string text = [] {
        const lowbit::Choice choice = lowbit::choose_kernels(std::getenv("LOWBIT_ISA"));
        return std::string(choice.kernels ? choice.kernels->name : "") + "\n" + choice.reason;
    }();
    return text.c_str();
}
