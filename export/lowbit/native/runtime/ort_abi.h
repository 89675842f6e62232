// The part of ONNX Runtime's plugin interface that is used here.
//
// The interface is stable: structs only grow at their end, function tables keep their order, and a plugin says which
// version it was written for (23: onnxruntime 1.23, the first one with all that is used). So a function is a place in a
// table. `tests/export/lowbit` holds places, types and structs against the official header where that can be had.
#pragma once

#include <cstddef>
#include <cstdint>

constexpr uint32_t kOrtApiVersion = 23;

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtKernelContext;
struct OrtValueInfo;
struct OrtNode;
struct OrtGraph;
struct OrtOpAttr;
struct OrtHardwareDevice;
struct OrtEpDevice;
struct OrtKeyValuePairs;
struct OrtSessionOptions;
struct OrtLogger;
struct OrtEpGraphSupportInfo;
struct OrtNodeComputeContext;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtDataTransferImpl;
struct OrtSyncStreamImpl;
struct OrtEp;
struct OrtEpFactory;

struct OrtApi {
    const void* functions[1];  // as many as the runtime has
};

struct OrtEpApi {
    const void* functions[1];
};

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);  // null where the runtime is older
    const char* (*GetVersionString)();
};

struct OrtNodeFusionOptions {
    uint32_t ort_version_supported;
    bool drop_constant_initializers;
};

struct OrtNodeComputeInfo {
    uint32_t ort_version_supported;
    OrtStatus* (*CreateState)(OrtNodeComputeInfo*, OrtNodeComputeContext*, void** state);
    OrtStatus* (*Compute)(OrtNodeComputeInfo*, void* state, OrtKernelContext*);
    void (*ReleaseState)(OrtNodeComputeInfo*, void* state);
};

struct OrtEp {
    uint32_t ort_version_supported;
    const char* (*GetName)(const OrtEp*);
    OrtStatus* (*GetCapability)(OrtEp*, const OrtGraph*, OrtEpGraphSupportInfo*);
    OrtStatus* (*Compile)(OrtEp*, const OrtGraph** graphs, const OrtNode** fused_nodes, size_t count,
                          OrtNodeComputeInfo** node_compute_infos, OrtNode** ep_context_nodes);
    void (*ReleaseNodeComputeInfos)(OrtEp*, OrtNodeComputeInfo**, size_t count);
    void* optional[8];  // layout, options, run start and end, allocators, streams, compatibility: none of them
};

struct OrtEpFactory {
    uint32_t ort_version_supported;
    const char* (*GetName)(const OrtEpFactory*);
    const char* (*GetVendor)(const OrtEpFactory*);
    OrtStatus* (*GetSupportedDevices)(OrtEpFactory*, const OrtHardwareDevice* const* devices, size_t count,
                                      OrtEpDevice** ep_devices, size_t most, size_t* made);
    OrtStatus* (*CreateEp)(OrtEpFactory*, const OrtHardwareDevice* const* devices,
                           const OrtKeyValuePairs* const* metadata, size_t count, const OrtSessionOptions*,
                           const OrtLogger*, OrtEp**);
    void (*ReleaseEp)(OrtEpFactory*, OrtEp*);
    uint32_t (*GetVendorId)(const OrtEpFactory*);
    const char* (*GetVersion)(const OrtEpFactory*);
    void* ValidateCompiledModelCompatibilityInfo;
    OrtStatus* (*CreateAllocator)(OrtEpFactory*, const OrtMemoryInfo*, const OrtKeyValuePairs*, OrtAllocator**);
    void (*ReleaseAllocator)(OrtEpFactory*, OrtAllocator*);
    OrtStatus* (*CreateDataTransfer)(OrtEpFactory*, OrtDataTransferImpl**);
    bool (*IsStreamAware)(const OrtEpFactory*);
    void* CreateSyncStreamForDevice;
};

}  // extern "C"

namespace ort {

// Values of the runtime's enumerations.
enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2, kEpFail = 11 };
enum ElementType : int32_t { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6 };
enum AttributeType : int32_t { kInt = 1, kInts = 2, kString = 5 };
enum DeviceType : int32_t { kCpu = 0 };
enum LogLevel : int32_t { kInfo = 1, kWarning = 2 };

// Name, place in OrtApi, result, arguments.
#define LOWBIT_ORT_FUNCTIONS(F)                                                                                        \
    F(CreateStatus, 0, OrtStatus*, (ErrorCode, const char*))                                                           \
    F(GetTensorMutableData, 51, OrtStatus*, (OrtValue*, void**))                                                       \
    F(CastTypeInfoToTensorInfo, 55, OrtStatus*, (const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**))               \
    F(GetTensorElementType, 60, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, ElementType*))                          \
    F(GetDimensionsCount, 61, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t*))                                 \
    F(GetDimensions, 62, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int64_t*, size_t))                             \
    F(GetTensorShapeElementCount, 64, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t*))                         \
    F(GetTensorTypeAndShape, 65, OrtStatus*, (const OrtValue*, OrtTensorTypeAndShapeInfo**))                           \
    F(KernelContext_GetInput, 90, OrtStatus*, (const OrtKernelContext*, size_t, const OrtValue**))                     \
    F(KernelContext_GetOutput, 91, OrtStatus*, (OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**))        \
    F(ReleaseStatus, 93, void, (OrtStatus*))                                                                           \
    F(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtTensorTypeAndShapeInfo*))                                           \
    F(Logger_LogMessage, 247, OrtStatus*, (const OrtLogger*, LogLevel, const char*, const char*, int, const char*))    \
    F(ReadOpAttr, 272, OrtStatus*, (const OrtOpAttr*, AttributeType, void*, size_t, size_t*))                          \
    F(KernelContext_ParallelFor, 274, OrtStatus*,                                                                      \
      (const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*))                                       \
    F(GetValueInfoName, 289, OrtStatus*, (const OrtValueInfo*, const char**))                                          \
    F(GetValueInfoTypeInfo, 290, OrtStatus*, (const OrtValueInfo*, const OrtTypeInfo**))                               \
    F(HardwareDevice_Type, 307, DeviceType, (const OrtHardwareDevice*))                                                \
    F(GetEpApi, 317, const OrtEpApi*, ())                                                                              \
    F(ValueInfo_GetValueProducer, 323, OrtStatus*, (const OrtValueInfo*, const OrtNode**, size_t*))                    \
    F(ValueInfo_GetValueNumConsumers, 324, OrtStatus*, (const OrtValueInfo*, size_t*))                                 \
    F(ValueInfo_GetValueConsumers, 325, OrtStatus*, (const OrtValueInfo*, const OrtNode**, int64_t*, size_t))          \
    F(ValueInfo_GetInitializerValue, 326, OrtStatus*, (const OrtValueInfo*, const OrtValue**))                         \
    F(ValueInfo_IsGraphOutput, 330, OrtStatus*, (const OrtValueInfo*, bool*))                                          \
    F(ValueInfo_IsConstantInitializer, 331, OrtStatus*, (const OrtValueInfo*, bool*))                                  \
    F(Graph_GetNumNodes, 344, OrtStatus*, (const OrtGraph*, size_t*))                                                  \
    F(Graph_GetNodes, 345, OrtStatus*, (const OrtGraph*, const OrtNode**, size_t))                                     \
    F(Node_GetOperatorType, 350, OrtStatus*, (const OrtNode*, const char**))                                           \
    F(Node_GetDomain, 351, OrtStatus*, (const OrtNode*, const char**))                                                 \
    F(Node_GetNumInputs, 353, OrtStatus*, (const OrtNode*, size_t*))                                                   \
    F(Node_GetInputs, 354, OrtStatus*, (const OrtNode*, const OrtValueInfo**, size_t))                                 \
    F(Node_GetNumOutputs, 355, OrtStatus*, (const OrtNode*, size_t*))                                                  \
    F(Node_GetOutputs, 356, OrtStatus*, (const OrtNode*, const OrtValueInfo**, size_t))                                \
    F(Node_GetAttributeByName, 361, OrtStatus*, (const OrtNode*, const char*, const OrtOpAttr**))                      \
    F(OpAttr_GetType, 363, OrtStatus*, (const OrtOpAttr*, AttributeType*))                                             \
    F(GetTensorData, 378, OrtStatus*, (const OrtValue*, const void**))

// Name, place in OrtEpApi, result, arguments.
#define LOWBIT_ORT_EP_FUNCTIONS(F)                                                                                     \
    F(CreateEpDevice, 0, OrtStatus*,                                                                                   \
      (OrtEpFactory*, const OrtHardwareDevice*, const OrtKeyValuePairs*, const OrtKeyValuePairs*, OrtEpDevice**))      \
    F(EpGraphSupportInfo_AddNodesToFuse, 2, OrtStatus*,                                                                \
      (OrtEpGraphSupportInfo*, const OrtNode* const*, size_t, const OrtNodeFusionOptions*))

struct Api {
#define LOWBIT_MEMBER(name, place, result, arguments) result(*name) arguments = nullptr;
    LOWBIT_ORT_FUNCTIONS(LOWBIT_MEMBER)
    LOWBIT_ORT_EP_FUNCTIONS(LOWBIT_MEMBER)
#undef LOWBIT_MEMBER

    void load(const OrtApi* api) {
#define LOWBIT_LOAD(name, place, result, arguments) \
    name = reinterpret_cast<decltype(name)>(const_cast<void*>(api->functions[place]));
        LOWBIT_ORT_FUNCTIONS(LOWBIT_LOAD)
#undef LOWBIT_LOAD
        const OrtEpApi* const ep = GetEpApi();
#define LOWBIT_LOAD(name, place, result, arguments) \
    name = reinterpret_cast<decltype(name)>(const_cast<void*>(ep->functions[place]));
        LOWBIT_ORT_EP_FUNCTIONS(LOWBIT_LOAD)
#undef LOWBIT_LOAD
    }
};

}  // namespace ort
