"""The flavor for QONNX readers such as FINN: float tensors, and a Quant node of any width at every grid."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from export.flavors.base import bias_values, oldest_opset
from export.graph.builder import GraphBuilder
from export.passes.rewrite import merge_quantizers, sink_moves, spell_out
from export.storage.packing import Storage, floats_only
from quantizers.integer import Conv, Grid, IntegerView, Linear, Quantize

# Where the readers' registry finds Quant; "onnx.brevitas", the domain of the first files, is only an alias there.
QUANT_DOMAIN = "qonnx.custom_op.general"
QUANT_VERSION = 1  # Quant has not changed since; version 2 of the domain is about Trunc, which no student needs
BIAS_BITS = 32


class QonnxFlavor:
    """QONNX graph, opset 13 (14 with HardSwish), the batch fixed at 1 as its tools require.

    ``Quant(x, scale, zeropt, bitwidth)`` gives ``(round(clip(x / scale + zeropt)) - zeropt) * scale``, rounding half
    to even. Every grid is one Quant; weights and biases are float initializers, each behind its own Quant (per
    channel: the scale is ``[out_channels, 1, ...]``), biases of 32 bits on the grid of the accumulator.

    No Quant has a zero point. The readers have no integer type for it, and it is added before rounding, which costs
    float32 the last bits (1 value in 100,000 of an image came out one code off) and reverses ties if it is odd. So a
    shifted grid is a Clip of the real values to its range, and a signed Quant that is wide enough for both ends, one
    bit wider than the grid.

    Note:
        ``BipolarQuant`` (one bit) and ``Trunc`` are not needed: students have 2 to 8 bits, and means are put on their
        grid by a Quant.
    """

    name = "qonnx"
    stored_type = int(TensorProto.FLOAT)
    is_runnable = False
    is_judged_by_kernels = False
    has_dynamic_batch = False
    takes_pixels = False
    domains: dict[str, int] = {QUANT_DOMAIN: QUANT_VERSION}

    def storage(self, view: IntegerView, pack: str, opset: int | None) -> Storage:
        """Return float storage, whatever ``pack`` says; QONNX has no other weights."""
        return floats_only(pack, opset, oldest_opset(view))

    def arrange(self, view: IntegerView) -> IntegerView:
        """Arrange as for others, but compute nothing twice, since there is no fusion to help."""
        return sink_moves(merge_quantizers(spell_out(view)))

    def notes(self, view: IntegerView) -> Iterator[str]:
        """Yield that the runtime was not consulted, and the shifted grids, whose types QONNX cannot express."""
        yield "not loaded: ONNX Runtime has no Quant operator; check_parity proves the file with qonnx's executor"
        shifted = [node.name for node in view.nodes if isinstance(node, Quantize) and node.grid.is_shifted]
        if shifted:
            yield f"these quantizers are shifted, and so declared wider than their grids: {', '.join(shifted)}"

    def zero_point(self, grid: Grid) -> int:
        """Return 0: no Quant has one."""
        return 0

    def quantize(self, graph: GraphBuilder, node: Quantize, x: str) -> str:
        """Write a Quant of the grid's width; for a shifted grid a Clip to its range, and a wider one."""
        grid, scale = node.grid, np.float32(node.grid.scale)
        if not grid.is_shifted:
            return _quant(graph, x, scale, grid.bits, node.output, node.name, signed=grid.low < 0)
        low, high = (
            graph.constant(f"{node.output}.{end}", np.float32(code) * scale)
            for end, code in (("low", grid.low), ("high", grid.high))
        )
        clipped = graph.add("Clip", [x, low, high], f"{node.output}.clipped", name=f"{node.name}.clip")
        bits = 1 + max((-grid.low - 1).bit_length(), grid.high.bit_length())
        return _quant(graph, clipped, scale, bits, node.output, node.name)

    def requantize(self, graph: GraphBuilder, node: Quantize, stored: str, old: Grid) -> str:
        """Write the same as for any real tensor."""
        return self.quantize(graph, node, stored)

    def dequantize(self, graph: GraphBuilder, edge: str, stored: str, grid: Grid) -> str:
        """Return the tensor: it already holds real values."""
        return stored

    def weights(self, graph: GraphBuilder, layer: Conv | Linear, storage: Storage) -> str:
        """Write float weights and a Quant that recovers their codes."""
        scale = layer.weight_scale.astype(np.float32)
        scale = scale.reshape(()) if scale.size == 1 else scale.reshape(-1, *[1] * (layer.weights.ndim - 1))
        name = f"{layer.name}.weight"
        stored = graph.constant(f"{name}.float", layer.weights.astype(np.float32) * scale)
        return _quant(graph, stored, scale, layer.weight_bits, name, f"{name}.quant")

    def bias(self, graph: GraphBuilder, layer: Conv | Linear, grid: Grid) -> str:
        """Write the float bias and a Quant of 32 bits."""
        codes, scale = bias_values(layer, grid)
        scale = scale.reshape(()) if scale.size == 1 else scale
        name = f"{layer.name}.bias"
        stored = graph.constant(f"{name}.float", codes.astype(np.float32) * scale)
        return _quant(graph, stored, scale, BIAS_BITS, name, f"{name}.quant")

    def padding_value(self, graph: GraphBuilder, name: str, grid: Grid) -> str:
        """Write the real zero."""
        return graph.constant(f"{name}.zero", np.float32(0))


def _quant(
    graph: GraphBuilder,
    x: str,
    scale: npt.ArrayLike,
    bits: int,
    output: str,
    name: str,
    *,
    signed: bool = True,
) -> str:
    # the readers want all parameters as floats, scalars without axes
    inputs = [
        graph.constant(f"{output}.scale", np.asarray(scale, np.float32)),
        graph.constant(f"{output}.zero_point", np.float32(0)),
        graph.constant(f"{output}.bits", np.float32(bits)),
    ]
    settings = {"signed": int(signed), "narrow": 0, "rounding_mode": "ROUND"}
    return graph.add("Quant", [x, *inputs], output, name=name, domain=QUANT_DOMAIN, **settings)
