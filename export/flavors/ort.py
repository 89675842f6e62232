"""The flavor for ONNX Runtime: every edge on a grid is uint8, so that each operator finds its integer kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
from onnx import TensorProto

from export.flavors.base import bias_values, dequantized_constant
from export.graph.builder import GraphBuilder
from export.passes.rewrite import arrange
from export.passes.saturation import saturate
from export.storage.packing import INT8, Pack, Storage, choose_storage
from quantizers.integer import Conv, Grid, IntegerView, Linear, Quantize


class OrtFlavor:
    """QDQ graph for ONNX Runtime: uint8 codes, int8 weights, int32 biases.

    Found with onnxruntime 1.31.1 (optimized graph read back):

    * ``QuantizeLinear -> Clip(uint8) -> DequantizeLinear`` fuses as if the clip were not there, and layout changes pass
      through it, so a 2-bit edge costs one uint8 pass more than an 8-bit one.
    * MaxPool, Concat, Flatten, Slice, ... on the uint8 codes themselves need no fusion at all, become NHWC together
      with the convolutions around them, and are exact by construction.
    * A scalar scale and zero point for activations; per-channel weights with ``axis=0`` and a zero point of zeros.
    * Packed weights fed to DequantizeLinear directly lose the integer kernel; a Cast to INT8 in between keeps it, and
      is folded when the file is loaded.
    * Each reader has its own DequantizeLinear, since the fusions require that each is used once.
    """

    name = "ort"
    stored_type = int(TensorProto.UINT8)
    is_runnable = True
    is_judged_by_kernels = True
    has_dynamic_batch = True
    takes_pixels = True
    domains: dict[str, int] = {}

    def storage(self, view: IntegerView, pack: str, opset: int | None) -> Storage:
        """Pack as far as allowed; the opset follows from that."""
        layers = (node for node in view.nodes if isinstance(node, (Conv, Linear)))
        return choose_storage((layer.weight_bits for layer in layers), cast(Pack, pack), opset)

    def arrange(self, view: IntegerView) -> IntegerView:
        """Move each operator between its quantizers, where ONNX Runtime fuses them, and avoid clips."""
        return saturate(arrange(view))

    def notes(self, view: IntegerView) -> Iterator[str]:
        """Yield nothing; the census reports everything."""
        yield from ()

    def zero_point(self, grid: Grid) -> int:
        """Return the shift that makes every code unsigned."""
        return grid.zero_point

    def quantize(self, graph: GraphBuilder, node: Quantize, x: str) -> str:
        """Write QuantizeLinear, and a Clip where eight-bit storage does not clip by itself."""
        grid = node.grid
        scale, zero = _scale_and_zero(graph, node.output, grid)
        narrow = grid.high - grid.low < 255
        stored = graph.add(
            "QuantizeLinear", [x, scale, zero], f"{node.output}.wide" if narrow else node.output, name=node.name
        )
        return self._clip(graph, node, stored) if narrow else stored

    def requantize(self, graph: GraphBuilder, node: Quantize, stored: str, old: Grid) -> str:
        """Write a change of grid so that it runs as one integer pass.

        A bare DequantizeLinear -> QuantizeLinear runs as two float passes. With a zero added in between, ONNX Runtime
        turns it into QLinearAdd, whose kernel for a scalar takes half the time of QLinearConcat with one input (a
        look-up in a table of 256) on 16 KB and a third of it on 200 KB.
        """
        if (old.scale, old.low) == (node.grid.scale, node.grid.low):
            return self._clip(graph, node, stored) if node.grid.high < old.high else stored
        name = f"{node.name}.requantize"
        real = self.dequantize(graph, node.inputs[0], stored, old)
        scale, zero_point = _scale_and_zero(graph, node.inputs[0], old)
        code = graph.constant(f"{name}.nothing", np.uint8(old.zero_point))
        nothing = graph.add("DequantizeLinear", [code, scale, zero_point], f"{name}.zero", name=f"{name}.zero")
        return self.quantize(graph, node, graph.add("Add", [real, nothing], f"{node.output}.real", name=name))

    def dequantize(self, graph: GraphBuilder, edge: str, stored: str, grid: Grid) -> str:
        """Write DequantizeLinear."""
        scale, zero = _scale_and_zero(graph, edge, grid)
        return graph.add("DequantizeLinear", [stored, scale, zero], f"{edge}.real", name=f"{edge}.dequantize")

    def weights(self, graph: GraphBuilder, layer: Conv | Linear, storage: Storage) -> str:
        """Write the stored weights, a Cast if they are packed, and DequantizeLinear."""
        kind = storage.of(layer.weight_bits)
        name, codes = f"{layer.name}.weight", layer.weights.astype(np.int8)
        if kind == INT8:
            stored = graph.constant(f"{name}.int8", codes)
        else:
            packed = graph.packed_constant(f"{name}.{kind.name}", codes, kind.code, kind.bits)
            stored = graph.add("Cast", [packed], f"{name}.int8", name=f"{name}.cast", to=TensorProto.INT8)
        return dequantized_constant(graph, name, stored, layer.weight_scale, np.dtype(np.int8))

    def bias(self, graph: GraphBuilder, layer: Conv | Linear, grid: Grid) -> str:
        """Write the int32 bias on the grid of the accumulator, so that the runtime takes it unchanged."""
        codes, scale = bias_values(layer, grid)
        name = f"{layer.name}.bias"
        stored = graph.constant(f"{name}.int32", codes)
        return dequantized_constant(graph, name, stored, scale, np.dtype(np.int32))

    def padding_value(self, graph: GraphBuilder, name: str, grid: Grid) -> str:
        """Write the zero point."""
        return graph.constant(f"{name}.zero", np.uint8(grid.zero_point))

    def _clip(self, graph: GraphBuilder, node: Quantize, stored: str) -> str:
        low = graph.constant(f"{node.output}.low", np.uint8(0))
        high = graph.constant(f"{node.output}.high", np.uint8(node.grid.high - node.grid.low))
        return graph.add("Clip", [stored, low, high], node.output, name=f"{node.name}.clip")


def _scale_and_zero(graph: GraphBuilder, edge: str, grid: Grid) -> tuple[str, str]:
    scale = graph.constant(f"{edge}.scale", np.float32(grid.scale))
    return scale, graph.constant(f"{edge}.zero_point", np.uint8(grid.zero_point))
