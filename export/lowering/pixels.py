"""Write the normalization of uint8 pixels as the first nodes of a graph, and show it equal for every pixel value.

The same float32 operations in the same order as in training: Cast, Mul, Sub. Their rounding is not left to chance,
since :func:`check_pixels` runs all 256 values of every channel through the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from export.checks import ExportError
from export.graph.builder import GraphBuilder
from export.runtime import open_session
from export.storage.packing import INT8, ir_version
from export.storage.preprocessing import LEVELS, Preprocessing

NORMALIZED = "images.normalized"


def write_normalization(graph: GraphBuilder, pixels: str, preprocessing: Preprocessing) -> str:
    """Write what turns uint8 pixels into normalized float32; return that tensor, ``[batch, channels, height, width]``.

    Args:
        graph: The graph to add to.
        pixels: Name of the graph's input.
        preprocessing: Of that input.
    """
    scale, shift = preprocessing.factors
    if preprocessing.layout == "nchw":
        return _arithmetic(graph, pixels, scale, shift, NORMALIZED)
    height, width = preprocessing.image_size
    # whole rows at a time: broadcasting over a last axis of three takes ONNX Runtime thirty times as long
    rows, back = [0, height, width * preprocessing.channels], [0, height, width, preprocessing.channels]
    pixels = graph.add("Reshape", [pixels, _shape(graph, "rows", rows)], "images.rows", name="images.rows")
    scales, shifts = np.tile(scale.reshape(-1), width), np.tile(shift.reshape(-1), width)
    real = _arithmetic(graph, pixels, scales, shifts, "images.whole")
    real = graph.add("Reshape", [real, _shape(graph, "back", back)], "images.nhwc", name="images.nhwc")
    # ONNX Runtime moves it after the quantizer, where it meets the one that its NHWC kernels need
    return graph.add("Transpose", [real], NORMALIZED, name=NORMALIZED, perm=[0, 3, 1, 2])


def _arithmetic(
    graph: GraphBuilder, pixels: str, scale: npt.NDArray[np.float32], shift: npt.NDArray[np.float32], output: str
) -> str:
    real = graph.add("Cast", [pixels], "images.real", name="images.real", to=TensorProto.FLOAT)
    scaled = graph.add("Mul", [real, graph.constant("images.scale", scale)], "images.scaled", name="images.scaled")
    return graph.add("Sub", [scaled, graph.constant("images.shift", shift)], output, name=output)


def _shape(graph: GraphBuilder, name: str, sizes: list[int]) -> str:
    return graph.constant(f"images.{name}.shape", np.array(sizes, np.int64))


def check_pixels(model: onnx.ModelProto, preprocessing: Preprocessing) -> None:
    """Raise unless a file normalizes all 256 values of every channel to the bit, and puts them on the right codes.

    The codes of the quantizers that read the images are those of the same file fed normalized floats; with
    optimizations off and on.

    Args:
        model: With the nodes that :func:`write_normalization` wrote.
        preprocessing: The one that it holds.

    Raises:
        ExportError: If a value differs (the message names the first one), or onnxruntime is missing.
    """
    try:
        _check_pixels(model, preprocessing)
    except (ImportError, FileNotFoundError) as error:
        raise ExportError(f"preprocessing inside the file must be shown to be exact, but {error}") from error


def _check_pixels(model: onnx.ModelProto, preprocessing: Preprocessing) -> None:
    images = every_pixel(preprocessing)
    wanted = preprocessing.normalize(images)
    readers = [node.output[0] for node in model.graph.node if NORMALIZED in node.input]
    inside = _piece(model, readers, preprocessing.input_shape("batch"))
    floats = _piece(model, readers, ["batch", *wanted.shape[1:]], start=NORMALIZED)
    codes = open_session(floats, optimize=False).run(readers, {NORMALIZED: wanted})
    for optimize in (False, True):
        given = open_session(inside, optimize=optimize).run(
            [NORMALIZED, *readers], {model.graph.input[0].name: preprocessing.as_fed(images)}
        )
        for name, found, right in zip([NORMALIZED, *readers], given, [wanted, *codes], strict=True):
            _require_equal(name, np.asarray(found), np.asarray(right), images)


def every_pixel(preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Return images that hold each of the 256 values in each channel, as few as that takes."""
    height, width = preprocessing.image_size
    count = -(-LEVELS // (height * width))
    values = (np.arange(count * height * width) % LEVELS).astype(np.uint8).reshape(count, 1, height, width)
    return np.ascontiguousarray(np.repeat(values, preprocessing.channels, axis=1))


def _require_equal(name: str, found: npt.NDArray[Any], wanted: npt.NDArray[Any], images: npt.NDArray[np.uint8]) -> None:
    if found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes():
        return
    same_shape = found.shape == wanted.shape == images.shape
    different = np.argwhere(found != wanted) if same_shape else np.zeros((0, 4), np.int64)
    where = f" at the pixel value {images[tuple(different[0])]}, channel {different[0][1]}" if len(different) else ""
    raise ExportError(
        f"preprocessing inside the file is not exact: {name} differs from the normalized image{where}; export with "
        "preprocessing outside"
    )


def _piece(model: onnx.ModelProto, outputs: list[str], shape: list[int | str], *, start: str = "") -> bytes:
    """Return the part of a model from its input (or the tensor ``start``, float) to some tensors, as a model."""
    makers = {name: node for node in model.graph.node for name in node.output}
    wanted, kept = [*outputs, NORMALIZED] if not start else list(outputs), set()
    while wanted:
        name = wanted.pop()
        if name != start and name in makers and makers[name].output[0] not in kept:
            kept.add(makers[name].output[0])
            wanted += list(makers[name].input)
    nodes = [node for node in model.graph.node if node.output[0] in kept]
    used = {name for node in nodes for name in node.input}
    kind = TensorProto.FLOAT if start else TensorProto.UINT8
    source = helper.make_tensor_value_info(start or model.graph.input[0].name, kind, shape)
    given = [helper.make_empty_tensor_value_info(name) for name in outputs]
    if not start:
        given.append(helper.make_tensor_value_info(NORMALIZED, TensorProto.FLOAT, None))
    constants = [tensor for tensor in model.graph.initializer if tensor.name in used]
    graph = helper.make_graph(nodes, "pixels", [source], given, constants)
    # these operators are the same in every set since the oldest: a runtime too old for the weights runs this part
    opset = min([INT8.opset, *(entry.version for entry in model.opset_import if not entry.domain)])
    piece = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version(opset))
    return bytes(piece.SerializeToString())
