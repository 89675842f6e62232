"""The integer view of a student: a flat, typed list of what its deployed arithmetic computes.

Every consumer of the student (export, parity, cost, report, tests) reads weights, scales and zero points from here
and only from here. A value of the network is a named edge. An edge is either on a :class:`Grid` (its real
value is ``scale * code``, ``code`` an integer) or real-valued (``grid is None``).

``integer_view(student)`` (in ``quantizers.view``) builds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# x86 processors without VNNI add two products of a stored activation (0..255) and a weight in 16 bits, and saturate
# there (vpmaddubsw). For that reason, a student's 8-bit weights stay within [-64, 63] if its activations have 8 bits.
PAIR_SUM_LIMIT = 2**15 - 1


def largest_safe_weight(largest_code: int) -> int:
    """Return the largest weight for which no pair of products can saturate.

    Args:
        largest_code: Largest code of the activations as stored.
    """
    return PAIR_SUM_LIMIT // (2 * largest_code)


def multiply_accumulates(output_shape: Sequence[int], summed_shape: Sequence[int]) -> int:
    """Return the multiply-accumulates of a layer, including padding but not biases.

    Args:
        output_shape: Shape of its output; every image of a batch counts.
        summed_shape: Shape of what one output value sums: a kernel over the channels of its group, a row of features.
    """
    return math.prod(output_shape) * math.prod(summed_shape)


@dataclass(frozen=True)
class Grid:
    """The integers an edge can hold, and their real scale.

    Args:
        scale: Real value of one step, positive, a float32.
        low: Smallest code (0 for unsigned grids, negative for signed or shifted ones).
        high: Largest code. ``high - low + 1`` is ``2 ** bits``.
    """

    scale: float
    low: int
    high: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.high - self.low).bit_length()

    @property
    def is_shifted(self) -> bool:
        """Whether its range needs a zero point: neither an unsigned nor a signed type has it."""
        return self.low not in (0, -(2 ** (self.bits - 1)))

    @property
    def zero_point(self) -> int:
        """Zero point of the unsigned 8-bit storage of this grid: ``stored = code + zero_point``."""
        return -self.low


@dataclass(frozen=True)
class Node:
    """One operation: ``output`` computed from ``inputs`` (edge names); ``name`` is the module path or fx node name."""

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Quantize(Node):
    """``code = clip(round_half_even(x / scale), low, high)``; the input is real-valued or on another grid.

    The grid is that of the output edge. A preceding ReLU/ReLU6 is absorbed by the grid's range.
    """

    grid: Grid


@dataclass(frozen=True)
class Conv(Node):
    """A 2-d convolution of an edge on a grid; the output is real-valued (``acc * weight_scale * input scale``).

    ``weights`` are codes, int8, shape ``[out_channels, in_channels / groups, height, width]``;
    ``weight_scale`` float32 ``[out_channels]`` (batch norm folded in), or ``[1]`` if per tensor;
    ``bias`` int32 ``[out_channels]`` in units of ``weight_scale * input scale``, or None.
    """

    weights: npt.NDArray[np.int8]
    weight_bits: int
    weight_scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.int32] | None
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, left, bottom, right
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Linear(Node):
    """A fully connected layer of an edge on a grid; like Conv, but ``weights`` are ``[out_features, in_features]``."""

    weights: npt.NDArray[np.int8]
    weight_bits: int
    weight_scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.int32] | None


@dataclass(frozen=True)
class Add(Node):
    """Sum of two edges (both on grids of the same scale, or real-valued); the output is real-valued."""


@dataclass(frozen=True)
class Mul(Node):
    """Product of two broadcastable edges; the output is real-valued."""


@dataclass(frozen=True)
class Concat(Node):
    """Concatenation along ``axis`` of edges on the same grid; the output is on it, too."""

    axis: int


@dataclass(frozen=True)
class MaxPool(Node):
    """Maximum over windows; keeps the grid. ``ceil_mode`` is PyTorch's: no window starts in the end padding."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


@dataclass(frozen=True)
class AveragePool(Node):
    """Mean over windows of an edge on a grid; the output is real-valued. ``ceil_mode`` as in :class:`MaxPool`.

    A window that includes padding includes none beyond ``padding``.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    ceil_mode: bool
    count_include_pad: bool


@dataclass(frozen=True)
class GlobalAveragePool(Node):
    """Mean over height and width; the output is real-valued, ``[batch, channels, 1, 1]`` (or 2-d without keepdims)."""

    keepdims: bool


@dataclass(frozen=True)
class Shape(Node):
    """An operation that only moves values and keeps the grid.

    ``op`` is one of ``flatten`` (attributes: axis), ``reshape`` (shape, with 0 = copy, -1 = infer, batch first),
    ``transpose`` (perm), ``slice`` (axis, start, end, step), ``gather`` (axis, indices), ``pad`` (before, after: zeros
    for each axis, batch first), ``expand`` (shape, batch first and 1), ``identity``.
    """

    op: str
    attributes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Function(Node):
    """A real function that stays in floating point: elementwise, or ``softmax`` / ``log_softmax`` (axis) at the end.

    ``op`` is one of the names in ``quantizers.functions``; ``attributes`` hold its parameters under PyTorch's names.
    """

    op: str
    attributes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class IntegerView:
    """A student as integers: ``nodes`` in the order of computation.

    Args:
        nodes: Every operation; edges are named by their producers.
        grids: Edge name -> its grid; real-valued edges have none.
        inputs: Names of the graph inputs (real-valued), in the order of ``forward``.
        outputs: Names of the edges that the model returns, in order.
        output_names: Their names if the model returns a dictionary, else empty.
    """

    nodes: tuple[Node, ...]
    grids: Mapping[str, Grid]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_names: tuple[str, ...] = ()
