// A graph as the claiming code sees it: plain values, so that it can be made from a runtime's graph or by a test.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace lowbit {

enum class Type { kOther, kFloat, kUint8, kInt8, kInt32 };

constexpr int kNone = -1;

struct Value {
    std::string name;
    Type type = Type::kOther;
    bool has_shape = false;
    std::vector<int64_t> shape;     // -1: not known
    bool is_output = false;         // of the graph
    const void* constant = nullptr; // the data of a constant initializer
    size_t count = 0;               // its elements
    int producer = kNone;           // a node
    int consumers = 0;              // uses, those in subgraphs included
    std::vector<int> readers;       // nodes of this graph, one entry a use
};

struct Node {
    std::string op;                 // of ONNX's own domain; operators of other domains have an empty name
    std::vector<int> inputs, outputs;  // values; kNone where optional and absent
    std::map<std::string, std::vector<int64_t>> ints;  // attributes: integers, lists of integers
    std::map<std::string, std::string> strings;
    const void* handle = nullptr;   // the runtime's node
};

struct Graph {
    std::vector<Value> values;
    std::vector<Node> nodes;        // in topological order
};

}  // namespace lowbit
