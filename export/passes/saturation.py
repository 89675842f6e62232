"""Choose the eight-bit storage of narrow grids so that saturation does the clipping.

An integer kernel saturates at 0 and 255. A grid of four bits stored in 0 ... 15 needs a ``Clip`` after it; stored in
240 ... 255 it needs none at its upper end. Where the values that reach a quantizer cannot leave the grid at its lower
end (a change of grid from one that starts at zero, a mean of such values), that is the whole clip.

The view expresses this as a wider grid of the same scale; the added codes never occur.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from export.passes.rewrite import consumers
from quantizers.integer import (
    Add,
    AveragePool,
    Concat,
    Conv,
    GlobalAveragePool,
    Grid,
    IntegerView,
    Linear,
    MaxPool,
    Node,
    Quantize,
    Shape,
    largest_safe_weight,
)

CODES = 256  # of the storage
SAFE_WEIGHT = largest_safe_weight(CODES - 1)
NEAR = 1e-3  # of a step: this close to a tie, rounding is not relied upon
KEEPS_GRID = (Concat, MaxPool, Shape)


@dataclass(frozen=True)
class WideGrid(Grid):
    """A grid that is stored in eight bits, its unused codes included.

    Args:
        used_low: Smallest code that occurs.
        used_high: Largest code that occurs.
    """

    used_low: int
    used_high: int

    @property
    def bits(self) -> int:
        """Width of the codes that occur."""
        return (self.used_high - self.used_low).bit_length()


def saturate(view: IntegerView) -> IntegerView:
    """Return the view with grids widened to eight bits wherever the added codes cannot occur."""
    ranges = _real_ranges(view)
    makers = {node.output: node for node in view.nodes}
    readers = consumers(view)
    grids = dict(view.grids)
    for edges in _groups(view):
        quantizers = [makers[edge] for edge in edges if isinstance(makers.get(edge), Quantize)]
        wide = _widened([node for node in quantizers if isinstance(node, Quantize)], view, ranges)
        if wide is not None and all(_is_safe(reader) for edge in edges for reader in readers.get(edge, ())):
            grids.update(dict.fromkeys(edges, wide))
    nodes = tuple(replace(node, grid=grids[node.output]) if isinstance(node, Quantize) else node for node in view.nodes)
    return replace(view, nodes=nodes, grids=grids)


def _groups(view: IntegerView) -> list[list[str]]:
    """Return the edges on grids, grouped by what must be stored alike."""
    parent = {edge: edge for edge in view.grids}

    def root(edge: str) -> str:
        while parent[edge] != edge:
            edge = parent[edge]
        return edge

    for node in view.nodes:
        if isinstance(node, KEEPS_GRID) and node.output in parent:
            for edge in node.inputs:
                parent[root(edge)] = root(node.output)
    groups: dict[str, list[str]] = {}
    for edge in parent:
        groups.setdefault(root(edge), []).append(edge)
    return list(groups.values())


def _widened(quantizers: list[Quantize], view: IntegerView, ranges: dict[str, tuple[float, float]]) -> WideGrid | None:
    """Return the wider grid of a group, or None if it must not change."""
    if not quantizers or any(_is_plain_clip(node, view) for node in quantizers):
        return None
    grid = quantizers[0].grid
    is_narrow = grid.high - grid.low < CODES - 1 and grid.low <= 0 <= grid.high
    if not is_narrow or any(node.grid != grid for node in quantizers):
        return None
    lows, highs = zip(*(ranges[node.inputs[0]] for node in quantizers), strict=True)
    if min(lows) / grid.scale > grid.low - 0.5 + NEAR:
        return WideGrid(grid.scale, grid.high - CODES + 1, grid.high, grid.low, grid.high)
    if max(highs) / grid.scale < grid.high + 0.5 - NEAR:
        return WideGrid(grid.scale, grid.low, grid.low + CODES - 1, grid.low, grid.high)
    return None


def _is_plain_clip(node: Quantize, view: IntegerView) -> bool:
    """Return whether the quantizer only cuts the top off a grid, for which a Clip is all that is needed."""
    old = view.grids.get(node.inputs[0])
    return old is not None and (old.scale, old.low) == (node.grid.scale, node.grid.low)


def _is_safe(reader: Node) -> bool:
    return not isinstance(reader, (Conv, Linear)) or int(abs(reader.weights.astype(int)).max(initial=0)) <= SAFE_WEIGHT


def _real_ranges(view: IntegerView) -> dict[str, tuple[float, float]]:
    """Return the interval that each edge's real values are in, infinite if nothing is known."""
    ranges: dict[str, tuple[float, float]] = dict.fromkeys(view.inputs, (-math.inf, math.inf))
    for node in view.nodes:
        grid = view.grids.get(node.output)
        if grid is not None:
            ranges[node.output] = (grid.low * grid.scale, grid.high * grid.scale)
        else:
            ranges[node.output] = _range_of(node, [ranges[edge] for edge in node.inputs])
    return ranges


def _range_of(node: Node, inputs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    lows, highs = zip(*inputs, strict=True)
    if isinstance(node, Add):
        return sum(lows), sum(highs)
    if isinstance(node, AveragePool) or (isinstance(node, Shape) and node.op == "pad"):  # padding is zero
        return min(*lows, 0.0), max(*highs, 0.0)
    if isinstance(node, (GlobalAveragePool, *KEEPS_GRID)):
        return min(lows), max(highs)
    return -math.inf, math.inf
