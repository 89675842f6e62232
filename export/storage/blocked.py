"""Write heavy low-bit linear layers as ``MatMulNBits`` so that the integer sums stay exact.

A linear layer at batch 1 is bound by reading its weights. ONNX Runtime's ``MatMulNBits`` reads 4 or 2 bits per weight
where ``QGemm`` reads 8. But it quantizes its real input again, in blocks along the features: ``scale = max|x| / 127``,
codes rounded to int8, so that codes 0 ... 15 would become multiples of 8.47 and the sums wrong.

Here every block ends in a sentinel: an input of 127 that meets a weight of 0. The largest value of each block is then
127, the block's scale is 1, and the student's codes (at most 127 in size) pass unchanged. Weight scales of 1 leave the
accumulator itself, a whole number below 2**24 in float32; bias and scale come afterward, as in the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from export.checks import ExportError
from export.graph.builder import GraphBuilder, pack_codes
from export.storage.packing import INT8, Blocks, ir_version
from quantizers.integer import Grid, IntegerView, Linear

LinearForm = Literal["auto", "gemm", "matmul_nbits"]
LINEAR_FORMS: tuple[LinearForm, ...] = ("auto", "gemm", "matmul_nbits")

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
INTEGER_ACCUMULATION = 4  # `accuracy_level`: int8 products, int32 sums
SENTINEL = 127
EXACT = 2**24  # whole numbers below it are exact in float32
HEAVY_WEIGHTS = 2**20  # below, reading the weights is not what takes the time
RACE_OUTPUTS, RACE_FEATURES = 512, 1016


# 2-bit kernels are fast up to 128 weights per block, 4-bit ones as fast at 256 as at 128 (onnxruntime 1.31.1, AVX2)
WIDTHS = (Blocks(2, 128), Blocks(4, 256))


def choose_blocks(view: IntegerView, form: str) -> dict[str, Blocks]:
    """Return the layers that become ``MatMulNBits``, by name, and their blocks.

    Args:
        view: What the student computes.
        form: ``gemm``: none. ``matmul_nbits``: every linear layer that it computes exactly. ``auto``: the heavy ones
            of these, as far as the installed onnxruntime is right and fast at them.

    Raises:
        ExportError: If ``form`` is unknown.
    """
    if form not in LINEAR_FORMS:
        raise ExportError(f"linear must be one of {', '.join(LINEAR_FORMS)}, got {form!r}")
    if form == "gemm":
        return {}
    chosen: dict[str, Blocks] = {}
    for node in view.nodes:
        if isinstance(node, Linear) and is_exact(node, view.grids.get(node.inputs[0])):
            blocks = next(width for width in WIDTHS if width.bits >= node.weight_bits)
            if form == "matmul_nbits" or (node.weights.size >= HEAVY_WEIGHTS and runtime_is_fast(blocks)):
                chosen[node.name] = blocks
    return chosen


def is_exact(layer: Linear, grid: Grid | None) -> bool:
    """Return whether codes pass unchanged and every sum is a whole number that float32 holds."""
    if grid is None or layer.weight_bits > WIDTHS[-1].bits or max(-grid.low, grid.high) > SENTINEL:
        return False
    largest = np.abs(layer.weights.astype(np.int64)).sum(axis=1) * max(-grid.low, grid.high)
    bias = 0 if layer.bias is None else np.abs(layer.bias.astype(np.int64))
    return bool((largest + bias < EXACT).all())


def write_blocked(graph: GraphBuilder, layer: Linear, stored: str, zero_point: int, step: float, blocks: Blocks) -> str:
    """Write the layer; return its real output ``[batch, outputs]``.

    Args:
        graph: The graph to add to.
        layer: One that ``choose_blocks`` chose.
        stored: Its input's codes, uint8, ``zero_point`` added.
        zero_point: See there.
        step: Real size of one step of the input.
        blocks: How its weights are cut.
    """
    name = layer.name
    x = _with_sentinels(graph, name, stored, zero_point, layer.weights.shape[1], blocks)
    count = blocks.count(layer.weights.shape[1])
    inputs = [
        x,
        graph.constant(f"{name}.weight.blocks", pack_blocks(layer.weights, blocks)),
        graph.constant(f"{name}.weight.ones", np.ones(layer.weights.shape[0] * count, np.float32)),
    ]
    if layer.bias is not None:  # codes: the sum stays whole
        inputs += ["", "", graph.constant(f"{name}.bias.codes", layer.bias.astype(np.float32))]
    factors = (  # multiplied when the file is loaded; separate, so that `unblock` finds the originals
        graph.constant(f"{name}.weight.scale", _scale_by_output(layer)),
        graph.constant(f"{name}.step", np.float32(step)),
    )
    unit = graph.add("Mul", factors, f"{name}.unit", name=f"{name}.unit")
    sums = _matrix_product(graph, layer, inputs, f"{name}.sums", blocks)
    return graph.add("Mul", [sums, unit], layer.output, name=f"{name}.scale")


def _scale_by_output(layer: Linear) -> npt.NDArray[np.float32]:
    """Return one weight scale per output: the factor also tells shape inference how many outputs there are."""
    return np.ascontiguousarray(np.broadcast_to(layer.weight_scale.astype(np.float32), (len(layer.weights),)))


def _matrix_product(graph: GraphBuilder, layer: Linear, inputs: Sequence[str], output: str, blocks: Blocks) -> str:
    outputs, features = layer.weights.shape
    return graph.add(
        OPERATOR, inputs, output, name=layer.name, domain=DOMAIN, K=blocks.count(features) * blocks.size, N=outputs,
        bits=blocks.bits, block_size=blocks.size, accuracy_level=INTEGER_ACCUMULATION,
    )  # fmt: skip


def _with_sentinels(graph: GraphBuilder, name: str, stored: str, zero_point: int, features: int, blocks: Blocks) -> str:
    """Write the codes as float32 ``[batch, blocks * size]``, each block closed by a sentinel."""
    count, real = blocks.count(features), blocks.size - 1

    def shape(key: str, values: list[int]) -> str:
        return graph.constant(f"{name}.{key}", np.array(values, np.int64))

    x = graph.add("Cast", [stored], f"{name}.codes", name=f"{name}.cast", to=TensorProto.FLOAT)
    if zero_point:
        offset = graph.constant(f"{name}.zero_point", np.float32(zero_point))
        x = graph.add("Sub", [x, offset], f"{name}.signed", name=f"{name}.shift")
    if missing := count * real - features:
        x = graph.add("Pad", [x, shape("fill", [0, 0, 0, missing])], f"{name}.filled", name=f"{name}.fill")
    x = graph.add("Reshape", [x, shape("cut", [-1, count, real])], f"{name}.blocks", name=f"{name}.cut")
    sentinel = graph.constant(f"{name}.sentinel", np.float32(SENTINEL))
    closed = shape("close", [0, 0, 0, 0, 0, 1])
    x = graph.add("Pad", [x, closed, sentinel], f"{name}.closed", name=f"{name}.close")
    return graph.add("Reshape", [x, shape("join", [-1, count * blocks.size])], f"{name}.joined", name=f"{name}.join")


def pack_blocks(codes: npt.NDArray[np.signedinteger], blocks: Blocks) -> npt.NDArray[np.uint8]:
    """Return weights ``[outputs, inputs]`` as ``[outputs, blocks, bytes]``, unsigned around the middle code."""
    outputs, features = codes.shape
    count, real = blocks.count(features), blocks.size - 1
    filled = np.zeros((outputs, count * real), np.int8)
    filled[:, :features] = codes
    cut = np.zeros((outputs, count, blocks.size), np.int8)
    cut[:, :, :real] = filled.reshape(outputs, count, real)
    packed = pack_codes(cut + np.int8(2 ** (blocks.bits - 1)), blocks.bits)
    return np.frombuffer(packed, np.uint8).reshape(outputs, count, -1)


def unpack_blocks(packed: npt.NDArray[np.uint8], features: int, blocks: Blocks) -> npt.NDArray[np.int8]:
    """Return the weights ``[outputs, features]`` of ``pack_blocks``."""
    outputs, count, _ = packed.shape
    shifts = np.arange(0, 8, blocks.bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(2**blocks.bits - 1)
    signed = codes.reshape(outputs, count, blocks.size).astype(np.int8) - np.int8(2 ** (blocks.bits - 1))
    return np.ascontiguousarray(signed[:, :, :-1].reshape(outputs, -1)[:, :features])


@cache
def runtime_is_fast(blocks: Blocks) -> bool:
    """Return whether the installed onnxruntime computes such blocks correctly, and not many times slower than QGemm.

    Without a kernel for a width it unpacks all weights to float on every call, which takes a hundred times as long.
    """
    try:
        import onnxruntime
    except ImportError:
        return False
    from export.devices.onboard.runner import wins_race  # `export.devices` needs this module

    return wins_race(onnxruntime, *race_models(blocks))


def race_models(blocks: Blocks) -> tuple[bytes, bytes, int]:
    """Return a layer in blocks, the same as a Gemm, and by how much the former's outputs are to be larger.

    Input: uint8 ``x`` ``[1, 1016]``; output: float32 ``y`` ``[1, 512]``. Every weight is 1, the sentinels' included,
    and made when the file is loaded, so that the files are small enough for a command line.
    """
    count = blocks.count(RACE_FEATURES)
    each = 1 + 2 ** (blocks.bits - 1)
    byte = sum(each << shift for shift in range(0, 8, blocks.bits))
    layer = Linear(
        "fc",
        ("x",),
        "y.real",
        np.ones((RACE_OUTPUTS, RACE_FEATURES), np.int8),
        blocks.bits,
        np.ones(1, np.float32),
        None,
    )
    graph = GraphBuilder(reserved=("x",))
    x = _with_sentinels(graph, layer.name, "x", 0, RACE_FEATURES, blocks)
    shape = (RACE_OUTPUTS, count, blocks.size * blocks.bits // 8)
    packed = _filled(graph, "weights", np.array([byte], np.uint8), shape)
    ones = _filled(graph, "ones", np.ones(1, np.float32), (RACE_OUTPUTS * count,))
    _matrix_product(graph, layer, [x, packed, ones], "y", blocks)

    plain = GraphBuilder(reserved=("x",))
    one, zero = plain.constant("one", np.float32(1)), plain.constant("zero", np.uint8(0))
    real = plain.add("DequantizeLinear", ["x", one, zero], "x.real", name="x.real")
    codes = _filled(plain, "codes", np.ones(1, np.int8), layer.weights.shape)
    weight = plain.add("DequantizeLinear", [codes, one, plain.constant("none", np.int8(0))], "w", name="w")
    plain.nodes.append(helper.make_node("Gemm", [real, weight], ["y"], transB=1))
    return _alone(graph), _alone(plain), SENTINEL * count


def _filled(graph: GraphBuilder, name: str, value: npt.NDArray[Any], shape: Sequence[int]) -> str:
    sizes = graph.constant(f"{name}.shape", np.array(shape, np.int64))
    return graph.add("ConstantOfShape", [sizes], name, name=name, value=numpy_helper.from_array(value))


def _alone(graph: GraphBuilder) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, RACE_FEATURES])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, RACE_OUTPUTS])
    proto = helper.make_graph(graph.nodes, "race", [x], [y], graph.initializers)
    opsets = [helper.make_opsetid("", INT8.opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=ir_version(INT8.opset))
    return bytes(model.SerializeToString())
