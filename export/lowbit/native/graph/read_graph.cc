// A runtime's graph as plain values: names, types, constants, who makes and who reads what.
#include "graph/read_graph.h"

#include <stdexcept>
#include <unordered_map>

namespace lowbit {

void check(const ort::Api& api, OrtStatus* status) {
    if (status == nullptr) return;
    api.ReleaseStatus(status);
    throw std::runtime_error("onnxruntime did not answer a question about the graph");
}

namespace {

constexpr const char* kIntAttributes[] = {"strides", "pads", "dilations", "kernel_shape", "group", "axis", "ceil_mode", "count_include_pad", "block_size",
                                            "precision"};
constexpr size_t kMostNumbers = 64, kMostText = 64;

class Reader {
public:
    Reader(const ort::Api& api, const OrtGraph* graph) : api_(api) {
        size_t count = 0;
        check(api_, api_.Graph_GetNumNodes(graph, &count));
        handles_.resize(count);
        if (count) check(api_, api_.Graph_GetNodes(graph, handles_.data(), count));
        for (size_t i = 0; i < count; ++i) places_[handles_[i]] = static_cast<int>(i);
    }

    Graph read() {
        for (size_t i = 0; i < handles_.size(); ++i) read_node(handles_[i], static_cast<int>(i));
        return std::move(graph_);
    }

private:
    void read_node(const OrtNode* handle, int place) {
        Node node;
        node.handle = handle;
        const char *op = nullptr, *domain = nullptr;
        check(api_, api_.Node_GetOperatorType(handle, &op));
        check(api_, api_.Node_GetDomain(handle, &domain));
        const std::string where = domain ? domain : "";
        if (op && (where.empty() || where == "ai.onnx")) node.op = op;
        size_t inputs = 0, outputs = 0;
        check(api_, api_.Node_GetNumInputs(handle, &inputs));
        check(api_, api_.Node_GetNumOutputs(handle, &outputs));
        std::vector<const OrtValueInfo*> infos(inputs);
        if (inputs) check(api_, api_.Node_GetInputs(handle, infos.data(), inputs));
        for (const OrtValueInfo* info : infos) node.inputs.push_back(value(info));
        infos.assign(outputs, nullptr);
        if (outputs) check(api_, api_.Node_GetOutputs(handle, infos.data(), outputs));
        for (const OrtValueInfo* info : infos) {
            node.outputs.push_back(value(info));
            if (node.outputs.back() != kNone) graph_.values[node.outputs.back()].producer = place;
        }
        if (node.op == "Conv" || node.op == "MaxPool" || node.op == "AveragePool" || node.op == "LpPool" || node.op == "ConvTranspose" || node.op == "Concat" || node.op == "QuantizeLinear" || node.op == "DequantizeLinear")
            read_attributes(handle, &node);
        graph_.nodes.push_back(std::move(node));
    }

    void read_attributes(const OrtNode* handle, Node* node) {
        for (const char* name : kIntAttributes) {
            const OrtOpAttr* attribute = find(handle, name);
            if (attribute == nullptr) continue;
            ort::AttributeType type;
            check(api_, api_.OpAttr_GetType(attribute, &type));
            std::vector<int64_t> numbers(kMostNumbers);
            size_t bytes = numbers.size() * sizeof(int64_t);
            OrtStatus* status = nullptr;
            if (type == ort::kInt) {
                numbers.resize(1);
                status = api_.ReadOpAttr(attribute, ort::kInt, numbers.data(), sizeof(int64_t), &bytes);
            } else {
                status = api_.ReadOpAttr(attribute, ort::kInts, numbers.data(), bytes, &bytes);
                if (status == nullptr && bytes <= numbers.size() * sizeof(int64_t)) numbers.resize(bytes / sizeof(int64_t));
            }
            if (status != nullptr) {  // too many numbers, or another type: an attribute that no rule accepts
                api_.ReleaseStatus(status);
                numbers.assign(kMostNumbers, -1);
            }
            node->ints[name] = numbers;
        }
        if (const OrtOpAttr* attribute = find(handle, "auto_pad")) {
            std::string text(kMostText, '\0');
            size_t bytes = 0;
            OrtStatus* const status = api_.ReadOpAttr(attribute, ort::kString, text.data(), text.size(), &bytes);
            if (status != nullptr) api_.ReleaseStatus(status);
            node->strings["auto_pad"] = status != nullptr ? "unknown" : std::string(text.c_str());
        }
    }

    const OrtOpAttr* find(const OrtNode* handle, const char* name) {
        const OrtOpAttr* attribute = nullptr;
        OrtStatus* const status = api_.Node_GetAttributeByName(handle, name, &attribute);
        if (status == nullptr) return attribute;
        api_.ReleaseStatus(status);
        return nullptr;
    }

    int value(const OrtValueInfo* info) {
        if (info == nullptr) return kNone;
        const char* name = nullptr;
        check(api_, api_.GetValueInfoName(info, &name));
        if (name == nullptr || *name == '\0') return kNone;
        const auto [known, is_new] = values_.emplace(name, static_cast<int>(graph_.values.size()));
        if (!is_new) return known->second;
        Value made;
        made.name = name;
        read_type(info, &made);
        read_uses(info, &made);
        read_constant(info, &made);
        graph_.values.push_back(std::move(made));
        return known->second;
    }

    void read_type(const OrtValueInfo* info, Value* made) {
        const OrtTypeInfo* type = nullptr;
        const OrtTensorTypeAndShapeInfo* tensor = nullptr;
        if (OrtStatus* status = api_.GetValueInfoTypeInfo(info, &type)) return api_.ReleaseStatus(status);
        if (type == nullptr) return;
        if (OrtStatus* status = api_.CastTypeInfoToTensorInfo(type, &tensor)) return api_.ReleaseStatus(status);
        if (tensor == nullptr) return;
        ort::ElementType element;
        size_t rank = 0;
        check(api_, api_.GetTensorElementType(tensor, &element));
        made->type = element == ort::kFloat ? Type::kFloat : element == ort::kUint8 ? Type::kUint8
                   : element == ort::kInt8 ? Type::kInt8 : element == ort::kInt32 ? Type::kInt32 : Type::kOther;
        check(api_, api_.GetDimensionsCount(tensor, &rank));
        made->has_shape = rank > 0;  // a missing shape and a scalar look alike
        made->shape.resize(rank);
        if (rank) check(api_, api_.GetDimensions(tensor, made->shape.data(), rank));
    }

    void read_uses(const OrtValueInfo* info, Value* made) {
        check(api_, api_.ValueInfo_IsGraphOutput(info, &made->is_output));
        size_t count = 0;
        check(api_, api_.ValueInfo_GetValueNumConsumers(info, &count));
        made->consumers = static_cast<int>(count);
        std::vector<const OrtNode*> nodes(count);
        std::vector<int64_t> inputs(count);
        if (count) check(api_, api_.ValueInfo_GetValueConsumers(info, nodes.data(), inputs.data(), count));
        for (size_t i = 0; i < count; ++i) {
            const auto place = places_.find(nodes[i]);
            if (inputs[i] >= 0 && place != places_.end()) made->readers.push_back(place->second);
        }
    }

    void read_constant(const OrtValueInfo* info, Value* made) {
        bool is_constant = false;
        check(api_, api_.ValueInfo_IsConstantInitializer(info, &is_constant));
        if (!is_constant || made->type == Type::kOther) return;
        const OrtValue* tensor = nullptr;
        if (OrtStatus* status = api_.ValueInfo_GetInitializerValue(info, &tensor)) return api_.ReleaseStatus(status);
        if (tensor == nullptr) return;
        OrtTensorTypeAndShapeInfo* shape = nullptr;
        check(api_, api_.GetTensorTypeAndShape(tensor, &shape));
        size_t rank = 0;
        OrtStatus* const status = api_.GetTensorShapeElementCount(shape, &made->count);
        if (status == nullptr && api_.GetDimensionsCount(shape, &rank) == nullptr) made->has_shape = true;
        api_.ReleaseTensorTypeAndShapeInfo(shape);
        check(api_, status);
        check(api_, api_.GetTensorData(tensor, &made->constant));
    }

    const ort::Api& api_;
    std::vector<const OrtNode*> handles_;
    std::unordered_map<const OrtNode*, int> places_;
    std::unordered_map<std::string, int> values_;
    Graph graph_;
};

}  // namespace

Graph read_graph(const ort::Api& api, const OrtGraph* graph) { return Reader(api, graph).read(); }

}  // namespace lowbit
