"""What a flavor of graph must be able to write; the lowering itself is shared.

A flavor decides which tensor represents an edge on a grid (its *stored* tensor). Everything that only moves values
works on stored tensors; everything that computes works on real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.checks import ExportError
from export.graph.builder import GraphBuilder
from export.storage.packing import Storage
from quantizers.integer import Conv, Function, Grid, IntegerView, Linear, Quantize

PLAIN_OPSET = 13  # the oldest with per-channel DequantizeLinear, and with axes of Squeeze as an input
HARDSWISH_OPSET = 14


class Flavor(Protocol):
    """A kind of graph: its properties, and what it must be able to write.

    Every method that takes a graph returns the name of the tensor it made.

    Attributes:
        name: As users write it.
        stored_type: ONNX type of the tensors that represent edges on a grid.
        is_runnable: Whether ONNX Runtime can load it.
        is_judged_by_kernels: Whether a layer is a fall-back if ONNX Runtime computes it in float; otherwise, if
            it reads values that are not on a grid.
        has_dynamic_batch: Whether the batch is dynamic; otherwise it is 1.
        takes_pixels: Whether the normalization of uint8 images can be part of the graph.
        domains: Operator sets in addition to ONNX's own: domain -> version.
    """

    name: str
    stored_type: int
    is_runnable: bool
    is_judged_by_kernels: bool
    has_dynamic_batch: bool
    takes_pixels: bool
    domains: dict[str, int]

    def storage(self, view: IntegerView, pack: str, opset: int | None) -> Storage:
        """Choose the element types of weights, and the operator set."""

    def arrange(self, view: IntegerView) -> IntegerView:
        """Rearrange a view for the runtime, without changing a code."""

    def notes(self, view: IntegerView) -> Iterator[str]:
        """Yield a warning for anything that the flavor's readers may not support."""

    def zero_point(self, grid: Grid) -> int:
        """Return what is added to a code to give its stored value (if that is an integer)."""

    def quantize(self, graph: GraphBuilder, node: Quantize, x: str) -> str:
        """Put the real tensor ``x`` on the node's grid."""

    def requantize(self, graph: GraphBuilder, node: Quantize, stored: str, old: Grid) -> str:
        """Put a stored tensor that is on another grid on the node's grid."""

    def dequantize(self, graph: GraphBuilder, edge: str, stored: str, grid: Grid) -> str:
        """Write the real values of a stored tensor, for one reader."""

    def weights(self, graph: GraphBuilder, layer: Conv | Linear, storage: Storage) -> str:
        """Write the real weights of a layer."""

    def bias(self, graph: GraphBuilder, layer: Conv | Linear, grid: Grid) -> str:
        """Write the real bias of a layer whose input is on ``grid``; called only if there is one."""

    def padding_value(self, graph: GraphBuilder, name: str, grid: Grid) -> str:
        """Write the stored scalar that represents real zero."""


def oldest_opset(view: IntegerView) -> int:
    """Return the oldest operator set that holds every operator a plain graph of the view needs."""
    has_hardswish = any(isinstance(node, Function) and node.op == "hardswish" for node in view.nodes)
    return HARDSWISH_OPSET if has_hardswish else PLAIN_OPSET


def bias_values(layer: Conv | Linear, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return a layer's bias codes (int32 ``[channels]``) and the scale of its accumulator (float32, same or ``[1]``).

    Raises:
        ExportError: If the layer has no bias.
    """
    if layer.bias is None:
        raise ExportError(f"{layer.name}: it has no bias")
    return layer.bias.astype(np.int32), np.float32(grid.scale) * layer.weight_scale.astype(np.float32)


def dequantized_constant(
    graph: GraphBuilder, name: str, stored: str, scale: np.ndarray, dtype: np.dtype[np.signedinteger]
) -> str:
    """Write DequantizeLinear of a constant; one scale for the tensor becomes a scalar, as QLinearConv expects."""
    values = scale.astype(np.float32)
    values = values.reshape(()) if values.size == 1 else values
    scale_name = graph.constant(f"{name}.scale", values)
    zero = graph.constant(f"{name}.zero_point", np.zeros(values.shape, dtype))
    axis = {"axis": 0} if values.ndim else {}
    return graph.add("DequantizeLinear", [stored, scale_name, zero], name, name=f"{name}.dequantize", **axis)


def without_custom_operators(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which each operator from another domain is replaced by Identity of its first input.

    Quantizers keep shape and type, so whatever ONNX infers from the copy holds for the model. ``MatMulNBits`` becomes a
    column of its input: the vector of scales that follows it, one per output, restores the right shape.

    Args:
        model: Not changed.

    Returns:
        The copy, with ONNX's own operators only.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.domain:
            node.CopyFrom(_stand_in(node, copy.graph))
    own = [entry for entry in copy.opset_import if not entry.domain]
    del copy.opset_import[:]
    copy.opset_import.extend(own)
    return copy


def _stand_in(node: onnx.NodeProto, graph: onnx.GraphProto) -> onnx.NodeProto:
    if node.op_type != "MatMulNBits":
        return helper.make_node("Identity", [node.input[0]], list(node.output), name=node.name)
    bounds = [f"{node.name}.stand_in.{key}" for key in ("start", "end", "axis")]
    graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), name)
        for name, value in zip(bounds, (0, 1, 1), strict=True)
    )
    return helper.make_node("Slice", [node.input[0], *bounds], list(node.output), name=node.name)
