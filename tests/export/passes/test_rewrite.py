"""Rewrites change how a view is computed, and not one code."""

from __future__ import annotations

import numpy as np
import pytest

from export.passes.rewrite import arrange, merge_quantizers, sink_moves, spell_out, split_fan_out
from quantizers.integer import Add, AveragePool, GlobalAveragePool, MaxPool, Quantize, Shape


@pytest.mark.parametrize("rewrite", [arrange, merge_quantizers, sink_moves, split_fan_out, spell_out])
def test_codes_stay(net, tools, images, rewrite):
    net.conv(net.image(), "c", (3, 4))
    net.shape("c", "moved", "transpose", perm=(0, 1, 3, 2))
    net.quantize("moved", "a", 4, 0.5)
    net.quantize(net.conv("a", "d", (4, 4)), "d1", 8, 0.5, -128)
    net.quantize("d", "d2", 8, 0.5, -128)
    net.real(Add("sum", ("d1", "d2"), "sum"))
    net.quantize("sum", "s1", 8, 0.5)
    net.quantize("sum", "s2", 4, 2.0)
    net.real(GlobalAveragePool("mean", ("s1",), "mean", False))
    view = net.view(net.quantize("mean", "m", 8, 1.0), "s2")
    rewritten = rewrite(view)
    before, after = tools.reference(view, images), tools.reference(rewritten, images)
    for edge, grid in view.grids.items():
        assert rewritten.grids[edge] == grid
        np.testing.assert_array_equal(after[edge], before[edge])
    assert (rewritten.nodes != view.nodes) and before["m"].any()


def test_equal_quantizers_become_one(net):
    net.conv(net.image(), "c", (3, 4))
    for name, scale in (("a", 0.5), ("b", 0.5), ("other", 0.25)):
        net.quantize("c", name, 4, scale)
    merged = merge_quantizers(net.view("a", "b", "other"))
    assert [n.output for n in merged.nodes if isinstance(n, Quantize)] == ["image", "a", "other"]


def test_quantizers_rise_above_moves(net):
    net.conv(net.image(), "c", (3, 4))
    net.real(MaxPool("pool", ("c",), "p", (2, 2), (2, 2), (0, 0, 0, 0), (1, 1), False))
    net.real(Shape("flat", ("p",), "f", op="flatten", attributes={"axis": 1}))
    sunk = sink_moves(net.view(net.quantize("f", "a", 4, 0.5)))
    assert [type(n).__name__ for n in sunk.nodes] == ["Quantize", "Conv", "Quantize", "MaxPool", "Shape"]
    assert sunk.nodes[-1].output == "a" and sunk.nodes[2].inputs == ("c",)


def test_a_move_that_something_else_reads_stays(net):
    net.conv(net.image(), "c", (3, 4))
    net.real(Shape("flat", ("c",), "f", op="flatten", attributes={"axis": 1}))
    net.quantize("f", "a", 4, 0.5)
    view = net.view("a", "f")
    assert sink_moves(view).nodes == view.nodes


def test_a_convolution_is_not_computed_twice(net):
    net.conv(net.image(), "c", (3, 4))
    net.quantize("c", "a", 4, 0.5)
    net.quantize("c", "b", 8, 0.5)
    view = net.view("a", "b")
    assert split_fan_out(view).nodes == view.nodes


@pytest.mark.parametrize(
    ("padding", "counts", "still_counts"),
    [((0, 0, 0, 0), True, False), ((1, 1, 1, 1), True, True), ((1, 1, 1, 1), False, False)],
)
def test_a_mean_counts_padding_only_where_it_has_some(net, padding, counts, still_counts):
    net.real(AveragePool("mean", (net.image(),), "mean", (3, 3), (2, 2), padding, False, counts))
    nodes = spell_out(net.view("mean")).nodes[1:]
    assert [type(n).__name__ for n in nodes] == ["AveragePool"]
    assert nodes[-1].count_include_pad == still_counts and nodes[-1].output == "mean"
