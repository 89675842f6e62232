"""Collect the nodes and constants of an ONNX graph, every name unique."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper


class GraphBuilder:
    """A growing ONNX graph.

    Constants become initializers and never inputs: an initializer that is also an input may be overridden at run
    time, so ONNX Runtime would not fold anything that depends on it.
    """

    def __init__(self, reserved: Sequence[str] = ()) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._tensor_names = set(reserved)
        self._node_names: set[str] = set()
        self._shared: dict[tuple[str, str, tuple[int, ...], bytes], str] = {}

    def tensor_name(self, wanted: str) -> str:
        """Return ``wanted``, or the first of ``wanted#2``, ``wanted#3``, ... that no tensor has yet."""
        return _claim(wanted, self._tensor_names)

    def constant(self, wanted: str, values: npt.ArrayLike) -> str:
        """Add an initializer of the dtype and shape of ``values``; return its name.

        The same name and content give the same initializer again.
        """
        array = np.asarray(values, order="C")
        key = (wanted, array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.tensor_name(wanted)
            self.initializers.append(numpy_helper.from_array(array, self._shared[key]))
        return self._shared[key]

    def packed_constant(self, wanted: str, values: npt.NDArray[np.int8], element_type: int, bits: int) -> str:
        """Add an initializer of a sub-byte type (INT4: two values per byte, INT2: four); return its name."""
        name = self.tensor_name(wanted)
        # as raw bytes: the list that make_tensor fills otherwise takes up to two bytes for each packed one
        content = pack_codes(values, bits)
        self.initializers.append(helper.make_tensor(name, element_type, values.shape, content, raw=True))
        return name

    def add(self, operator: str, inputs: Sequence[str], output: str, *, name: str, **attributes: Any) -> str:
        """Append a node with one output; return that tensor's name (``output`` itself if no tensor had it yet)."""
        tensor = self.tensor_name(output)
        node_name = _claim(name, self._node_names)
        self.nodes.append(helper.make_node(operator, list(inputs), [tensor], name=node_name, **attributes))
        return tensor

    def rename_output(self, tensor: str, new: str) -> None:
        """Give the tensor another name wherever it occurs. ``new`` must have been reserved."""
        for node in self.nodes:
            node.input[:] = [new if name == tensor else name for name in node.input]
            node.output[:] = [new if name == tensor else name for name in node.output]


def pack_codes(values: npt.NDArray[np.int8], bits: int) -> bytes:
    """Return integers of ``bits`` bits (2 or 4, two's complement) as ONNX packs them: first in the lowest bits."""
    per_byte = 8 // bits
    flat = values.astype(np.int8).reshape(-1).view(np.uint8) & np.uint8(2**bits - 1)
    padded = np.pad(flat, (0, -flat.size % per_byte))
    packed = padded[::per_byte].copy()
    for place in range(1, per_byte):
        packed |= padded[place::per_byte] << np.uint8(place * bits)
    return bytes(packed.tobytes())


def _claim(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}#{number}"
    taken.add(name)
    return name
