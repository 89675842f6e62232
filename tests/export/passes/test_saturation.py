"""Narrow grids are stored so that saturation clips, and only where no code can go where it must not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from export import write_view
from export.passes.saturation import WideGrid, saturate
from quantizers.integer import Concat, Conv, GlobalAveragePool, Grid, IntegerView, Linear, MaxPool, Quantize

X = Grid(0.5, 0, 255)
NARROW = Grid(2.0, 0, 15)


def ends(grid: Grid) -> tuple[float, int, int, int]:
    return grid.scale, grid.low, grid.high, grid.bits


def conv(source: str, output: str, weight: int = 7) -> Conv:
    codes = np.full((4, 4, 1, 1), weight, np.int8)
    return Conv(output, (source,), output, codes, 8, np.ones(4, np.float32), None, (1, 1), (0,) * 4, (1, 1), 1)


def view_of(first: Grid, second: Grid, *more: object) -> IntegerView:
    nodes = (Quantize("qa", ("x",), "a", first), Quantize("qb", ("a",), "b", second), *more)
    grids = {"a": first, "b": second}
    for node in more:
        if isinstance(node, Quantize):
            grids[node.output] = node.grid
        elif isinstance(node, (Concat, MaxPool)):
            grids[node.output] = grids[node.inputs[0]]
    return IntegerView(nodes, grids, ("x",), (nodes[-1].output,))


def test_a_grid_that_is_only_left_at_its_top_is_stored_at_the_top():
    assert ends(saturate(view_of(X, NARROW, conv("b", "c"))).grids["b"]) == (2.0, -240, 15, 4)


def test_a_grid_that_is_only_left_at_its_bottom_is_stored_at_the_bottom():
    view = view_of(Grid(0.05, -128, 127), Grid(2.0, -2, 13), conv("b", "c"))  # 6.35 is far below 13 steps of 2
    assert ends(saturate(view).grids["b"]) == (2.0, -2, 253, 4)
    assert saturate(view_of(Grid(0.1, -128, 127), Grid(2.0, -2, 1), conv("b", "c"))).grids["b"] == Grid(2.0, -2, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (X, replace(X, low=0, high=15)),  # the same grid cut off: a Clip is cheaper than a change of grid
        (X, X),
        (Grid(0.5, -128, 127), NARROW),  # can leave it at both ends
        (Grid(1.0, -1, 254), NARROW),  # -1 is half a step: a tie may go either way
    ],
)
def test_grids_that_stay(first: Grid, second: Grid):
    assert saturate(view_of(first, second, conv("b", "c"))).grids["b"] == second


def test_what_a_convolution_gives_may_be_anything():
    view = view_of(X, NARROW, conv("b", "c"), Quantize("qd", ("c",), "d", NARROW), conv("d", "e"))
    grids = saturate(view).grids
    assert grids["b"].low == -240 and grids["d"] == NARROW


def test_large_weights_would_overflow_sixteen_bits():
    assert saturate(view_of(X, NARROW, conv("b", "c", 64))).grids["b"].low == -240
    assert saturate(view_of(X, NARROW, conv("b", "c", 65))).grids["b"] == NARROW
    assert saturate(view_of(X, NARROW, conv("b", "c", -128))).grids["b"] == NARROW


def test_a_mean_keeps_the_range_of_what_it_reads():
    mean = GlobalAveragePool("mean", ("b",), "m", keepdims=True)
    head = Linear("h", ("q",), "h", np.ones((2, 4), np.int8), 4, np.ones(2, np.float32), None)
    quantize = Quantize("qq", ("m",), "q", Grid(0.5, 0, 15))
    assert saturate(view_of(X, X, mean, quantize, head)).grids["q"] == WideGrid(0.5, -240, 15, 0, 15)


def test_edges_that_are_stored_together_move_together_or_not_at_all():
    pool = MaxPool("pool", ("b",), "p", (2, 2), (2, 2), (0,) * 4, (1, 1), ceil_mode=False)
    grids = saturate(view_of(X, NARROW, pool, conv("p", "c"))).grids
    assert grids["b"] == grids["p"] == WideGrid(2.0, -240, 15, 0, 15)

    def joined(source: str) -> IntegerView:
        other = Quantize("qd", (source,), "d", NARROW)
        return view_of(X, NARROW, conv("a", "e"), other, Concat("cat", ("b", "d"), "f", axis=1))

    grids = saturate(joined("a")).grids
    assert grids["b"] == grids["d"] == grids["f"] == WideGrid(2.0, -240, 15, 0, 15)
    grids = saturate(joined("e")).grids  # the other operand comes from a convolution
    assert grids["b"] == grids["d"] == grids["f"] == NARROW


def test_the_file_has_no_clip_there_and_says_where_its_codes_are(tmp_path):
    import json

    import onnx

    view = view_of(X, NARROW, conv("b", "c"))
    exported = write_view(view, [(1, 4, 3, 3)], tmp_path / "n.onnx")
    assert "Clip" not in exported.operators_in_file
    model = onnx.load(tmp_path / "n.onnx")
    taps = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "quantizers"))
    assert [(tap["name"], tap["zero_point"], tap["bits"]) for tap in taps] == [("qa", 0, 8), ("qb", 240, 4)]

    from export.runtime import open_session

    images = np.random.default_rng(0).uniform(-5, 150, (3, 4, 3, 3)).astype(np.float32)
    codes = np.clip(np.rint(np.clip(np.rint(images / 0.5), 0, 255) * 0.5 / 2), 0, 15)
    wanted = np.broadcast_to((7 * 2 * codes).sum(1, keepdims=True), images.shape)
    for optimize in (False, True):
        session = open_session(tmp_path / "n.onnx", optimize=optimize)
        assert np.array_equal(session.run(None, {"images": images})[0], wanted)
