"""Generated images on a run's page: the grid holds the samples, the histogram what the teacher saw in them."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import beside
import numpy as np
import pytest
import torch
from PIL import Image

from qkd.files import DamagedFileError
from qkd.methods.data_free.making.generating import judged
from qkd.methods.data_free.making.pictures import ACROSS, made_histogram, made_pictures
from qkd.methods.data_free.making.samples import GAP, SHOWN, write_arrays, write_sample
from qkd.report import render_page, summarize
from qkd.report.charts import histogram_chart

_files = beside.load(Path(__file__).parents[2] / "report" / "run_files.py")
EPOCHS, SIDE, SCALE = (0, 3, 12), 4, 2
RESULT = {"role": "generator", "method": "rdskd", "steps": 480}


def make_run(path: Path, *, folder: str = "generator", channels: int = 3) -> Path:
    """Return a run with samples: each image has one color, which tells its epoch and its number."""
    run: Path = _files.make_run(path)
    for epoch in EPOCHS:
        colors = torch.arange(SHOWN * channels, dtype=torch.uint8).view(SHOWN, channels, 1, 1) + epoch
        write_sample(run / folder, epoch, colors.expand(-1, -1, SIDE, SIDE).contiguous())
    return run


def judge(run: Path, **changes: Any) -> None:
    logits = torch.eye(4)[torch.tensor([0] * 5 + [1] * 2 + [3] * 3)]  # class 2 never
    (run / "generator").mkdir(exist_ok=True)
    (run / "generator" / "result.json").write_text(json.dumps({**RESULT, **judged(logits), **changes}))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_shows_the_samples_a_row_for_each_epoch(tmp_path: Path, channels: int) -> None:
    run = make_run(tmp_path / "run", channels=channels)
    judge(run)
    record = dataclasses.replace(_files.record(), pictures=made_pictures(run), histogram=made_histogram(run))
    page = render_page(summarize(run), record)
    ((alt, png),) = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)"', page)
    assert alt == (
        "Samples, one row per epoch: 0, 3, 12. rdskd, 480 steps; the teacher sees each class 0 to 5 times in 10 "
        "images, with a mean confidence of 0.475."
    )
    assert f'<p class="note">{alt}</p>' in page and "<h2>Generated images</h2>" in page
    grid = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
    grid = grid.reshape(*(SCALE * (count * (SIDE + GAP) + GAP) for count in (len(EPOCHS), ACROSS)), channels)
    for line, epoch in enumerate(EPOCHS):
        for column in range(ACROSS):
            top, left = (SCALE * (GAP + place * (SIDE + GAP)) for place in (line, column))
            tile = grid[top : top + SCALE * SIDE, left : left + SCALE * SIDE]
            assert (tile == np.arange(channels) + column * channels + epoch).all()
            assert (grid[top - 1, left - 1] == 255).all(), "white between them"
    assert page.count('aria-label="generator: classes that the teacher sees in 10 images"') == 1


def test_samples_say_whose_training_made_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", folder="student")
    make_run(tmp_path / "run", folder="student/float")
    whose = ["Samples of the float twin's training, one row", "Samples of the student's training, one row"]
    assert [words[: len(start)] for words, start in zip(made_pictures(run), whose, strict=True)] == whose
    assert made_histogram(run) is None, "a generator that learns along is not judged"


def test_a_run_that_made_no_images_has_no_pictures(tmp_path: Path) -> None:
    run = _files.make_run(tmp_path / "run")
    assert made_pictures(run) == {} and made_histogram(run) is None
    assert "Generated images" not in render_page(summarize(run), _files.record())


def test_a_bar_is_as_high_as_its_class_is_frequent(tmp_path: Path) -> None:
    judge(make_run(tmp_path / "run"))
    (bars,) = [group for group in ElementTree.fromstring(str(made_histogram(tmp_path / "run"))).iter("g")
               if group.findtext("title") == "4 numbers, 0 to 5 times each"]  # fmt: skip
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", bars[1].attrib["d"])]
    corners = list(zip(numbers[::2], numbers[1::2], strict=True))
    floor = corners[0][1]
    heights = [floor - y for _, y in corners[1:-1:2]]
    assert [height / heights[0] * 5 for height in heights] == pytest.approx([5, 2, 0, 3], abs=1e-3)
    widths = [after[0] - before[0] for before, after in zip(corners[1:-1:2], corners[2:-1:2], strict=True)]
    assert widths == pytest.approx([98] * 4, abs=0.1)


def test_a_histogram_of_any_counts_is_drawn() -> None:
    many = histogram_chart("t", [1] * 1000, x_label="class")
    assert many.count("fill: var(--c1") == 1 and ">class<" in many, "one outline"
    assert "nothing was counted" in histogram_chart("t", [], x_label="class")
    assert "nothing was counted" in histogram_chart("t", [0, 0], x_label="class")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"class_histogram": [5, 2, 0, "3"]}, "result.json.*class_histogram"),
        ({"class_histogram": [5, 2]}, "counts 7 images of 10"),
        ({"mean_confidence": 2.0}, "result.json.*mean_confidence"),
        ({"steps": None}, "needs method, steps"),
    ],
)
def test_a_damaged_result_is_named(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    run = make_run(tmp_path / "run")
    judge(run, **changes)
    for read in (made_pictures, made_histogram):
        with pytest.raises(DamagedFileError, match=match):
            read(run)  # type: ignore[operator]


@pytest.mark.parametrize(
    "arrays",
    [{}, {"images": np.zeros((2, 1, 4, 4))}, {"images": np.zeros((4, 4), np.uint8)},
     {"images": np.zeros((2, 2, 4, 4), np.uint8)}],
    ids=["none", "floats", "plane", "two-channels"],
)  # fmt: skip
def test_a_sample_of_anything_else_is_named(tmp_path: Path, arrays: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run")
    write_arrays(run / "generator" / "samples" / "epoch_00003.npz", **arrays)
    with pytest.raises(ValueError, match="epoch_00003.npz: not a sample of images; delete it"):
        made_pictures(run)
