"""Choose how low-bit weights are stored, and the opset that follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.checks import ExportError
from export.graph.builder import GraphBuilder

Pack = Literal["auto", "int8", "packed"]
PACKS: tuple[Pack, ...] = ("auto", "int8", "packed")


@dataclass(frozen=True)
class ElementType:
    """A type that weights may be stored in.

    Args:
        name: As shown to users.
        code: Its number in ONNX.
        bits: Its width.
        opset: The oldest operator set that this toolkit writes it with.
    """

    name: str
    code: int
    bits: int
    opset: int


# int8: old enough for runtimes of 2022; per-channel DequantizeLinear needs 13, HardSwish 14
INT8 = ElementType("int8", TensorProto.INT8, 8, 17)
INT4 = ElementType("int4", TensorProto.INT4, 4, 21)
INT2 = ElementType("int2", TensorProto.INT2, 2, 25)
FLOAT32 = ElementType("float32", TensorProto.FLOAT, 32, 13)


@dataclass(frozen=True)
class Blocks:
    """How the weights of a layer are cut.

    Args:
        bits: Of a stored weight, 2 or 4.
        size: Weights in a block, the sentinel's included; a power of two.
    """

    bits: int
    size: int

    @property
    def name(self) -> str:
        """As shown to users."""
        return f"blocks of {self.size} x {self.bits} bits"

    def count(self, features: int) -> int:
        """Return how many blocks a row of this many weights fills."""
        return -(-features // (self.size - 1))

    def bytes_of(self, shape: tuple[int, int]) -> int:
        """Return the bytes that weights ``[outputs, inputs]`` take in the file, scales included."""
        outputs, features = shape
        return outputs * self.count(features) * (self.size * self.bits // 8 + np.dtype(np.float32).itemsize)


@dataclass(frozen=True)
class Storage:
    """How the weights of a file are stored.

    Args:
        types: The element types allowed, narrowest first; the last one holds every width.
        opset: The file's operator set.
        blocks: Linear layers that are stored in blocks of ``MatMulNBits`` instead, by name.
    """

    types: tuple[ElementType, ...]
    opset: int
    blocks: Mapping[str, Blocks] = field(default_factory=dict)

    def of(self, weight_bits: int) -> ElementType:
        """Return the narrowest allowed type that holds ``weight_bits``."""
        return next(kind for kind in self.types if kind.bits >= weight_bits)


def choose_storage(weight_bits: Iterable[int], pack: Pack, opset: int | None) -> Storage:
    """Return the storage of a net whose layers have these widths.

    ``packed`` stores up to 2 bits in INT2 (opset 25), up to 4 in INT4 (opset 21) and more in INT8. ``auto`` is
    ``packed`` as far as the installed onnxruntime loads it. A given ``opset`` rules out newer types.

    Raises:
        ExportError: If ``pack`` is unknown, or ``opset`` is too old for the graph or unknown to the installed onnx.
    """
    _check(pack, opset, INT8.opset)
    packed = tuple(kind for kind in (INT2, INT4) if _allowed(kind, pack, opset))
    storage = Storage((*packed, INT8), opset or INT8.opset)
    used = {storage.of(bits) for bits in weight_bits}
    return Storage(storage.types, max(storage.opset, *(kind.opset for kind in used), INT8.opset))


def bytes_only(pack: str, opset: int | None, oldest: int) -> Storage:
    """Return the storage of graphs whose weights are int8, written with ``opset`` or the oldest possible one.

    Raises:
        ExportError: If ``pack`` is unknown, or ``opset`` is too old or unknown to the installed onnx.
    """
    _check(pack, opset, oldest)
    return Storage((INT8,), opset or oldest)


def floats_only(pack: str, opset: int | None, oldest: int) -> Storage:
    """Return the storage of graphs whose weights are float; otherwise as :func:`bytes_only`.

    Raises:
        ExportError: As there.
    """
    _check(pack, opset, oldest)
    return Storage((FLOAT32,), opset or oldest)


def _check(pack: str, opset: int | None, oldest: int) -> None:
    if pack not in PACKS:
        raise ExportError(f"pack must be one of {', '.join(PACKS)}, got {pack!r}")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not oldest <= opset <= newest:
        raise ExportError(f"opset must be {oldest} to {newest} (the installed onnx), got {opset}")


def _allowed(kind: ElementType, pack: Pack, opset: int | None) -> bool:
    fits = opset is None or kind.opset <= opset
    return fits and (pack == "packed" or (pack == "auto" and runtime_loads(kind)))


def ir_version(opset: int) -> int:
    """Return the lowest IR version that may carry the opset, so that old runtimes are not shut out by the header."""
    return int(helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))


@cache
def runtime_loads(kind: ElementType) -> bool:
    """Return whether the installed onnxruntime loads weights of this element type (False without onnxruntime)."""
    try:
        import onnxruntime
    except ImportError:
        return False
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(probe_model(kind), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's exceptions share no public base; any of them means "no"
        return False
    return True


def probe_model(kind: ElementType) -> bytes:
    """Return the smallest model with a packed weight: y = x * dequantize(cast(weight))."""
    graph = GraphBuilder(reserved=("x", "y"))
    packed = graph.packed_constant("weight", np.array([1, -1], np.int8), kind.code, kind.bits)
    codes = graph.add("Cast", [packed], "codes", name="cast", to=TensorProto.INT8)
    scale, zero = graph.constant("scale", np.float32(1)), graph.constant("zero", np.int8(0))
    weight = graph.add("DequantizeLinear", [codes, scale, zero], "weight.real", name="dequantize")
    graph.nodes.append(helper.make_node("Mul", ["x", weight], ["y"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    proto = helper.make_graph(graph.nodes, "probe", ends[:1], ends[1:], graph.initializers)
    opsets = [helper.make_opsetid("", kind.opset)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=ir_version(kind.opset))
    return bytes(model.SerializeToString())
