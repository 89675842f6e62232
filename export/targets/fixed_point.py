"""Rewrite a graph of Quant nodes so that only integers flow between quantizers, as fixed-point compilers want it.

A compiler such as hls4ml has no floating point: a scale that is not a power of two is rounded, and codes change. Here
each tensor between two quantizers holds integers (``real value = unit * integer``), layers multiply integers, and each
quantizer is ``Mul -> Quant`` of step 1. The multiplier, one number per channel, is rounded to the fewest fractional
bits with which no reachable integer lands in another code: ``settle`` keeps all of them away from ties, so such bits
exist, and fixed-point arithmetic computes every code of the student.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, helper

from export.checks import ExportError
from export.flavors.base import without_custom_operators
from export.flavors.quant_nodes import QUANT_DOMAIN
from export.storage.metadata import read_property
from export.storage.preprocessing import write_properties
from export.targets.graph import Graph

Floats = npt.NDArray[np.float64]
MANTISSA = 24  # bits of the multipliers, which are stored as float32
KEPT_MARGIN = 0.5  # of an integer's distance from a tie, which rounding a multiplier must leave
MOVES = ("Concat", "Reshape", "Flatten", "Transpose", "Identity")


@dataclass(frozen=True)
class Integers:
    """Meaning of a tensor of integers.

    Args:
        unit: Real value of 1, a scalar or one per channel.
        low: Smallest integer that may occur, likewise.
        high: Largest one.
    """

    unit: Floats
    low: Floats
    high: Floats


def between_integers(model: ModelProto) -> None:
    """Rewrite a model of flavor ``qonnx`` whose grids have no zero points, in place.

    Raises:
        ExportError: If it holds an operator that has no such form.
    """
    _Rewriting(model).run()


class _Rewriting:
    """The nodes written so far, and what the integers of each tensor mean."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = Graph(model)
        self.shapes = {
            entry.name: [size.dim_value for size in entry.type.tensor_type.shape.dim]
            for entry in (*model.graph.value_info, *model.graph.input, *model.graph.output)
        }
        self.nodes: list[NodeProto] = []
        self.known: dict[str, Integers] = {}

    def run(self) -> None:
        """Rewrite every node."""
        for node in self.graph.nodes:
            if node.op_type == "Quant" and node.input[0] in self.graph.tensors:
                continue  # a constant: its layer writes its codes
            writer = WRITERS.get(node.op_type)
            if writer is None:
                raise ExportError(f"{node.name}: {node.op_type} has no fixed-point form; use another layer, or "
                                  "a target such as onnxruntime")  # fmt: skip
            writer(self, node)
        for entry in self.graph.model.graph.output:
            self._give_real(entry.name)
        self.graph.finish(self.nodes)
        _infer_shapes(self.graph.model)
        taps = read_property(self.graph.model, "quantizers", [])
        write_properties(self.graph.model, {"quantizers": json.dumps([{**tap, "unit": 1.0} for tap in taps])})

    def add(self, operator: str, inputs: list[str], output: str, name: str, **attributes: Any) -> str:
        """Append a node; return its output."""
        domain = QUANT_DOMAIN if operator == "Quant" else None
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def quant(self, x: str, output: str, bits: int, *, scale: float = 1.0, signed: bool = True) -> str:
        """Put a tensor on a grid of ``bits`` bits, whose step is a power of two."""
        parameters = [
            self.graph.constant(f"{output}.{key}", np.float32(value))
            for key, value in (("scale", scale), ("zero_point", 0), ("bits", bits))
        ]
        settings: dict[str, Any] = {"signed": int(signed), "narrow": 0, "rounding_mode": "ROUND"}
        return self.add("Quant", [x, *parameters], output, f"{output}.quant", **settings)

    def integers(self, output: str, codes: Floats, bits: int | None = None) -> str:
        """Write a constant of integers with its type."""
        bits = bits or _bits(float(codes.min()), float(codes.max()))
        return self.quant(self.graph.constant(f"{output}.codes", codes.astype(np.float32)), output, bits)

    def spread(self, values: Floats, like: str, name: str) -> Floats:
        """Return one value per channel in the full shape of an image: hls4ml does not broadcast over a batch axis."""
        sizes = self.shapes[like][1:]
        if values.ndim == 0 or len(sizes) == 1:
            return values
        if 1 in sizes:
            raise ExportError(f"{name}: it gives an image of {sizes}, which hls4ml cannot multiply channel by "
                              "channel; use nn.Flatten and nn.Linear for it")  # fmt: skip
        return np.broadcast_to(values.reshape(1, -1, 1, 1), (1, *sizes))

    def multiply(self, x: str, output: str, factor: Floats, fraction: int) -> str:
        """Multiply by numbers of ``fraction`` fractional bits, whose type is in the file."""
        codes = np.maximum(np.rint(factor * 2.0**fraction), 1)
        values = self.spread(codes * 2.0**-fraction, output, output.removesuffix(".steps"))
        stored = self.graph.constant(f"{output}.factor.float", values.astype(np.float32))
        typed = self.quant(
            stored, f"{output}.factor", int(codes.max()).bit_length(), scale=2.0**-fraction, signed=False
        )
        return self.add("Mul", [x, typed], output, f"{output}.mul")

    def constant_of(self, name: str) -> tuple[Floats, Floats, int]:
        """Return codes, step and bits of a quantized constant."""
        node = self.graph.makers[name]
        values, scale, _, bits = (self.graph.value(entry).astype(np.float64) for entry in node.input)
        return np.rint(values / scale), scale.reshape(-1) if scale.ndim else scale, int(bits)

    def write_quant(self, node: NodeProto) -> None:
        """Write a grid: a product that turns integers into steps, and a Quant of step 1."""
        source, ceiling = self._ceiling(node)
        scale, bits = (float(self.graph.value(node.input[place])) for place in (1, 3))
        signed = bool(next(entry.i for entry in node.attribute if entry.name == "signed"))
        low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
        output = node.output[0]
        x = self._in_steps(source, output, scale, low, high)
        if ceiling is not None and round(ceiling / scale) < high:
            high = float(round(ceiling / scale))
            x = self._at_most(x, output, high, int(bits))
        self.quant(x, output, int(bits), signed=signed)
        self.known[output] = Integers(np.float64(scale), np.float64(low), np.float64(high))

    def _ceiling(self, node: NodeProto) -> tuple[str, float | None]:
        """Return what a Quant reads, and the end of the range that a Clip before it keeps."""
        clip = self.graph.makers.get(node.input[0])
        if clip is None or clip.op_type != "Clip":
            return node.input[0], None
        low, high = (float(self.graph.value(name)) for name in clip.input[1:])
        if low != 0:
            raise ExportError(f"{node.name}: it reads values that are clamped to start at {low:g}, which has no "
                              "fixed-point form; clamp them from 0 (ReLU6, say), or not at all")  # fmt: skip
        return clip.input[0], high

    def _in_steps(self, source: str, output: str, scale: float, low: float, high: float) -> str:
        """Return the tensor in steps of a grid, not yet rounded."""
        known = self.known.get(source)
        self.shapes.setdefault(f"{output}.steps", self.shapes[output])
        if known is None:  # the image
            factor = np.float64(1 / scale)
            return self.multiply(source, f"{output}.steps", factor, MANTISSA - 1 - int(np.floor(log2(factor))))
        factor = known.unit / scale
        if np.all(factor == 1):
            return source
        reach = np.maximum(np.abs(known.low), np.abs(known.high))
        return self.multiply(source, f"{output}.steps", factor, fraction_of(factor, reach, low, high))

    def _at_most(self, x: str, output: str, high: float, bits: int) -> str:
        """Bound integers by one that is not the end of a type: shift it to such an end, saturate, and shift back."""
        shift = 2.0**bits - 1 - high
        rounded = self.quant(x, f"{output}.rounded", bits, signed=False)
        raised = self.add(
            "Add", [rounded, self.integers(f"{output}.shift", np.array(shift))], f"{output}.raised", f"{output}.raise"
        )
        bounded = self.quant(raised, f"{output}.bounded", bits, signed=False)
        back = self.integers(f"{output}.back", np.array(-shift))
        return self.add("Add", [bounded, back], f"{output}.lowered", f"{output}.lower")

    def write_conv(self, node: NodeProto) -> None:
        """Write a convolution of integers, with an integer bias."""
        weights, step, bits = self.constant_of(node.input[1])
        known = self._layer_input(node)
        inputs = [node.input[0], self.integers(node.input[1], weights, bits)]
        bias = np.zeros(len(weights))
        if len(node.input) > 2:
            bias, _, _ = self.constant_of(node.input[2])
            inputs.append(self.integers(node.input[2], bias))
        attributes = _attributes(node)
        _check_window(node, attributes)
        group, channels = attributes["group"], self.shapes[node.input[0]][1]
        if group != 1 and not group == channels == len(weights):
            raise ExportError(f"{node.name}: hls4ml cannot do {group} groups of {channels} inputs and {len(weights)} "
                              "outputs; use groups=1, or a group for each input and output")  # fmt: skip
        self.add("Conv", inputs, node.output[0], node.name, **attributes)
        self.known[node.output[0]] = _accumulated(weights, bias, known, step)

    def write_gemm(self, node: NodeProto) -> None:
        """Write a linear layer as a product and a sum; a Quant that changes nothing keeps hls4ml's sum integer."""
        weights, step, bits = self.constant_of(node.input[1])
        known, output = self._layer_input(node), node.output[0]
        bias = self.constant_of(node.input[2])[0] if len(node.input) > 2 else np.zeros(len(weights))
        found = self.known[output] = _accumulated(weights, bias, known, step)
        product = [node.input[0], self.integers(node.input[1], np.ascontiguousarray(weights.T), bits)]
        if len(node.input) < 3:
            self.add("MatMul", product, output, node.name)
            return
        summed = self.add("MatMul", product, f"{output}.products", node.name)
        typed = self.integers(node.input[2], bias)
        summed = self.add("Add", [summed, typed], f"{output}.sum", f"{node.name}.bias")
        self.quant(summed, output, _bits(float(found.low.min()), float(found.high.max())))

    def _layer_input(self, node: NodeProto) -> Integers:
        known = self._known(node, node.input[0])
        if known.unit.ndim:
            raise ExportError(f"{node.name}: its input has one step per channel, but must have a single step")
        return known

    def _known(self, node: NodeProto, name: str) -> Integers:
        if name not in self.known:
            raise ExportError(f"{node.name}: it reads {name!r}, which is not on a grid, as fixed point requires")
        return self.known[name]

    def write_mean(self, node: NodeProto) -> None:
        """Write a mean as a sum, by a depthwise convolution; its quantizer divides."""
        channels, *size = self.shapes[node.input[0]][1:]
        given = _attributes(node)
        kernel = given.get("kernel_shape", size)
        pads, strides = given.get("pads", [0] * 4), given.get("strides", [1, 1])
        if any(pads) and not given.get("count_include_pad", 0):
            raise ExportError(f"{node.name}: a mean that excludes padding has no fixed-point form; use padding=0, or "
                              "count_include_pad=True")  # fmt: skip
        known, output, count = self._layer_input(node), node.output[0], int(np.prod(kernel))
        # not 1: hls4ml would merge the product after it into weights of 1, which have another shape
        weights = self.integers(f"{output}.weight", np.full((channels, 1, *kernel), 2.0))
        window = {"kernel_shape": list(kernel), "strides": list(strides), "pads": list(pads), "dilations": [1, 1]}
        self.add("Conv", [node.input[0], weights], output, node.name, **window, group=channels)
        self.known[output] = Integers(
            known.unit / (2 * count), min(known.low, np.float64(0)) * 2 * count, known.high * 2 * count
        )

    def write_max_pool(self, node: NodeProto) -> None:
        """Keep a maximum; if padded, on a signed type, since hls4ml pads an unsigned one with a large value."""
        given, known, output = _attributes(node), self._known(node, node.input[0]), node.output[0]
        pads = list(given.get("pads", [0] * 4))
        _check_window(node, given)
        if pads[:2] != pads[2:]:
            raise ExportError(f"{node.name}: hls4ml pads both ends of a maximum alike, but this one has pads {pads}; "
                              "use ceil_mode=False and one padding")  # fmt: skip
        is_mended = any(pads) and float(known.low.min()) >= 0
        bits = int(known.high.max()).bit_length()
        source = self.quant(node.input[0], f"{output}.signed", bits + 1) if is_mended else node.input[0]
        name = f"{output}.maximum" if is_mended else output
        self.add("MaxPool", [source], name, node.name, **given)
        if is_mended:
            self.quant(name, output, max(bits, 2), signed=False)
        self.known[output] = known

    def write_add(self, node: NodeProto) -> None:
        """Keep the sum of two tensors with the same unit."""
        one, other = (self._known(node, name) for name in node.input)
        if not np.array_equal(one.unit, other.unit):
            raise ExportError(f"{node.name}: its operands have steps {one.unit} and {other.unit}, but must share one")
        self.nodes.append(node)
        self.known[node.output[0]] = Integers(one.unit, one.low + other.low, one.high + other.high)

    def write_move(self, node: NodeProto) -> None:
        """Keep a node that only moves integers of one unit."""
        found = [self._known(node, name) for name in node.input if name not in self.graph.tensors]
        if any(not np.array_equal(entry.unit, found[0].unit) for entry in found):
            raise ExportError(f"{node.name}: its inputs have different steps, but must share one")
        self.nodes.append(node)
        low, high = min(entry.low.min() for entry in found), max(entry.high.max() for entry in found)
        self.known[node.output[0]] = Integers(found[0].unit, np.float64(low), np.float64(high))

    def write_clip(self, node: NodeProto) -> None:
        """Leave a Clip to the Quant that reads it."""

    def _give_real(self, name: str) -> None:
        """Make an output real again: its integers times their unit, to 24 bits."""
        known = self.known.get(name)
        if known is None:
            raise ExportError(f"the output {name!r} is the image itself, which has no fixed-point form")
        exact = f"{name}.integers"
        for node in self.nodes:
            node.output[:] = [exact if entry == name else entry for entry in node.output]
            node.input[:] = [exact if entry == name else entry for entry in node.input]
        fraction = MANTISSA - 1 - int(np.floor(log2(float(known.unit.max()))))
        self.multiply(exact, name, known.unit, fraction)


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _check_window(node: NodeProto, attributes: dict[str, Any]) -> None:
    if any(size != 1 for size in attributes.get("dilations", [1])):
        raise ExportError(f"{node.name}: hls4ml has no dilated windows; use dilation=1, or another target")


def _accumulated(weights: Floats, bias: Floats, known: Integers, step: Floats) -> Integers:
    rows = weights.reshape(len(weights), -1)
    above, below = np.maximum(rows, 0).sum(1), np.minimum(rows, 0).sum(1)
    unit = np.asarray(step * known.unit)
    low, high = (above * known.low + below * known.high + bias, above * known.high + below * known.low + bias)
    return Integers(unit, np.minimum(low, bias), np.maximum(high, bias))


def fraction_of(factor: Floats, reach: Floats, low: float, high: float) -> int:
    """Return the fewest fractional bits of a multiplier with which no integer changes its code.

    Args:
        factor: What integers are multiplied by, a scalar or one per channel.
        reach: Bound of the integers' size, likewise.
        low: Smallest code of the grid that the product is rounded to.
        high: Largest one.

    Returns:
        That number, or the most that float32 has if no number suffices.
    """
    most = MANTISSA - 1 - int(np.floor(log2(float(factor.max()))))
    fewest = max(0, -int(np.floor(log2(float(factor.min())))))
    return next((bits for bits in range(fewest, most) if _keeps_codes(factor, reach, low, high, bits)), most)


def _keeps_codes(factor: Floats, reach: Floats, low: float, high: float, fraction: int) -> bool:
    half_codes = np.arange(low, high) + 0.5
    rounded = np.rint(factor * 2.0**fraction) * 2.0**-fraction
    exact, moved = (half_codes / values[..., None] for values in (factor, np.maximum(rounded, 2.0**-fraction)))
    distance, left = (np.abs(ties - np.rint(ties)) for ties in (exact, moved))
    kept = (np.floor(exact) == np.floor(moved)) & (left >= KEPT_MARGIN * distance)
    return bool((kept | (np.minimum(np.abs(exact), np.abs(moved)) > reach[..., None] + 1)).all())


def _bits(low: float, high: float) -> int:
    """Return the width of the narrowest signed type that holds a range; at least two bits, as one means -1 and 1."""
    return max(2, 1 + max(ceil(log2(max(-low, 1))), ceil(log2(max(high, 0) + 1))))


def _infer_shapes(model: ModelProto) -> None:
    """Give every tensor its shape, which the readers of Quant nodes cannot infer."""
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(without_custom_operators(model), check_type=True, strict_mode=True)
    model.graph.value_info.extend(inferred.graph.value_info)
    onnx.checker.check_model(model)


WRITERS: dict[str, Callable[[_Rewriting, NodeProto], None]] = {
    "Add": _Rewriting.write_add,
    "AveragePool": _Rewriting.write_mean,
    "Clip": _Rewriting.write_clip,
    "Conv": _Rewriting.write_conv,
    "Gemm": _Rewriting.write_gemm,
    "GlobalAveragePool": _Rewriting.write_mean,
    "MaxPool": _Rewriting.write_max_pool,
    "Quant": _Rewriting.write_quant,
    **dict.fromkeys(MOVES, _Rewriting.write_move),
}
