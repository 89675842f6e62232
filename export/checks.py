"""Refuse an integer view that no ONNX graph can represent, naming the layer.

``ExportError(ValueError)`` is what every failing export raises; nothing has been written when it does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from quantizers.integer import (
    PAIR_SUM_LIMIT,
    Add,
    Concat,
    Conv,
    Grid,
    IntegerView,
    Linear,
    MaxPool,
    Node,
    Quantize,
    Shape,
)

INT32_MAX = 2**31 - 1


class ExportError(ValueError):
    """A student cannot be exported as requested; nothing has been written."""


def check_view(view: IntegerView) -> None:
    """Check edges, grids, weights and biases of a view.

    Args:
        view: What the student computes.

    Raises:
        ExportError: If an edge is used before it exists or made twice; a grid's scale is not positive and finite, its
            codes do not fit eight bits or leave out zero; weights do not fit their bits; a weight or bias scale is
            not positive and finite; a bias does not fit int32, or a sum of products may overflow it; a layer's
            input is not on a grid; grids that must be equal differ. The message names the layer.
    """
    _check_edges(view)
    for edge, grid in view.grids.items():
        _check_grid(edge, grid)
    for node in view.nodes:
        if isinstance(node, (Conv, Linear)):
            _check_layer(node, view)
        elif isinstance(node, (Concat, MaxPool, Shape)):
            _check_keeps_grid(node, view)
        elif isinstance(node, Quantize) and view.grids.get(node.output) != node.grid:
            raise ExportError(f"{node.name}: its grid is not that of its output edge {node.output!r}")
        elif isinstance(node, Add):
            _check_sum(node, view)


def saturation_warnings(view: IntegerView) -> Iterator[str]:
    """Yield a warning for each layer whose products may saturate on x86 processors without VNNI.

    See :data:`quantizers.integer.PAIR_SUM_LIMIT`; a student's weights are safe.
    """
    for node in view.nodes:
        if not isinstance(node, (Conv, Linear)) or not node.weights.size:
            continue
        grid = view.grids[node.inputs[0]]
        largest = 2 * (grid.high + grid.zero_point) * int(np.abs(node.weights, dtype=np.int16).max())
        if largest > PAIR_SUM_LIMIT:
            yield (
                f"{node.name}: pairs of products reach {largest}, beyond int16: x86 without VNNI may saturate. "
                f"Keep its weights within [-64, 63] (now {node.weights.min()}..{node.weights.max()})"
            )


def _check_edges(view: IntegerView) -> None:
    known = set(view.inputs)
    for node in view.nodes:
        for edge in node.inputs:
            if edge not in known:
                raise ExportError(f"{node.name}: no earlier node makes its input {edge!r}")
        if node.output in known:
            raise ExportError(f"{node.name}: its output {node.output!r} already exists")
        known.add(node.output)
    for edge in view.outputs:
        if edge not in known:
            raise ExportError(f"no node makes the output {edge!r}")


def _check_grid(edge: str, grid: Grid) -> None:
    if not (np.isfinite(grid.scale) and np.float32(grid.scale) > 0):
        raise ExportError(
            f"{edge}: its scale must be positive and finite, got {grid.scale}; "
            "calibrate the student with images that reach this layer"
        )
    if not grid.low <= 0 <= grid.high:
        raise ExportError(f"{edge}: its codes {grid.low}..{grid.high} leave out zero, which padding needs")
    if grid.high - grid.low > 255:
        raise ExportError(f"{edge}: its codes {grid.low}..{grid.high} do not fit eight bits")


def _check_layer(node: Conv | Linear, view: IntegerView) -> None:
    grid = view.grids.get(node.inputs[0])
    if grid is None:
        raise ExportError(f"{node.name}: its input {node.inputs[0]!r} is not quantized")
    if not 2 <= node.weight_bits <= 8:
        raise ExportError(f"{node.name}: weight_bits must be 2 to 8, got {node.weight_bits}")
    low, high = -(2 ** (node.weight_bits - 1)), 2 ** (node.weight_bits - 1) - 1
    smallest, largest = int(node.weights.min()), int(node.weights.max())
    if smallest < low or largest > high:
        raise ExportError(
            f"{node.name}: weights {smallest}..{largest} do not fit {node.weight_bits} bits ({low}..{high})"
        )
    channels = node.weights.shape[0]
    if node.weight_scale.shape not in ((1,), (channels,)):
        raise ExportError(
            f"{node.name}: weight_scale must have shape [1] or [{channels}], got {list(node.weight_scale.shape)}"
        )
    _check_scales(node, grid)
    _check_accumulator(node, grid)


def _check_scales(node: Conv | Linear, grid: Grid) -> None:
    bias_scale = np.float32(grid.scale) * node.weight_scale.astype(np.float32)
    for what, scales in (("weight scale", node.weight_scale), ("input scale x weight scale", bias_scale)):
        bad = np.flatnonzero(~(np.isfinite(scales) & (scales > 0)))
        if bad.size:
            channel = int(bad[0])
            raise ExportError(
                f"{node.name}: {what} must be positive and finite, got {scales[channel]} in channel {channel}; "
                "a dead channel needs a floor under its scale"
            )


def _check_accumulator(node: Conv | Linear, grid: Grid) -> None:
    channels = node.weights.shape[0]
    # int64, so that a bias that was never cast to int32 is seen and not wrapped around
    bias = np.zeros(channels, np.int64) if node.bias is None else np.asarray(node.bias).astype(np.int64)
    if bias.shape != (channels,):
        raise ExportError(f"{node.name}: bias must have shape [{channels}], got {list(bias.shape)}")
    if np.abs(bias).max(initial=0) > INT32_MAX:
        channel = int(np.abs(bias).argmax())
        raise ExportError(
            f"{node.name}: bias {bias[channel]} of channel {channel} does not fit int32; its scale "
            f"{grid.scale * float(node.weight_scale.reshape(-1)[channel % node.weight_scale.size]):.3g} is too small"
        )
    products = np.abs(node.weights, dtype=np.int16).reshape(channels, -1).sum(1, dtype=np.int64) * max(
        -grid.low, grid.high
    )
    if (products + np.abs(bias)).max(initial=0) > INT32_MAX:
        raise ExportError(f"{node.name}: the sum of its products and its bias may overflow int32")


def _check_keeps_grid(node: Node, view: IntegerView) -> None:
    grids = {edge: view.grids.get(edge) for edge in (*node.inputs, node.output)}
    if len(set(grids.values())) > 1:
        raise ExportError(f"{node.name}: inputs and output must share one grid, got {grids}")


def _check_sum(node: Add, view: IntegerView) -> None:
    scales = {view.grids[edge].scale for edge in node.inputs if edge in view.grids}
    if len(scales) > 1:
        raise ExportError(f"{node.name}: both inputs must share one scale, got {sorted(scales)}")
