"""Say what a file needs: which onnxruntime, and what its output is.

Determined by loading small files with each of 1.17.3, 1.18.1, 1.20.1, 1.21.1, 1.22.1, 1.23.2 and 1.24.1.
"""

from __future__ import annotations

import json
from importlib import metadata

import onnx

from export.storage.blocked import DOMAIN, OPERATOR, WIDTHS
from export.storage.packing import INT2, INT4, INT8
from export.versions import OLDEST, Version, version_text

# element type -> the first onnxruntime that casts it to int8 (1.18 to 1.22 load INT4, and have no such kernel)
TYPES: dict[int, Version] = {INT2.code: (1, 24), INT4.code: (1, 23)}
BLOCKS: dict[int, Version] = {2: (1, 24), 4: (1, 17)}
# operator set -> the first onnxruntime that loads files of it
OPSETS: dict[int, Version] = {
    13: (1, 7), 14: (1, 8), 15: (1, 9), 16: (1, 11), 17: (1, 12), 18: (1, 14), 19: (1, 15), 20: (1, 17), 21: (1, 18),
    22: (1, 21), 23: (1, 23), 24: (1, 24), 25: (1, 24),
}  # fmt: skip
RUNTIME = "onnxruntime"


def needed_runtime(model: onnx.ModelProto) -> Version | None:
    """Return the oldest onnxruntime that runs a file; None if the file is not for ONNX Runtime.

    Args:
        model: One that this toolkit, PyTorch's exporter or onnxruntime's tools wrote.
    """
    domains = {entry.domain: entry.version for entry in model.opset_import}
    if set(domains) - {"", "ai.onnx", DOMAIN, "ai.onnx.ml"}:
        return None
    opset = domains.get("", 0)
    found = [OPSETS.get(opset, OLDEST if opset < min(OPSETS) else max(OPSETS.values()))]
    found += [TYPES[tensor.data_type] for tensor in model.graph.initializer if tensor.data_type in TYPES]
    for node in model.graph.node:
        if node.op_type == OPERATOR and node.domain == DOMAIN:
            bits = next((int(entry.i) for entry in node.attribute if entry.name == "bits"), WIDTHS[-1].bits)
            found.append(BLOCKS.get(bits, BLOCKS[WIDTHS[-1].bits]))
    return max(*found, OLDEST)


def needs_text(model: onnx.ModelProto) -> str:
    """Return what a file needs, in words: ``onnxruntime >= 1.24``."""
    version = needed_runtime(model)
    return "a runtime with its own operators (qonnx)" if version is None else f"{RUNTIME} >= {version_text(version)}"


def makers(model: onnx.ModelProto) -> dict[str, str]:
    """Return the entries of a file's metadata that say what it needs, what it gives, and what it was made with."""
    names = ("qkd-toolkit", "onnx", "torch", "brevitas", RUNTIME)
    versions = {name: version for name in names if (version := _installed(name))}
    entries = {"needs": needs_text(model), "output": output_kind(model), "versions": versions}
    return {key: json.dumps(value) for key, value in entries.items()}


def output_kind(model: onnx.ModelProto) -> str:
    """Return what the first output holds: ``logits``, ``probabilities`` or ``log_probabilities``."""
    makers_of = {name: node for node in model.graph.node for name in node.output}
    name = model.graph.output[0].name if model.graph.output else ""
    while (node := makers_of.get(name)) is not None and node.op_type in ("Identity", "Flatten", "Squeeze", "Reshape"):
        name = node.input[0]
    return {"Softmax": "probabilities", "LogSoftmax": "log_probabilities"}.get(node.op_type if node else "", "logits")


def storage_for(version: Version) -> tuple[str, ...]:
    """Return the names of the ways to store weights that an onnxruntime of a version loads.

    Blocks of ``MatMulNBits`` are among them only if the packed type of their width is: before that, kernels were slow.
    """
    packed = [kind.name for kind in (INT2, INT4) if version >= TYPES[kind.code]]
    blocks = [blocks.name for blocks in WIDTHS if version >= max(BLOCKS[blocks.bits], TYPES[_type_of(blocks.bits)])]
    return (*packed, INT8.name, *blocks)


def _type_of(bits: int) -> int:
    return INT2.code if bits <= INT2.bits else INT4.code


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
