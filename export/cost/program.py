"""A network as its cost is counted: operations in order, and how many values of how many bits each of them makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from export.graph.shapes import edge_shapes
from export.passes.rewrite import arrange
from export.passes.windows import explicit_windows
from quantizers.integer import Conv, IntegerView, Linear, Node, Quantize, Shape, multiply_accumulates

FLOAT_BITS = 32
# Operations that need no extra memory; a slice, a transpose or a pad does.
ALIASES = frozenset({"flatten", "identity", "reshape"})

Role = Literal["compute", "alias", "quantize"]


@dataclass(frozen=True)
class Value:
    """What an operation makes for one image: how many values, and the bits of each (32: real)."""

    count: int
    bits: int


@dataclass(frozen=True)
class LayerFacts:
    """What a convolution or linear layer holds and does for one image.

    Args:
        kind: ``conv`` or ``linear``.
        weights, weight_bits: How many weights, and their width.
        biases: How many biases.
        weight_scales: How many scales its weights have.
        input_bits: Width of its input.
        macs: Multiply-accumulates; padding counts as if it were multiplied, biases do not count.
        output_shape: Without the batch.
    """

    kind: str
    weights: int
    weight_bits: int
    biases: int
    weight_scales: int
    input_bits: int
    macs: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One step of a network.

    Args:
        name: Shown to users.
        role: ``compute`` makes a new value. ``alias`` gives its first input another name or shape. ``quantize`` puts
            its first input on a grid, at once where an operation has just made it for this reader alone.
        inputs: Names of the values it reads.
        output: Name of the value it makes.
        layer: What it holds, if it is a layer.
    """

    name: str
    role: Role
    inputs: tuple[str, ...]
    output: str
    layer: LayerFacts | None = None


@dataclass(frozen=True)
class Program:
    """A whole network.

    Args:
        operations: In the order of computation.
        values: Name -> value, of inputs and of everything that operations make.
        inputs, outputs: Names of the network's own.
    """

    operations: tuple[Operation, ...]
    values: Mapping[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Peak:
    """Where activations take most memory: bytes of all that are needed at once, and the operation that runs then."""

    size_bytes: int
    operation: str


def program_of_view(view: IntegerView, input_shapes: Sequence[tuple[int, ...]]) -> Program:
    """Return the program of a view, arranged as the file for ONNX Runtime is.

    Args:
        view: What the student computes.
        input_shapes: A shape for each input, batch first; the cost is that of one image whatever the batch.

    Raises:
        ValueError: If the shapes do not fit the view.
    """
    arranged = arrange(explicit_windows(view, input_shapes))
    shapes = edge_shapes(arranged, [(1, *shape[1:]) for shape in input_shapes])
    bits = {edge: arranged.grids[edge].bits if edge in arranged.grids else FLOAT_BITS for edge in shapes}
    values = {edge: Value(prod(shape), bits[edge]) for edge, shape in shapes.items()}
    operations = tuple(
        Operation(node.name, _role(node), node.inputs, node.output, _facts(node, shapes[node.output], arranged))
        for node in arranged.nodes
    )
    return Program(operations, values, arranged.inputs, arranged.outputs)


def _role(node: Node) -> Role:
    if isinstance(node, Quantize):
        return "quantize"
    return "alias" if isinstance(node, Shape) and node.op in ALIASES else "compute"


def _facts(node: Node, shape: tuple[int, ...], view: IntegerView) -> LayerFacts | None:
    if not isinstance(node, (Conv, Linear)):
        return None
    return LayerFacts(
        kind=type(node).__name__.lower(),
        weights=int(node.weights.size),
        weight_bits=node.weight_bits,
        biases=0 if node.bias is None else int(node.bias.size),
        weight_scales=int(node.weight_scale.size),
        input_bits=view.grids[node.inputs[0]].bits,
        macs=multiply_accumulates(shape, node.weights.shape[1:]),
        output_shape=shape[1:],
    )


def stored_bytes(value: Value) -> int:
    """Return what a value takes if codes are stored as bytes and real values in float32."""
    return value.count * (4 if value.bits == FLOAT_BITS else 1)


def packed_bytes(value: Value) -> int:
    """Return what a value takes at its bits."""
    return -(-value.count * value.bits // 8)


def float_bytes(value: Value) -> int:
    """Return what a value takes in float32."""
    return 4 * value.count


def activation_peak(
    program: Program, bytes_of: Callable[[Value], int], *, is_float: bool = False, packs_inputs: bool = False
) -> Peak:
    """Return the largest memory that activations of one image need at once, operations run in order.

    A value lives from the operation that makes it to the last that reads it, the model's outputs to the end. While an
    operation runs, its inputs and its output are in memory. What is quantized at once by its only reader never exists
    in float: the kernel writes codes.

    Args:
        program: The network.
        bytes_of: What a value takes.
        is_float: The float twin: quantizers do nothing.
        packs_inputs: Whether the model's inputs may be taken as codes, too (else they are float32, as files want them).
    """
    buffers = _Buffers(program, is_float=is_float, packs_inputs=packs_inputs)
    steps = range(len(program.operations))
    live = [sum(bytes_of(buffer.value) for buffer in buffers.all if buffer.born <= i <= buffer.last) for i in steps]
    worst = max(steps, key=live.__getitem__, default=None)
    return Peak(0, "") if worst is None else Peak(live[worst], program.operations[worst].name)


@dataclass
class _Buffer:
    value: Value
    born: int
    last: int


class _Buffers:
    """The memory of each value; values that are one in memory share a buffer."""

    def __init__(self, program: Program, *, is_float: bool, packs_inputs: bool) -> None:
        self.all: list[_Buffer] = []
        self._of: dict[str, _Buffer] = {}
        self._readers: dict[str, int] = {}
        self._in_place = set(program.inputs) if packs_inputs else set()
        for operation in program.operations:
            for name in set(operation.inputs):
                self._readers[name] = self._readers.get(name, 0) + 1
        for name in program.inputs:
            self._new(name, program.values[name], 0)
        for step, operation in enumerate(program.operations):
            for name in operation.inputs:
                self._of[name].last = step
            self._run(operation, step, program, is_float=is_float)
        for name in program.outputs:
            self._of[name].last = len(program.operations)

    def _run(self, operation: Operation, step: int, program: Program, *, is_float: bool) -> None:
        source = operation.inputs[0] if operation.inputs else ""
        value = program.values[operation.output]
        quantizes = operation.role == "quantize"
        if operation.role == "alias" or (quantizes and is_float):
            self._of[operation.output] = self._of[source]
        elif quantizes and self._readers[source] == 1 and source in self._in_place and source not in program.outputs:
            self._of[operation.output] = self._of[source]
            self._of[source].value = value
        else:
            self._new(operation.output, value, step)
            if value.bits == FLOAT_BITS:
                self._in_place.add(operation.output)

    def _new(self, name: str, value: Value, step: int) -> None:
        self._of[name] = _Buffer(value, step, step)
        self.all.append(self._of[name])
