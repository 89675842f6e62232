"""Change a written graph for one runtime, so that it computes what the student does.

Every rewrite preserves the function in ONNX Runtime, bit for bit; parity checks it there, and in the runtime itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, helper

from export.targets.fixed_point import between_integers
from export.targets.graph import Graph

# Below half of any step that a float32 grid can have, so that no code changes; and not 0, so that it stays in the graph
TINY = np.float32(1e-30)
LARGEST = np.finfo(np.float32).max
PIXELS_AT_ONCE = 16  # of OpenCV's kernel for pointwise convolutions of codes


def separate_sums(model: ModelProto) -> None:
    """Put a MaxPool of one pixel, which changes nothing, between a convolution's quantizer and a sum or product.

    OpenVINO otherwise fuses ``Conv -> quantizer -> Add -> quantizer`` into one kernel, which does not round at the
    inner quantizer. A Clip there prevents that only in models with a fixed batch; nothing is fused across a pooling.
    """
    graph, nodes = Graph(model), []
    places = {id(made) for node in graph.nodes if node.op_type in ("Add", "Mul") for made in _convolved(graph, node)}
    for node in graph.nodes:
        if id(node) in places:
            pooled = f"{node.output[0]}.apart"
            nodes.append(_kept_apart(node.input[0], pooled))
            node.input[0] = pooled
        nodes.append(node)
    graph.finish(nodes)


def _kept_apart(given: str, made: str) -> NodeProto:
    """Return a pooling that changes nothing."""
    return helper.make_node("MaxPool", [given], [made], name=made, kernel_shape=[1, 1], strides=[1, 1])


def _convolved(graph: Graph, node: NodeProto) -> Iterator[NodeProto]:
    """Yield each DequantizeLinear of a node's inputs whose codes are those of a convolution."""
    for name in node.input:
        dequantize = graph.makers.get(name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        made = graph.makers.get(dequantize.input[0])
        while made is not None and made.op_type in ("Clip", "QuantizeLinear"):
            made = graph.makers.get(made.input[0])
        if made is not None and made.op_type == "Conv":
            yield dequantize


def no_full_clips(model: ModelProto) -> None:
    """Remove each Clip that keeps all 256 codes of its type.

    IREE treats uint8 as signed in Clip, so that 255 is -1. Codes below 128 are right either way. Such a Clip keeps two
    quantizers apart, which ONNX Runtime otherwise joins into one with another scale; a Max that keeps every real value
    does it instead.
    """
    graph = Graph(model)
    nodes: list[NodeProto] = []
    freed = [node for node in graph.nodes if node.op_type == "Clip" and _is_full(graph, node)]
    for clip in freed:
        _read_instead(graph, clip.output[0], clip.input[0])
    quantizers = [graph.makers[clip.input[0]] for clip in freed if clip.input[0] in graph.makers]
    for node in graph.nodes:
        if any(node is one for one in quantizers):
            nodes.extend(_apart(graph, node))
        if not any(node is one for one in freed):
            nodes.append(node)
    graph.finish(nodes)


def _apart(graph: Graph, quantizer: NodeProto) -> Iterator[NodeProto]:
    """Yield the node between a quantizer and the one before it, if that follows directly."""
    real = quantizer.input[0]
    if real in graph.makers and graph.makers[real].op_type == "DequantizeLinear":
        name = f"{quantizer.output[0]}.apart"
        quantizer.input[0] = name
        yield helper.make_node("Max", [real, graph.constant(f"{name}.low", -LARGEST)], [name], name=name)


def _is_full(graph: Graph, clip: NodeProto) -> bool:
    if any(name not in graph.tensors for name in clip.input[1:]):
        return False
    low, high = (graph.value(name) for name in clip.input[1:])
    if not np.issubdtype(low.dtype, np.integer):
        return False
    info = np.iinfo(low.dtype)  # type: ignore[type-var]
    return bool(low == info.min and high == info.max)


def _read_instead(graph: Graph, old: str, new: str) -> None:
    for node in graph.readers(old):
        node.input[:] = [new if name == old else name for name in node.input]


def nonzero_biases(model: ModelProto) -> None:
    """Give each linear layer whose bias is absent or all zeros a nonzero one: 1e-30 in the first element.

    OpenVINO 2026.4 drops a bias of zeros, and then computes garbage if two such layers follow each other.
    """
    graph = Graph(model)
    for node in graph.nodes:
        if node.op_type != "Gemm" or _bias(graph, node).any():
            continue
        values = np.zeros(_bias(graph, node).shape, np.float32)
        values[0] = TINY
        node.input[:] = [*node.input[:2], graph.constant(f"{node.name}.bias.tiny", values)]
    graph.finish(graph.nodes)


def float_linear_biases(model: ModelProto) -> None:
    """Store the biases of linear layers as floats: each code times the accumulator's step.

    OpenCV 5 takes a Gemm's bias only as a constant. In ONNX Runtime nothing changes: it recovers the codes.
    """
    graph = Graph(model)
    for node in graph.nodes:
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] in graph.makers:
            node.input[2] = graph.constant(f"{node.name}.bias.float", _bias(graph, node))
    graph.finish(graph.nodes)


def float_convolutions(model: ModelProto) -> None:
    """Put a Clip that keeps every value behind each convolution that OpenCV's integer kernels compute wrongly.

    OpenCV 5.0 fuses ``DequantizeLinear -> Conv -> QuantizeLinear`` into a convolution of codes. The last pixels of each
    plane are then wrong (seen on a processor with AVX-512)

    - of a kernel with one pixel and no stride, unless their number is a multiple of 16;
    - of a depthwise convolution with padding whose input has a zero point, in planes of some sizes (6x6 and 7x7, for
      example). Other convolutions with groups were right, but are treated like it: few were tried.

    With the Clip, OpenCV computes the convolution in float.
    """
    graph, nodes = Graph(model), []
    sizes = _pixels(model)
    for node in graph.nodes:
        nodes.append(node)
        if node.op_type != "Conv":
            continue
        has_rest = _is_pointwise(node) and sizes.get(node.output[0], 1) % PIXELS_AT_ONCE
        if not has_rest and not _is_padded_in_groups(graph, node):
            continue
        name = f"{node.output[0]}.float"
        _read_instead(graph, node.output[0], name)
        ends = (graph.constant(f"{name}.{end}", value) for end, value in (("low", -LARGEST), ("high", LARGEST)))
        nodes.append(helper.make_node("Clip", [node.output[0], *ends], [name], name=name))
    graph.finish(nodes)


def narrow_pads(model: ModelProto) -> None:
    """Pad a convolution's input by a separate node where its own padding is at least as wide as its kernel.

    Some outputs of such a convolution see nothing but padding. OpenVINO 2026.4 computes other codes there if the input
    has one channel. A pooling that changes nothing keeps OpenVINO from joining the padding to the convolution again.
    """
    graph, nodes = Graph(model), []
    for node in graph.nodes:
        if node.op_type == "Conv" and (excess := _too_wide(node)):
            nodes.append(_pad_before(graph, node, excess))
            nodes.append(_kept_apart(node.input[0], f"{node.input[0]}.apart"))
            node.input[0] = nodes[-1].output[0]
        nodes.append(node)
    graph.finish(nodes)


def points_without_pads(model: ModelProto) -> None:
    """Pad the input of each convolution of single pixels by a separate node; OpenCV 5.0 ignores its own padding."""
    graph, nodes = Graph(model), []
    for node in graph.nodes:
        if node.op_type == "Conv" and _is_pointwise(node) and (excess := _too_wide(node)):
            nodes.append(_pad_before(graph, node, excess))
        nodes.append(node)
    graph.finish(nodes)


def _pad_before(graph: Graph, conv: NodeProto, pads: Sequence[int]) -> NodeProto:
    """Return a node that does a part of a convolution's padding; the convolution reads it, and does the rest."""
    name, axes = f"{conv.name}.padded", len(pads) // 2
    widths = graph.constant(f"{name}.widths", np.array([0, 0, *pads[:axes], 0, 0, *pads[axes:]], np.int64))
    node = helper.make_node("Pad", [conv.input[0], widths], [name], name)
    own = next(attribute for attribute in conv.attribute if attribute.name == "pads")
    own.ints[:] = [width - more for width, more in zip(own.ints, pads, strict=True)]
    conv.input[0] = name
    return node


def _too_wide(conv: NodeProto) -> list[int]:
    """Return by how much each padding exceeds the widest with which every output sees an input; empty if none does."""
    given = {attribute.name: list(attribute.ints) for attribute in conv.attribute}
    if "pads" not in given:
        return []
    kernel = given["kernel_shape"]
    most = [(size - 1) * step for size, step in zip(kernel, given.get("dilations", [1] * len(kernel)), strict=True)]
    excess = [max(0, width - limit) for width, limit in zip(given["pads"], most * 2, strict=True)]
    return excess if any(excess) else []


def _is_pointwise(conv: NodeProto) -> bool:
    given = {attribute.name: list(attribute.ints) for attribute in conv.attribute}
    return set(given["kernel_shape"]) == {1} and set(given.get("strides", [1])) == {1}


def _is_padded_in_groups(graph: Graph, conv: NodeProto) -> bool:
    """Return whether a convolution has groups, padding, and an input whose code of zero is not 0."""
    given = {attribute.name: attribute for attribute in conv.attribute}
    if "group" not in given or given["group"].i == 1 or "pads" not in given or not any(given["pads"].ints):
        return False
    made = graph.makers.get(conv.input[0])
    if made is None or made.op_type != "DequantizeLinear":
        return True  # its codes are not known here
    return len(made.input) > 2 and bool(graph.value(made.input[2]).any())


def _pixels(model: ModelProto) -> dict[str, int]:
    """Return the number of pixels of each tensor's planes, where it is known."""
    found = {}
    for entry in onnx.shape_inference.infer_shapes(model).graph.value_info:
        sides = [side.dim_value for side in entry.type.tensor_type.shape.dim[2:]]
        if sides and all(sides):
            found[entry.name] = math.prod(sides)
    return found


def _bias(graph: Graph, layer: NodeProto) -> npt.NDArray[np.float32]:
    """Return the real bias of a layer, zeros if it has none."""
    if len(layer.input) < 3:
        return np.zeros(_outputs(graph, layer), np.float32)
    if layer.input[2] in graph.tensors:
        return np.asarray(graph.value(layer.input[2]), np.float32)
    codes, scale = (graph.value(name) for name in graph.makers[layer.input[2]].input[:2])
    return np.asarray(codes.astype(np.float32) * scale.astype(np.float32), np.float32)


def _outputs(graph: Graph, layer: NodeProto) -> int:
    name = layer.input[1]
    while name in graph.makers:
        name = graph.makers[name].input[0]
    return int(graph.tensors[name].dims[0])


REWRITES: dict[str, Callable[[ModelProto], None]] = {
    "between_integers": between_integers,
    "float_convolutions": float_convolutions,
    "float_linear_biases": float_linear_biases,
    "narrow_pads": narrow_pads,
    "no_full_clips": no_full_clips,
    "nonzero_biases": nonzero_biases,
    "points_without_pads": points_without_pads,
    "separate_sums": separate_sums,
}


def rewrite(model: ModelProto, names: Sequence[str]) -> None:
    """Apply rewrites by name, in order, in place.

    Raises:
        onnx.checker.ValidationError: If a rewrite broke the graph.
    """
    for name in names:
        REWRITES[name](model)
    if names and not any(entry.domain for entry in model.opset_import):
        onnx.checker.check_model(model, full_check=True)
