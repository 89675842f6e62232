"""Rearrange an integer view, without changing a single code, so that a runtime finds integer kernels.

ONNX Runtime makes an integer kernel of ``DequantizeLinear -> operator -> QuantizeLinear`` only where the operator's
output goes to that one ``QuantizeLinear`` with nothing in between. Four rewrites bring a view into that form:

1. ``spell_out``: a global mean that drops its last two axes becomes one that keeps them and a flatten; a mean over
   windows counts padding only if it has some.
2. ``merge_quantizers``: two quantizers of one edge onto one grid become one.
3. ``sink_moves``: what only moves values (flatten, slice, maximum over windows) changes places with a quantizer after
   it. Rounding and clipping are monotone and elementwise, so they commute.
4. ``split_fan_out``: a sum, product or mean that goes to several grids is computed once per grid. A convolution is not
   (it is the costly part); the census reports it.
"""

from __future__ import annotations

from dataclasses import replace

from quantizers.integer import (
    Add,
    AveragePool,
    GlobalAveragePool,
    Grid,
    IntegerView,
    MaxPool,
    Mul,
    Node,
    Quantize,
    Shape,
)

CHEAP = (Add, Mul, AveragePool, GlobalAveragePool)


def arrange(view: IntegerView) -> IntegerView:
    """Return the view with all rewrites applied; edges of the model that were on a grid keep name, grid and codes."""
    return split_fan_out(sink_moves(merge_quantizers(spell_out(view))))


def consumers(view: IntegerView) -> dict[str, list[Node]]:
    """Return the nodes that read each edge, in order."""
    readers: dict[str, list[Node]] = {}
    for node in view.nodes:
        for edge in node.inputs:
            readers.setdefault(edge, []).append(node)
    return readers


def spell_out(view: IntegerView) -> IntegerView:
    """Give means the form that a runtime has an exact kernel for; windows are already explicit (``windows.py``)."""
    nodes: list[Node] = []
    for node in view.nodes:
        if isinstance(node, GlobalAveragePool) and not node.keepdims:
            nodes += _global_mean(node)
        elif isinstance(node, AveragePool):
            nodes.append(replace(node, count_include_pad=node.count_include_pad and any(node.padding)))
        else:
            nodes.append(node)
    return replace(view, nodes=tuple(nodes))


def _global_mean(node: GlobalAveragePool) -> list[Node]:
    """Keep the axes, then flatten: the flatten can change places with a quantizer after it."""
    kept = f"{node.output}.kept"
    flatten = Shape(f"{node.name}.flatten", (kept,), node.output, op="flatten", attributes={"axis": 1})
    return [replace(node, output=kept, keepdims=True), flatten]


def merge_quantizers(view: IntegerView) -> IntegerView:
    """Replace a quantizer by an identity where an earlier one puts the same edge on the same grid."""
    first: dict[tuple[str, Grid], str] = {}
    nodes: list[Node] = []
    for node in view.nodes:
        merged = node
        if isinstance(node, Quantize):
            source = first.setdefault((node.inputs[0], node.grid), node.output)
            if source != node.output:
                merged = Shape(node.name, (source,), node.output, op="identity")
        nodes.append(merged)
    return replace(view, nodes=tuple(nodes))


def sink_moves(view: IntegerView) -> IntegerView:
    """Swap every real-valued move with the quantizer that is its only reader."""
    while (position := _movable(view)) is not None:
        view = _swap(view, position)
    return view


def _movable(view: IntegerView) -> int | None:
    """Return the position of a quantizer whose input is made by a real-valued move for it alone."""
    makers = {node.output: node for node in view.nodes}
    readers = consumers(view)
    for position, node in enumerate(view.nodes):
        if not isinstance(node, Quantize):
            continue
        edge = node.inputs[0]
        private = len(readers[edge]) == 1 and edge not in view.outputs and edge not in view.grids
        if private and isinstance(makers.get(edge), (Shape, MaxPool)):
            return position
    return None


def _swap(view: IntegerView, position: int) -> IntegerView:
    quantize = view.nodes[position]
    if not isinstance(quantize, Quantize):
        raise TypeError(f"expected a Quantize at position {position}, got {type(quantize).__name__}")
    move = next(node for node in view.nodes if node.output == quantize.inputs[0])
    before = f"{quantize.output}.before.{move.name}"
    swapped = (
        replace(quantize, inputs=move.inputs, output=before),
        replace(move, inputs=(before,), output=quantize.output),
    )
    nodes = [node for node in view.nodes if node is not move]
    where = nodes.index(quantize)
    nodes[where : where + 1] = swapped
    return replace(view, nodes=tuple(nodes), grids={**view.grids, before: quantize.grid})


def split_fan_out(view: IntegerView) -> IntegerView:
    """Compute a cheap real-valued node once for every quantizer that reads it, if only quantizers do."""
    readers = consumers(view)
    nodes: list[Node] = []
    renamed: dict[int, str] = {}
    for node in view.nodes:
        reading = readers.get(node.output, [])
        splits = isinstance(node, CHEAP) and node.output not in view.outputs and len(reading) > 1
        if splits and all(isinstance(reader, Quantize) for reader in reading):
            for number, reader in enumerate(reading[1:], start=2):
                renamed[id(reader)] = f"{node.output}.copy{number}"
                nodes.append(replace(node, output=renamed[id(reader)]))
        nodes.append(replace(node, inputs=(renamed[id(node)],)) if id(node) in renamed else node)
    return replace(view, nodes=tuple(nodes))
