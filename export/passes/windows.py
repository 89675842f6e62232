"""Give every pooling windows that all runtimes cut alike: none extends beyond the padded image.

PyTorch's ``ceil_mode`` lets the last window hang over the border, drops it if it would start in the padding after it,
and counts no overhang as padding. ONNX leaves each of these to the runtime. Sizes but for the batch are fixed, so the
overhang is known: it becomes padding that no mean counts, and the file has no ``ceil_mode``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from export.graph.shapes import edge_shapes
from quantizers.integer import AveragePool, Grid, IntegerView, MaxPool, Node, Shape

Border = tuple[int, int, int, int]  # top, left, bottom, right


def explicit_windows(view: IntegerView, input_shapes: Sequence[tuple[int, ...]]) -> IntegerView:
    """Return the view with poolings that cover whole windows; each computes the same as before.

    Raises:
        ValueError: If the shapes do not fit the view.
    """
    if not any(isinstance(node, (MaxPool, AveragePool)) and node.ceil_mode for node in view.nodes):
        return view
    shapes = edge_shapes(view, input_shapes)
    nodes: list[Node] = []
    grids = dict(view.grids)
    for node in view.nodes:
        if isinstance(node, (MaxPool, AveragePool)) and node.ceil_mode:
            nodes += _explicit(node, shapes[node.inputs[0]][2:], shapes[node.output][2:], grids)
        else:
            nodes.append(node)
    return replace(view, nodes=tuple(nodes), grids=grids)


def _explicit(
    node: MaxPool | AveragePool, image: tuple[int, ...], windows: tuple[int, ...], grids: dict[str, Grid]
) -> list[Node]:
    border = _border(node, image, windows)
    if isinstance(node, AveragePool):
        return _mean(node, border, grids)
    if all(border[side + 2] < node.kernel[side] for side in (0, 1)):  # what runtimes take
        return [replace(node, padding=border, ceil_mode=False)]
    return _gathered_maximum(node, image, windows, grids)


def _border(node: MaxPool | AveragePool, image: Sequence[int], windows: Sequence[int]) -> Border:
    """Return the padding that holds the windows, at least the pooling's own."""
    top, left, *_ = node.padding
    reach = [
        (count - 1) * stride + length - size - before
        for count, stride, length, size, before in zip(
            windows, node.stride, _lengths(node), image, (top, left), strict=True
        )
    ]
    bottom, right = (max(least, needed) for least, needed in zip(node.padding[2:], reach, strict=True))
    return (top, left, bottom, right)


def _lengths(node: MaxPool | AveragePool) -> tuple[int, int]:
    dilation = node.dilation if isinstance(node, MaxPool) else (1, 1)
    height, width = ((size - 1) * step + 1 for size, step in zip(node.kernel, dilation, strict=True))
    return (height, width)


def _mean(node: AveragePool, border: Border, grids: dict[str, Grid]) -> list[Node]:
    """Pad with zeros what the mean counts as padding; the overhang, which it does not count, stays its own padding.

    PyTorch counts padding, but not the overhang. onnxruntime 1.31.1's QLinearAveragePool divides by the whole window
    where ``ceil_mode`` lets it hang over the border (its float kernel does not).
    """
    if not node.count_include_pad or not any(node.padding):
        return [replace(node, padding=border, ceil_mode=False, count_include_pad=False)]
    if border == node.padding:
        return [replace(node, ceil_mode=False)]
    top, left, bottom, right = node.padding
    padded, edge = f"{node.output}.padded", node.inputs[0]
    if edge in grids:
        grids[padded] = grids[edge]
    attributes = {"before": (0, 0, top, left), "after": (0, 0, bottom, right)}
    pad = Shape(f"{node.name}.pad", (edge,), padded, op="pad", attributes=attributes)
    overhang = (0, 0, border[2] - bottom, border[3] - right)
    mean = replace(node, inputs=(padded,), padding=overhang, ceil_mode=False, count_include_pad=False)
    return [pad, mean]


def _gathered_maximum(
    node: MaxPool, image: Sequence[int], windows: Sequence[int], grids: dict[str, Grid]
) -> list[Node]:
    """Lay out each window's own values side by side: the overhang is wider than runtimes allow as padding.

    A place outside the image repeats a value of the same window, which does not change the maximum.
    """
    nodes: list[Node] = []
    edge = node.inputs[0]
    for side, key in ((0, "rows"), (1, "columns")):
        laid = f"{node.output}.{key}"
        attributes: Mapping[str, object] = {
            "axis": side + 2,
            "indices": _places(node, side, image[side], windows[side]),
        }
        nodes.append(Shape(f"{node.name}.{key}", (edge,), laid, op="gather", attributes=attributes))
        if edge in grids:
            grids[laid] = grids[edge]
        edge = laid
    plain = replace(node, inputs=(edge,), stride=node.kernel, padding=(0, 0, 0, 0), dilation=(1, 1), ceil_mode=False)
    return [*nodes, plain]


def _places(node: MaxPool, side: int, size: int, windows: int) -> list[int]:
    found: list[int] = []
    for window in range(windows):
        start = window * node.stride[side] - node.padding[side]
        places = [start + tap * node.dilation[side] for tap in range(node.kernel[side])]
        inside = [place for place in places if 0 <= place < size]
        found += [place if place in inside else inside[0] for place in places]
    return found
