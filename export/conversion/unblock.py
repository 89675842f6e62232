"""Turn linear layers of a written file from blocks of ``MatMulNBits`` back into Gemm, for runtimes without them."""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from export.flavors import OrtFlavor
from export.graph.builder import GraphBuilder
from export.storage.blocked import DOMAIN, unpack_blocks
from export.storage.metadata import read_property
from export.storage.packing import INT8, Blocks, Storage
from quantizers.integer import Grid, Linear

# what `write_blocked` writes for a layer around the matrix product itself, by the endings of the names
AROUND = ("cast", "shift", "fill", "cut", "close", "join", "unit", "scale")


def blocks_of(model: onnx.ModelProto) -> dict[str, Blocks]:
    """Return the layers of a file that are stored in blocks, by name."""
    return {name: Blocks(*sizes) for name, sizes in read_property(model, "blocks", {}).items()}


def unblock(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Rewrite the named layers as Gemm with int8 weights, in place. The codes, and so every sum, stay the same."""
    blocks = blocks_of(model)
    for name in names:
        _Unblocking(model.graph, name, blocks[name]).run()
    left = {name: [kept.bits, kept.size] for name, kept in blocks.items() if name not in names}
    for entry in model.metadata_props:
        entry.value = json.dumps(left) if entry.key == "blocks" else entry.value
    if not left:
        own = [entry for entry in model.opset_import if entry.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(own)


class _Unblocking:
    def __init__(self, graph: onnx.GraphProto, name: str, blocks: Blocks) -> None:
        self.graph, self.name, self.blocks = graph, name, blocks
        self.nodes = {node.name: node for node in graph.node}
        self.constants = {entry.name: entry for entry in graph.initializer}

    def run(self) -> None:
        made = self._gemm()
        old = {self.name, *(f"{self.name}.{end}" for end in AROUND)}
        nodes: list[NodeProto] = []
        for node in self.graph.node:
            if node.name == self.name:
                nodes += made.nodes
            elif node.name not in old:
                nodes.append(node)
        used = {name for node in nodes for name in node.input}
        constants = [entry for entry in (*self.graph.initializer, *made.initializers) if entry.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(constants)

    def _gemm(self) -> GraphBuilder:
        layer, grid, stored = self._layer()
        taken = [name for node in self.graph.node for name in node.output]
        made = GraphBuilder(reserved=(*taken, *self.constants))
        flavor = OrtFlavor()
        inputs = [
            flavor.dequantize(made, f"{self.name}.input", stored, grid),
            flavor.weights(made, layer, Storage((INT8,), INT8.opset)),
        ]
        if layer.bias is not None:
            inputs.append(flavor.bias(made, layer, grid))
        made.nodes.append(helper.make_node("Gemm", inputs, [layer.output], name=self.name, transB=1))
        return made

    def _layer(self) -> tuple[Linear, Grid, str]:
        """Return the original layer, the grid of its input's storage, and the tensor of the codes."""
        product, cast = self.nodes[self.name], self.nodes[f"{self.name}.cast"]
        shift = self.nodes.get(f"{self.name}.shift")
        zero_point = 0 if shift is None else int(self._value(shift.input[1]))
        scale, step = (self._value(name) for name in self.nodes[f"{self.name}.unit"].input)
        packed = self._value(product.input[1])
        weights = unpack_blocks(packed, self._features(packed.shape[1]), self.blocks)
        bias = self._value(product.input[5]).astype(np.int32) if len(product.input) > 5 else None
        output = self.nodes[f"{self.name}.scale"].output[0]
        layer = Linear(self.name, (cast.input[0],), output, weights, 8, scale, bias)
        return layer, Grid(float(step), -zero_point, 255 - zero_point), cast.input[0]

    def _features(self, count: int) -> int:
        """Return how many weights a row has: what its blocks hold, minus the zeros that fill them up."""
        fill = self.nodes.get(f"{self.name}.fill")
        missing = 0 if fill is None else int(self._value(fill.input[1])[-1])
        return count * (self.blocks.size - 1) - missing

    def _value(self, name: str) -> np.ndarray:
        return np.asarray(numpy_helper.to_array(self.constants[name]))
