"""The flavor for other runtimes: QuantizeLinear, Clip, DequantizeLinear at every grid, and float operators between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from export.checks import ExportError
from export.flavors.base import bias_values, dequantized_constant, oldest_opset
from export.graph.builder import GraphBuilder
from export.passes.rewrite import arrange
from export.storage.packing import Storage, bytes_only
from quantizers.integer import Concat, Conv, Grid, IntegerView, Linear, Node, Quantize


class QcdqFlavor:
    """Plain QCDQ graph of ONNX's own operators, opset 13 (14 with HardSwish), the batch dynamic.

    * Each grid is ``QuantizeLinear -> Clip -> DequantizeLinear``, the Clip on the integers and only below eight bits.
      Operators, moves and pooling included, read and give real values, so a reader is right without any fusion.
    * Codes of a signed grid are int8 and those of an unsigned one uint8, both with zero point 0, as symmetric runtimes
      expect. If a grid is shifted, such runtimes refuse the file anyway; then every grid is uint8, which ONNX Runtime
      computes in integers on x86 (it computes int8 codes that are clipped in float).
    * Weights are stored as int8 codes, followed by DequantizeLinear (per channel: axis 0). They fit their width, so
      there is nothing to clip, and there are no float weights to quantize at load time.
    * Biases are float, each a multiple of its accumulator's step: every runtime takes them (some refuse int32 with
      DequantizeLinear), and one that quantizes biases by itself recovers the int32 codes of the student.
    """

    name = "qcdq"
    stored_type = int(TensorProto.FLOAT)
    is_runnable = True
    is_judged_by_kernels = False
    has_dynamic_batch = True
    takes_pixels = True
    domains: dict[str, int] = {}

    def storage(self, view: IntegerView, pack: str, opset: int | None) -> Storage:
        """Return int8 storage; packed types are for runtimes that are known to unpack them.

        Raises:
            ExportError: If packed weights are requested.
        """
        if pack == "packed":
            raise ExportError("flavor 'qcdq' stores weights as int8; use pack='int8' or 'auto', or flavor 'ort'")
        return bytes_only(pack, opset, oldest_opset(view))

    def arrange(self, view: IntegerView) -> IntegerView:
        """Arrange as for ONNX Runtime (others fuse the same patterns), and put concatenations on their grid again.

        That changes no value, but a runtime that looks for a quantizer on both sides of an operator finds both.
        """
        return _all_unsigned(_requantize_concatenations(arrange(view)))

    def notes(self, view: IntegerView) -> Iterator[str]:
        """Yield the shifted grids, which runtimes for symmetric quantization refuse."""
        shifted = [node.name for node in view.nodes if isinstance(node, Quantize) and node.grid.is_shifted]
        if shifted:
            yield f"these quantizers have a zero point, which some runtimes do not support: {', '.join(shifted)}"

    def zero_point(self, grid: Grid) -> int:
        """Return 0 if the codes have their own type, else the shift that makes every code unsigned."""
        return grid.zero_point if grid.is_shifted or isinstance(grid, _UnsignedGrid) else 0

    def quantize(self, graph: GraphBuilder, node: Quantize, x: str) -> str:
        """Write QuantizeLinear, a Clip where the stored type does not clip by itself, and DequantizeLinear."""
        return self._write(graph, node, x, has_clip=node.grid.high - node.grid.low < 255)

    def _write(self, graph: GraphBuilder, node: Quantize, x: str, *, has_clip: bool) -> str:
        grid, zero_point = node.grid, self.zero_point(node.grid)
        limits: npt.NDArray[np.integer] = np.array([grid.low, grid.high]) + zero_point
        limits = limits.astype(np.int8 if limits[0] < 0 else np.uint8)
        scale = graph.constant(f"{node.output}.scale", np.float32(grid.scale))
        zero = graph.constant(f"{node.output}.zero_point", limits.dtype.type(zero_point))
        stored = graph.add("QuantizeLinear", [x, scale, zero], f"{node.output}.codes", name=node.name)
        if has_clip:
            low, high = (
                graph.constant(f"{node.output}.{end}", limits[place]) for place, end in enumerate(("low", "high"))
            )
            stored = graph.add("Clip", [stored, low, high], f"{node.output}.clipped", name=f"{node.name}.clip")
        return graph.add("DequantizeLinear", [stored, scale, zero], node.output, name=f"{node.name}.dequantize")

    def requantize(self, graph: GraphBuilder, node: Quantize, stored: str, old: Grid) -> str:
        """Write the same as for any real tensor, with a Clip also at eight bits.

        Without a Clip between them, ONNX Runtime merges two such pairs into one with another scale, which is another
        function.
        """
        return self._write(graph, node, stored, has_clip=True)

    def dequantize(self, graph: GraphBuilder, edge: str, stored: str, grid: Grid) -> str:
        """Return the tensor: it already holds real values."""
        return stored

    def weights(self, graph: GraphBuilder, layer: Conv | Linear, storage: Storage) -> str:
        """Write the int8 codes and DequantizeLinear."""
        name = f"{layer.name}.weight"
        stored = graph.constant(f"{name}.int8", layer.weights.astype(np.int8))
        return dequantized_constant(graph, name, stored, layer.weight_scale, np.dtype(np.int8))

    def bias(self, graph: GraphBuilder, layer: Conv | Linear, grid: Grid) -> str:
        """Write the real bias."""
        codes, scale = bias_values(layer, grid)
        return graph.constant(f"{layer.name}.bias", codes.astype(np.float32) * scale)

    def padding_value(self, graph: GraphBuilder, name: str, grid: Grid) -> str:
        """Write the real zero."""
        return graph.constant(f"{name}.zero", np.float32(0))


class _UnsignedGrid(Grid):
    """A signed grid whose codes are stored as unsigned ones."""


def _all_unsigned(view: IntegerView) -> IntegerView:
    """Store signed grids as uint8 if a shifted grid has a zero point anyway."""
    if not any(grid.is_shifted for grid in view.grids.values()):
        return view
    grids = {edge: _UnsignedGrid(grid.scale, grid.low, grid.high) for edge, grid in view.grids.items()}
    nodes = [replace(node, grid=grids[node.output]) if isinstance(node, Quantize) else node for node in view.nodes]
    return replace(view, nodes=tuple(nodes), grids=grids)


def _requantize_concatenations(view: IntegerView) -> IntegerView:
    nodes: list[Node] = []
    for node in view.nodes:
        grid = view.grids.get(node.output)
        if isinstance(node, Concat) and grid is not None:
            joined = f"{node.output}.joined"
            nodes += [replace(node, output=joined), Quantize(f"{node.name}.grid", (joined,), node.output, grid)]
        else:
            nodes.append(node)
    return replace(view, nodes=tuple(nodes))
