"""A written graph's nodes and constants by name, while a target's rewrites change it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

Array = npt.NDArray[np.generic]


class Graph:
    """A model's nodes and constants by name, while it is rewritten.

    Args:
        model: Changed in place by :meth:`finish`.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants: dict[str, Array] = {}
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}

    def value(self, name: str) -> Array:
        """Return a constant's values."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.to_array(self.tensors[name])
        return self.constants[name]

    def readers(self, name: str) -> list[NodeProto]:
        """Return the nodes that read a tensor."""
        return [node for node in self.nodes if name in node.input]

    def constant(self, name: str, values: npt.ArrayLike) -> str:
        """Add a constant; return its name."""
        self.tensors[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def finish(self, nodes: Sequence[NodeProto]) -> None:
        """Put the nodes into the model, except those that nothing reads anymore, and their constants."""
        nodes = list(nodes)
        while True:
            read = {name for node in nodes for name in node.input} | {entry.name for entry in self.model.graph.output}
            kept = [node for node in nodes if read & set(node.output)]
            if len(kept) == len(nodes):
                break
            nodes = kept
        del self.model.graph.node[:], self.model.graph.initializer[:]
        self.model.graph.node.extend(nodes)
        self.model.graph.initializer.extend(tensor for name, tensor in self.tensors.items() if name in read)
