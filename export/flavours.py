"""Say how each flavour of graph stores codes, weights and biases; the lowering itself is shared.

A flavour decides what tensor stands for an edge on a grid (its *stored* tensor). Everything that only moves values
works on stored tensors; everything that computes works on real ones.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from onnx import TensorProto

from export.checks import ExportError
from export.graph import GraphBuilder
from export.packing import INT8, Storage
from quantizers.integer import Conv, Grid, Linear, Quantize


class Flavour(Protocol):
    """What a kind of graph must be able to write. Every method returns the name of the tensor it made."""

    name: str

    def quantize(self, graph: GraphBuilder, node: Quantize, x: str) -> str:
        """Put the real tensor ``x`` on the node's grid."""

    def requantize(self, graph: GraphBuilder, node: Quantize, stored: str, old: Grid) -> str:
        """Put a stored tensor of another grid on the node's grid."""

    def dequantize(self, graph: GraphBuilder, edge: str, stored: str, grid: Grid) -> str:
        """Give a stored tensor its real values, for one reader."""

    def weights(self, graph: GraphBuilder, layer: Conv | Linear, storage: Storage) -> str:
        """Make the real weights of a layer."""

    def bias(self, graph: GraphBuilder, layer: Conv | Linear, grid: Grid) -> str:
        """Make the real bias of a layer whose input is on ``grid``; called only where there is one."""

    def padding_value(self, graph: GraphBuilder, name: str, grid: Grid) -> str:
        """Make the stored scalar that stands for the real zero."""


class OrtFlavour:
    """QDQ graph for ONNX Runtime: uint8 codes, int8 weights, int32 biases.

    Found with onnxruntime 1.31.1 (optimised graph read back):

    * ``QuantizeLinear -> Clip(uint8) -> DequantizeLinear`` fuses as if the clip were not there, and layout changes pass
      through it, so a 2-bit edge costs one uint8 pass over an 8-bit one.
    * MaxPool, Concat, Flatten, Slice, ... on the uint8 codes themselves need no fusion at all, become NHWC together
      with the convolutions around them, and are exact by construction.
    * A scalar scale and zero point for activations; per-channel weights with ``axis=0`` and a zero point of zeros.
    * Packed weights fed to DequantizeLinear directly lose the integer kernel; a Cast to INT8 between keeps it, and
      is folded when the file is loaded.
    * A DequantizeLinear for each reader: the fusions want each used once.
    """

    name = "ort"

    def quantize(self, graph: GraphBuilder, node: Quantize, x: str) -> str:
        """Write QuantizeLinear, and the Clip that eight-bit storage does not do by itself."""
        grid = node.grid
        scale, zero = _scale_and_zero(graph, node.output, grid)
        narrow = grid.high - grid.low < 255
        stored = graph.add(
            "QuantizeLinear", [x, scale, zero], f"{node.output}.wide" if narrow else node.output, name=node.name
        )
        return self._clip(graph, node, stored) if narrow else stored

    def requantize(self, graph: GraphBuilder, node: Quantize, stored: str, old: Grid) -> str:
        """Write a change of grid so that it stays one integer pass.

        A bare DequantizeLinear -> QuantizeLinear runs as two float passes. With a Concat of one input between,
        ONNX Runtime makes it QLinearConcat, which is one look-up in a table of 256.
        """
        if (old.scale, old.low) == (node.grid.scale, node.grid.low):
            return self._clip(graph, node, stored) if node.grid.high < old.high else stored
        real = self.dequantize(graph, node.inputs[0], stored, old)
        single = graph.add("Concat", [real], f"{node.output}.real", name=f"{node.name}.requantize", axis=1)
        return self.quantize(graph, node, single)

    def dequantize(self, graph: GraphBuilder, edge: str, stored: str, grid: Grid) -> str:
        """Write DequantizeLinear."""
        scale, zero = _scale_and_zero(graph, edge, grid)
        return graph.add("DequantizeLinear", [stored, scale, zero], f"{edge}.real", name=f"{edge}.dequantize")

    def weights(self, graph: GraphBuilder, layer: Conv | Linear, storage: Storage) -> str:
        """Write the stored weights, a Cast where they are packed, and DequantizeLinear."""
        kind = storage.of(layer.weight_bits)
        name, codes = f"{layer.name}.weight", layer.weights.astype(np.int8)
        if kind == INT8:
            stored = graph.constant(f"{name}.int8", codes)
        else:
            packed = graph.packed_constant(f"{name}.{kind.name}", codes, kind.code, kind.bits)
            stored = graph.add("Cast", [packed], f"{name}.int8", name=f"{name}.cast", to=TensorProto.INT8)
        return _dequantized_constant(graph, name, stored, layer.weight_scale, np.dtype(np.int8))

    def bias(self, graph: GraphBuilder, layer: Conv | Linear, grid: Grid) -> str:
        """Write the int32 bias on the grid of the accumulator, so that the runtime takes it as it is."""
        if layer.bias is None:
            raise ExportError(f"{layer.name}: it has no bias")
        scale = np.float32(grid.scale) * layer.weight_scale.astype(np.float32)
        name = f"{layer.name}.bias"
        stored = graph.constant(f"{name}.int32", layer.bias.astype(np.int32))
        return _dequantized_constant(graph, name, stored, scale, np.dtype(np.int32))

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


def _dequantized_constant(
    graph: GraphBuilder, name: str, stored: str, scale: np.ndarray, dtype: np.dtype[np.signedinteger]
) -> str:
    """Write DequantizeLinear of a constant; one scale for the tensor becomes a scalar, as QLinearConv wants it."""
    values = scale.astype(np.float32)
    values = values.reshape(()) if values.size == 1 else values
    scale_name = graph.constant(f"{name}.scale", values)
    zero = graph.constant(f"{name}.zero_point", np.zeros(values.shape, dtype))
    axis = {"axis": 0} if values.ndim else {}
    return graph.add("DequantizeLinear", [stored, scale_name, zero], name, name=f"{name}.dequantize", **axis)


FLAVOURS: dict[str, Flavour] = {"ort": OrtFlavour()}
PLANNED = ("qcdq", "qonnx")


def find_flavour(name: str) -> Flavour:
    """Return the flavour of that name.

    Raises:
        ExportError: If it is unknown, or not there yet.
    """
    if name in PLANNED:
        raise ExportError(f"flavour {name!r} is not there yet; there is {', '.join(FLAVOURS)}")
    if name not in FLAVOURS:
        raise ExportError(f"flavour must be one of {', '.join(FLAVOURS)}, got {name!r}")
    return FLAVOURS[name]
