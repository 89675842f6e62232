"""Change how a written file stores its low-bit weights, so that an older runtime loads it; outputs do not change."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.checks import ExportError
from export.conversion.unblock import blocks_of, unblock
from export.flavors import without_custom_operators
from export.graph.builder import pack_codes
from export.storage.blocked import WIDTHS
from export.storage.metadata import as_a_file, properties_of, read_widths
from export.storage.needs import needs_text
from export.storage.packing import INT2, INT4, INT8, ElementType, Storage, ir_version
from export.storage.preprocessing import write_properties

KINDS = {kind.name: kind for kind in (INT2, INT4, INT8)}
BLOCKS = {blocks.name: blocks for blocks in WIDTHS}
PACKED = {INT2.code: INT2, INT4.code: INT4}
SUFFIX = ".weight.int8"  # of the tensor of codes, which `export_onnx` names after its layer
FLAVOR = "ort"  # the flavor whose operators mean the same in every opset from INT8's to INT2's


@dataclass(frozen=True)
class Fitted:
    """A file in the form that a device gets.

    Args:
        content: Its path, or its bytes if it was repacked.
        repacked: Element types that its weights are stored in now; empty if nothing changed.
    """

    content: Path | bytes
    repacked: tuple[str, ...] = ()


def fit_storage(path: Path, loads: Collection[str]) -> Fitted:
    """Return a file in a form that a runtime loads, repacked only if necessary.

    Args:
        path: Any ONNX file.
        loads: Names of the element types that the runtime loads.

    Raises:
        ExportError: If it must be repacked but ``export_onnx`` did not write it, the runtime does not load int8, or
            weights are in other files.
        ValueError: If it is not an ONNX file.
    """
    with as_a_file(path, "to fit it to a runtime"):
        return _fit(path, loads)


def _fit(path: Path, loads: Collection[str]) -> Fitted:
    model = _read(path)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ExportError(f"{path}: it keeps weights in other files; save it as one file")
    used = {PACKED[tensor.data_type].name for tensor in model.graph.initializer if tensor.data_type in PACKED}
    used |= {blocks.name for blocks in blocks_of(model).values()}
    if used <= set(loads):
        return Fitted(path)
    storage = [name for name in (*KINDS, *BLOCKS) if name in loads]
    if INT8.name not in storage:
        raise ExportError(f"{path}: the runtime is too old: it loads no weights in {', '.join(KINDS)}")
    content = repack(path, storage)
    after = onnx.load_from_string(content)
    kinds = {PACKED.get(tensor.data_type, INT8).name for tensor in after.graph.initializer}
    kinds |= {blocks.name for blocks in blocks_of(after).values()}
    return Fitted(content, tuple(name for name in (*KINDS, *BLOCKS) if name in kinds))


def repack(model: bytes | str | PathLike[str], storage: str | Iterable[str]) -> bytes:
    """Return a file of ``export_onnx`` with its weights stored in other types, and the matching opset.

    Every layer gets the narrowest allowed type that holds its width. ``INT2 or INT4 initializer -> Cast`` and a plain
    INT8 initializer hold the same codes, so every output stays the same, bit for bit. Linear layers in blocks of
    ``MatMulNBits`` stay unchanged if such blocks are allowed, and become Gemm otherwise.

    Args:
        model: The file, or its content.
        storage: Allowed element types: ``int2``, ``int4``, ``int8`` (always allowed), and names of blocks.

    Returns:
        The new file's content. Without layers in blocks it is what ``export_onnx`` writes with that storage, to the
        byte; a layer that leaves its blocks no longer shares the nodes that read its input.

    Raises:
        ExportError: If ``storage`` names another type, or the file was not written by ``export_onnx`` (flavor ort).
        ValueError: If it is not an ONNX file.
        OSError: If the file cannot be read.
    """
    names = {storage} if isinstance(storage, str) else set(storage)
    unknown = sorted(names - {*KINDS, *BLOCKS})
    if unknown:
        raise ExportError(f"storage must be among {', '.join((*KINDS, *BLOCKS))}, got {', '.join(unknown)}")
    proto = _read(model)
    bits = _weight_bits(proto)
    unblock(proto, [layer for layer, blocks in blocks_of(proto).items() if blocks.name not in names])
    bits = {layer: width for layer, width in bits.items() if layer not in blocks_of(proto)}
    allowed = tuple(kind for kind in KINDS.values() if kind.name in names | {INT8.name})
    chosen = {layer: Storage(allowed, 0).of(width) for layer, width in bits.items()}
    _Repacking(proto, chosen).run()
    opset = max([INT8.opset, *(kind.opset for kind in chosen.values())])
    next(entry for entry in proto.opset_import if not entry.domain).version = opset
    proto.ir_version = ir_version(opset)
    write_properties(proto, {"opset": str(opset), "needs": json.dumps(needs_text(proto))})
    try:
        onnx.checker.check_model(without_custom_operators(proto), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is invalid after repacking to {', '.join(sorted(names))} ({error})") from error
    return bytes(proto.SerializeToString())


class _Repacking:
    """Rewrites initializers and nodes of a model in place; everything else keeps its order."""

    def __init__(self, proto: onnx.ModelProto, chosen: dict[str, ElementType]) -> None:
        self.graph, self.chosen = proto.graph, chosen
        self.stored = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.casts: dict[str, NodeProto] = {
            node.output[0]: node
            for node in proto.graph.node
            if node.op_type == "Cast" and node.input[0] in self.stored
            and self.stored[node.input[0]].data_type in PACKED
        }  # fmt: skip

    def run(self) -> None:
        """Store each layer's codes as chosen."""
        tensors, dropped, new = {}, set(), {}
        for layer, kind in self.chosen.items():
            codes = f"{layer}{SUFFIX}"
            source = self.casts[codes].input[0] if codes in self.casts else codes
            if source not in self.stored:
                raise ExportError(f"{layer}: the file has no weights named {codes}; export it again")
            tensors[source], node = _stored(layer, self.stored[source], kind)
            dropped.add(codes)
            new[codes] = node
        kept = [tensors.get(tensor.name, tensor) for tensor in self.graph.initializer]
        nodes: list[NodeProto] = []
        for node in self.graph.node:
            if node.op_type == "Cast" and node.output[0] in dropped:
                continue
            for name in node.input:
                cast = new.pop(name, None)
                if cast is not None:
                    nodes.append(cast)
            nodes.append(node)
        del self.graph.initializer[:], self.graph.node[:]
        self.graph.initializer.extend(kept)
        self.graph.node.extend(nodes)


def _stored(layer: str, tensor: TensorProto, kind: ElementType) -> tuple[TensorProto, NodeProto | None]:
    """Return a layer's codes in a type, and the Cast that converts them to int8, if one is needed."""
    codes = np.asarray(numpy_helper.to_array(tensor)).astype(np.int8)
    name = f"{layer}{SUFFIX}"
    if kind == INT8:
        return numpy_helper.from_array(codes, name), None
    packed = f"{layer}.weight.{kind.name}"
    content = pack_codes(codes, kind.bits)
    cast = helper.make_node("Cast", [packed], [name], name=f"{layer}.weight.cast", to=TensorProto.INT8)
    return helper.make_tensor(packed, kind.code, codes.shape, content, raw=True), cast


def _read(model: bytes | str | PathLike[str]) -> onnx.ModelProto:
    content = model if isinstance(model, bytes) else Path(model).read_bytes()
    try:
        return onnx.load_from_string(content)
    except Exception as error:  # protobuf's error; its package is not ours to import
        where = "the content" if isinstance(model, bytes) else str(model)
        raise ValueError(
            f"{where}: ONNX Runtime cannot load it: it is not an ONNX file ({error}); export it again"
        ) from error


def _weight_bits(proto: onnx.ModelProto) -> dict[str, int]:
    properties = properties_of(proto)
    if properties.get("flavor") != FLAVOR or "weight_bits" not in properties:
        raise ExportError(
            f"only files that export_onnx wrote (flavor {FLAVOR}) can be repacked; this one "
            f"{'is of flavor ' + properties['flavor'] if 'flavor' in properties else 'does not say who wrote it'}"
        )
    return read_widths(proto, "weight_bits")
