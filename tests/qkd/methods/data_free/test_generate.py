"""`qkd generate`: a row for each epoch that has samples, whoever made them, and fresh images where there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qkd.cli.entry import main
from qkd.config import RunConfig
from qkd.methods.data_free.making.samples import GAP, read_sample
from qkd.testing import run_tiny

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize(
    ("method", "rows", "folder"),
    [
        ("noise", ["fresh"], ""),
        ("procedural", ["fresh"], ""),
        ("adaptive_inversion", ["epoch 0", "epoch 1"], "student"),
        ("dafl_joint", ["epoch 0", "epoch 1"], "student"),
    ],
)
def test_what_each_row_shows(
    method: str,
    rows: list[str],
    folder: str,
    config_of: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with run_tiny(config_of(method), tmp_path / "runs", "teacher", "search", "distill") as run:
        path = run.path
    out = tmp_path / "grid.png"
    assert main(["generate", str(path), "--out", str(out), "--count", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == rows and said["folder"] == folder
    grid = np.asarray(Image.open(out))[::2, ::2]  # two pixels a pixel
    assert grid.shape == (len(rows) * (8 + GAP) + GAP, 4 * (8 + GAP) + GAP)
    for line, epoch in enumerate(rows if folder else []):
        sample = read_sample(path / folder / "samples" / f"{epoch.replace(' ', '_0000')}.npz")
        top = GAP + line * (8 + GAP)
        assert np.array_equal(grid[top : top + 8, GAP : GAP + 8], sample[0, 0]), "the pixels are the sample's"


def test_a_generator_that_is_taken_over_brings_its_samples(
    config_of: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_tiny(config_of("rdskd", {"name": "first"}), tmp_path, "teacher", "search", "distill") as run:
        source = str(run.path)
    config = config_of("rdskd", {"name": "second", "teacher.run": source})
    with run_tiny(config, tmp_path, "teacher") as run:
        assert main(["generate", str(run.path), "--out", str(tmp_path / "grid.png")]) == 0
    said = capsys.readouterr().out
    assert "(rdskd; samples of generator/), rows: epoch 0, epoch 1, epoch 2, fresh" in said
