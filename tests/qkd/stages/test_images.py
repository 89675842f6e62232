"""A run and its images: recorded once, and refused by every stage once they are others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qkd.cli import main
from qkd.config.binding import config_text
from qkd.data import DataError, load_splits
from qkd.pipeline import run_stages
from qkd.progress import Progress, Silent
from qkd.roles.images import FILE, check_images, run_images, stored_images
from qkd.roles.sample import calibration_images
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import tiny_config, write_npz_set

Change = Callable[[dict[str, np.ndarray]], None]


class Said(Progress):
    """Keeps the warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = write_npz_set(tmp_path / "data")
    return RunFolder.open(tiny_config(folder), tmp_path / "runs")


def rewrite(run: RunFolder, part: str, change: Change) -> None:
    path = run.path.parent.parent / "data" / f"{part}.npz"
    with np.load(path) as archive:
        arrays = {name: archive[name].copy() for name in archive.files}
    change(arrays)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def another_label(arrays: dict[str, np.ndarray]) -> None:
    arrays["labels"][[0, 1]] = arrays["labels"][[1, 0]]


def another_pixel(arrays: dict[str, np.ndarray]) -> None:
    arrays["images"][3, 2, 1] ^= 1


def one_less(arrays: dict[str, np.ndarray]) -> None:
    arrays["images"], arrays["labels"] = arrays["images"][:-1], arrays["labels"][:-1]


def one_class_more(arrays: dict[str, np.ndarray]) -> None:
    arrays["labels"][7] = 4


CHANGES = [
    ("train", another_label, "changed: labels of train."),
    ("test", another_label, "changed: labels of test."),
    ("train", another_pixel, "changed: pixels of train."),
    ("test", another_pixel, "changed: pixels of test."),
    ("train", one_less, "changed: number of images of train (64 then, 63 now)."),
    ("train", one_class_more, "changed: classes (4 then, 5 now; new: 4)."),
]


@pytest.mark.parametrize(("part", "change", "message"), CHANGES)
def test_what_has_changed_is_named_with_the_way_out(run: RunFolder, part: str, change: Change, message: str) -> None:
    run_images(run)
    run_images(run)
    rewrite(run, part, change)
    for look in (
        lambda: run_images(run),
        lambda: check_images(run, Silent()),
        lambda: stored_images(run.config, run.path),
        lambda: calibration_images(run.config, folder=run.path),
        lambda: run_stages(run, ("teacher",), Silent()),
    ):
        with pytest.raises(DataError) as caught:
            look()
        assert message in str(caught.value)
        assert str(run.path) in str(caught.value) and "another name" in str(caught.value)


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in ("bench", "report")])
def test_every_stage_that_reads_images_compares_them(
    run: RunFolder, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_images(run)
    rewrite(run, "train", another_label)
    monkeypatch.setattr("qkd.pipeline.running.NEEDS", dict.fromkeys(STAGES, ()))
    with pytest.raises(DataError, match="changed: labels of train"):
        STAGES[stage](run, Silent())


@pytest.mark.parametrize("stage", STAGES)
def test_a_complete_stage_and_one_without_images_compare_them_too(
    run: RunFolder, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_images(run)
    (run.folder(stage) / "made").write_text("something")
    monkeypatch.setattr("qkd.pipeline.running.NEEDS", dict.fromkeys(STAGES, ()))
    if stage not in ("bench", "report"):  # of these even an incomplete one is held back
        run.complete(stage, [run.folder(stage) / "made"])
    said = Said()
    rewrite(run, "test", another_label)
    with pytest.raises(DataError, match="changed: labels of test"):
        run_stages(run, (stage,), said)
    rewrite(run, "test", another_label)  # back
    if stage not in ("bench", "report"):
        run_stages(run, (stage,), said)


def test_a_run_without_a_record_gets_one_and_says_so(run: RunFolder) -> None:
    (run.folder("teacher") / "made").write_text("something")
    run.complete("teacher", [run.folder("teacher") / "made"])
    said = Said()
    run_stages(run, ("teacher",), said)
    assert [line for line in said.lines if "no record of its images (data.json)" in line]
    assert json.loads((run.path / FILE).read_text())["train"]["images"] == 64
    said = Said()
    run_stages(run, ("teacher",), said)
    assert said.lines == []
    (run.path / FILE).unlink()
    stored_images(run.config, run.path)  # only looks
    assert not (run.path / FILE).exists()


def test_notes_on_the_data_are_said_once(run: RunFolder) -> None:
    rewrite(run, "test", lambda arrays: arrays.update(images=arrays["images"][arrays["labels"] != 2],
                                                      labels=arrays["labels"][arrays["labels"] != 2]))  # fmt: skip
    said = Said()
    run_images(run, said)
    run_images(run, said)
    assert said.lines == ["data: 1 of 4 classes has no test image (2): the test accuracy does not cover it"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"classes": 3, "train": 1, "test": 1, "fingerprint": 0}', "\0"])
def test_a_damaged_record_is_refused(run: RunFolder, text: str) -> None:
    (run.path / FILE).write_text(text)
    with pytest.raises(DataError, match="data.json is not a record of .*delete it, and it will be written again"):
        run_images(run)


def test_the_same_content_under_another_time_is_the_same(run: RunFolder) -> None:
    run_images(run)
    rewrite(run, "train", lambda arrays: None)
    run_images(run)


def test_the_fingerprint_of_small_sets_is_what_it_was(tmp_path: Path) -> None:
    """Checkpoints hold it: a training that was begun with an earlier version resumes."""
    import hashlib

    splits = load_splits(tiny_config(write_npz_set(tmp_path / "data"), {"data.val_fraction": 0.0}).data, seed=0)
    digest = hashlib.sha256("\n".join(splits.classes).encode())
    for part in (splits.train, splits.test):
        images, _ = part.batch(torch.arange(len(part)), "cpu")
        for values in (images, part.labels):
            digest.update(str(tuple(values.shape)).encode())
            digest.update(values.numpy().tobytes())
    assert splits.fingerprint == digest.hexdigest()
    shutil.rmtree(tmp_path / "data")


def test_the_command_ends_with_2_and_the_reason(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run_images(run)
    run.close()
    file = run.path.parent / "c.yaml"
    file.write_text(config_text(run.config))
    rewrite(run, "train", another_label)
    for command in ("teacher", "run"):
        assert main([command, str(file), "--runs-dir", str(run.path.parent)]) == 2
        assert "changed: labels of train. Restore it, or give this run another name" in capsys.readouterr().err
