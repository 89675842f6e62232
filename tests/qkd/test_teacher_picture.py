"""The picture of a diagnosis: bars as high as what they stand for, colours by sign, epochs without a mean."""

from __future__ import annotations

from typing import Any

import pytest

from qkd.report.stacks import PANEL, Picture
from qkd.report.teacher_picture import BAND, DIAGONAL, MEAN, TOTAL, teacher_picture

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


def test_bars_stand_for_what_they_say() -> None:
    picture = draw()
    bars = {bar.note: bar for bar in picture.bars}
    assert bars["T 1, 0.50 to 1.00: 30 images"].height == pytest.approx(
        1.5 * bars["T 4, 0.00 to 0.50: 20 images"].height
    )
    assert "T 1, 0.00 to 0.50: 0 images" not in bars
    assert bars["a, a: 1.000"].colour == DIAGONAL and bars["<b>, c: 0.000"].colour == "#ffffff"
    assert bars["a, <b>: 0.500"].colour == "#d94f2b" and bars["a, c: -0.500"].colour == "#1f4e9c"
    assert bars["a, <b>: 0.500"].width == pytest.approx(PANEL / 3)
    svg = picture.to_svg()
    assert "&lt;b&gt;" in svg and "<b>" not in svg


def test_epochs_have_what_was_measured() -> None:
    bars = draw().bars
    (band,) = [bar for bar in bars if bar.colour == BAND]
    scale = PANEL / (3.0 + 1.0)  # from -1 to 3
    assert band.height == pytest.approx(2 * scale) and "mean 2.000" in band.note and band.note.startswith("epoch 1: ")
    first, second = sorted((bar for bar in bars if bar.colour == TOTAL and bar.height == 2), key=lambda bar: bar.x)
    assert first.y - second.y == pytest.approx(1.5 * scale)  # -1 lies below 0.5
    assert band.y + band.height / 2 == pytest.approx(
        next(bar.y for bar in bars if bar.colour == MEAN and bar.note == band.note and bar.height == 2) + 1
    )


def test_without_a_student_there_are_no_epochs_and_many_classes_have_no_notes() -> None:
    alone = draw(rescaling=())
    assert alone.height < draw().height - PANEL
    many = [[float(row == column) for column in range(40)] for row in range(40)]
    crowd = draw(relations=many, classes=[str(label) for label in range(40)])
    assert sum(bar.note == "" for bar in crowd.bars) == 1600
    assert crowd.to_png().startswith(b"\x89PNG")
