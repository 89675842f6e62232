"""The picture of a diagnosis: bars as high as what they stand for, colors by sign, epochs without a mean."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from qkd.report.drawing import DPI, Picture
from qkd.report.stacks import PANEL
from qkd.report.teacher_picture import BAND, DIAGONAL, MEAN, NEGATIVE, POSITIVE, TOTAL, teacher_picture

RELATIONS = [[1.0, 0.5, -0.5], [0.5, 1.0, 0.0], [-0.5, 0.0, 1.0]]
EPOCHS = [
    {"epoch": 1, "w_mean": 2.0, "w_std": 1.0, "w_total": -1.0},
    {"epoch": 2, "w_mean": None, "w_std": None, "w_total": 0.5},
    {"epoch": 3, "w_mean": None, "w_std": None, "w_total": None},
]


def draw(**changes: Any) -> Picture:
    options: dict[str, Any] = {
        "confidences": {"T 1": [0, 30], "T 4": [20, 10]},
        "relations": RELATIONS,
        "relations_label": "T 4",
        "classes": ["a", "<b>", "c"],
        "rescaling": EPOCHS,
    }
    return teacher_picture("title", **{**options, **changes})


def drawn(picture: Picture) -> dict[str, Any]:
    """Return note -> what bears it; of several, the first."""
    artists = [artist for axes in picture.figure.axes for artist in (*axes.patches, *axes.lines)]
    return {artist.get_gid().removeprefix("note: "): artist for artist in reversed(artists) if artist.get_gid()}


def test_bars_stand_for_what_they_say() -> None:
    bars = drawn(draw())
    one, other = bars["T 1, 0.50 to 1.00: 30 images"], bars["T 4, 0.00 to 0.50: 20 images"]
    assert (one.get_x(), one.get_height()) == (0.5, 1.0)
    assert (other.get_x(), other.get_height()) == (0.25, pytest.approx(2 / 3))
    assert "T 1, 0.00 to 0.50: 0 images" not in bars
    assert to_hex(bars["a, a: 1.000"].get_facecolor()) == DIAGONAL
    assert to_hex(bars["<b>, c: 0.000"].get_facecolor()) == "#ffffff"
    assert to_hex(bars["a, <b>: 0.500"].get_facecolor()) == POSITIVE
    assert to_hex(bars["a, c: -0.500"].get_facecolor()) == NEGATIVE
    assert bars["a, <b>: 0.500"].get_bbox().bounds == (1, 0, 1, 1)  # column, row, one cell
    svg = draw().to_svg()
    assert "&lt;b&gt;" in svg and "<b>" not in svg


def test_correlations_that_are_not_finite_are_white() -> None:
    bars = drawn(draw(relations=[[1.0, float("nan"), 0.5], [float("inf"), 1.0, 0.0], [0.0, 0.0, 1.0]]))
    assert to_hex(bars["a, <b>: nan"].get_facecolor()) == to_hex(bars["<b>, a: inf"].get_facecolor()) == "#ffffff"
    assert to_hex(bars["a, c: 0.500"].get_facecolor()) == POSITIVE


def test_epochs_have_what_was_measured() -> None:
    axes = draw().figure.axes[-1]
    (band,) = axes.patches
    assert isinstance(band, Rectangle) and to_hex(band.get_facecolor()) == BAND
    assert (band.get_x(), band.get_y(), band.get_height()) == (0, 1.0, 2.0)
    assert str(band.get_gid()).startswith("note: epoch 1: mean 2.000")
    lines = [(line.get_color(), *map(list, line.get_data())) for line in axes.lines if line.get_linewidth() == 2]
    assert lines == [
        (MEAN, [0, 0.9], [2.0, 2.0]), (TOTAL, [0, 0.9], [-1.0, -1.0]), (TOTAL, [1, 1.9], [0.5, 0.5]),
    ]  # fmt: skip
    assert axes.get_ylim() == (-1, 3) and axes.get_xlim() == (0, 3)


def test_without_a_student_there_are_no_epochs_and_many_classes_have_no_notes() -> None:
    alone = draw(rescaling=())
    assert alone.figure.get_figheight() < draw().figure.get_figheight() - PANEL / DPI
    many = [[float(row == column) for column in range(40)] for row in range(40)]
    crowd = draw(relations=many, classes=[str(label) for label in range(40)])
    assert not [words for words in drawn(crowd) if words.startswith("3, ")]
    assert "3, 4: 0.000" not in crowd.to_svg() and "<image" in crowd.to_svg()
    assert crowd.to_png().startswith(b"\x89PNG")
