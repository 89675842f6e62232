"""`qkd val` on folders: only images that the student has not learned from, unless it is said; read as in training."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from qkd.cli import main
from qkd.failures import UsageError
from qkd.predicting.own_images import own_run
from qkd.predicting.predict import Model
from qkd.predicting.scoring import labeled_images
from qkd.run.folder import RunFolder
from qkd.testing import run_tiny, tiny_config

pytestmark = pytest.mark.usefixtures("unfused")
CLASSES = ("a", "b", "test")


def fill(folder: Path, *names: str, count: int = 12, first: int = 0) -> Path:
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(first, first + count):
            pixels = np.random.default_rng(3 * index + label).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def trained(place: Path, path: str, name: str) -> RunFolder:
    """Train in `place`, whose `runs/` the run is in, with a relative path of the set."""
    before = Path.cwd()
    os.chdir(place)
    try:
        changes = {"name": name, "data.name": "folder", "data.path": path}
        made = run_tiny(tiny_config(Path(path), changes), place / "runs", "teacher", "search", "distill", "export")
    finally:
        os.chdir(before)
    made.close()
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two runs: `flat` of class folders, `parts` of a set with `train` and `test`."""
    home = tmp_path_factory.mktemp("home")
    fill(home / "flat", *CLASSES)
    fill(home / "parts" / "train", *CLASSES)
    fill(home / "parts" / "test", *CLASSES, count=3, first=50)
    for name in ("flat", "parts"):
        trained(home, name, name)
    return home


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of it, as the current folder."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def config_of(run: str, file: str, **data: Any) -> str:
    values = yaml.safe_load(Path("runs", run, "config.yaml").read_text())
    values["data"] |= data
    Path(file).write_text(yaml.safe_dump(values))
    return file


def scored(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main(["val", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["val", *words]) == 2
    return capsys.readouterr().err


def test_a_set_that_has_changed_since_the_run_is_not_scored(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An added image moves others from the training part to the test part, where they would count as new."""
    config = config_of("flat", "again.yaml")
    absolute = config_of("flat", "absolute.yaml", path=str(place / "runs" / ".." / "flat"))
    before = scored(capsys, "runs/flat", "runs/flat")
    assert scored(capsys, "runs/flat", config)["right"] == before["right"] and before["notes"] == []
    fill(place / "flat", "a", count=1, first=90)
    for data in ("runs/flat", "runs/flat/config.yaml", config, absolute):
        said = refused(capsys, "runs/flat", data)
        assert "the data set is not what" in said and "number of images of train" in said
    assert "runs/flat began with" in refused(capsys, "runs/parts", "runs/flat"), "the record is that of DATA"


def test_another_division_of_the_same_files_is_noted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del place
    for keys in ({"split_seed": 5}, {"test_fraction": 0.5}):
        (note,) = scored(capsys, "runs/flat", config_of("flat", "other.yaml", **keys))["notes"]
        assert "was trained on some of these images (" in note
        assert note.endswith("; this config divides the set differently from the run")
    same = scored(capsys, "runs/parts", config_of("parts", "other.yaml", split_seed=5))
    assert same["notes"] == [] and same["images"] == 9, "no test images are drawn"


@pytest.mark.parametrize("data", ["parts/train", "link", "flat", "more/../parts/train", "parts/linked"])
def test_training_images_are_noted_whatever_names_them(
    place: Path, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    run = "runs/flat" if data == "flat" else "runs/parts"
    (place / "more").mkdir()
    (place / "link").symlink_to("parts/train")
    if data == "parts/linked":
        for name in CLASSES:
            (place / data / name).mkdir(parents=True)
            for file in (place / "parts" / "train" / name).iterdir():
                (place / data / name / f"x{file.name}").symlink_to(file)
    notes = scored(capsys, run, data)["notes"]
    count = 29 if data == "flat" else 36
    assert len(notes) == 1 and "student was trained on some of these images" in notes[0]
    assert f"({count} of 36 are in its run's training part)" in notes[0]


@pytest.mark.parametrize("data", ["parts", "parts/test", "parts/val"])
def test_images_that_are_not_trained_on_have_no_note(
    place: Path, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    fill(place / "parts" / "val", *CLASSES, count=2, first=70)
    assert scored(capsys, "runs/parts", data)["notes"] == []


def test_a_relative_path_is_one_from_where_the_run_was_started(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "below").mkdir()
    monkeypatch.chdir(place / "below")
    assert scored(capsys, "../runs/flat", "../flat")["notes"]
    assert scored(capsys, "../runs/flat", "../runs/flat")["notes"] == []
    fill(place / "below" / "flat", *CLASSES, first=300)  # another set of this name
    assert scored(capsys, "../runs/flat", "../flat")["notes"] and not scored(capsys, "../runs/flat", "flat")["notes"]
    assert scored(capsys, "../runs/flat", "../runs/flat")["images"] == 7


def test_a_training_archive_is_noted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_tiny(tiny_config(data), tmp_path / "runs", "teacher", "search", "distill", "export")
    run.close()
    (tmp_path / "link.npz").symlink_to(data / "train.npz")
    for archive, noted in ((data / "train.npz", True), (tmp_path / "link.npz", True), (data / "test.npz", False)):
        notes = scored(capsys, str(run.path), str(archive))["notes"]
        assert bool(notes) == noted and (not noted or notes[0].startswith("the student was trained on these images; "))


def test_folders_are_read_as_in_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = fill(place / "new", *CLASSES, count=2, first=80)
    (new / "a" / "x.heic").write_bytes(b"x")
    shutil.copy(new / "a" / "80.png", new / "a" / "none")
    shutil.copy(new / "a" / "80.png", new / "loose.png")
    assert scored(capsys, "runs/parts", "new")["notes"] == [
        "1 image in an unsupported format not read (supported: bmp, gif, jpeg, jpg, pgm, png, ppm, tif, tiff, webp; "
        "convert to one of them) ('x.heic')",
        "1 image outside class folders not read ('loose.png')",
        "1 other file in class folders not read (1 without a suffix); 1 of them is an image: rename to .jpg, .png, ...",
    ]
    (new / "b" / "x.jpg").symlink_to("nowhere")
    assert "is not a file, or is a broken link" in refused(capsys, "runs/parts", "new")
    (new / "b" / "x.jpg").unlink()
    (new / "b" / "more").symlink_to(new / "a")
    assert "is a link to a folder, which is not followed" in refused(capsys, "runs/parts", "new")


@pytest.mark.parametrize("layout", ["classes", "deep", "part", "foreign"])
def test_a_class_may_be_called_as_a_part_is(home: Path, tmp_path: Path, layout: str) -> None:
    model = Model(str(home / "runs" / "flat" / "export" / "student.onnx"))
    if layout == "part":
        fill(tmp_path / "test", *CLASSES, count=2)
    elif layout == "foreign":
        model.facts["classes"] = ["a", "b", "c"]
        fill(tmp_path / "test", "a", "zebra", count=2)
        with pytest.raises(UsageError, match="does not have class 'zebra'"):
            labeled_images(str(tmp_path), model)
        return
    else:
        fill(tmp_path, *CLASSES, count=2)
    if layout == "deep":
        (tmp_path / "test" / "batch1").mkdir()
        (tmp_path / "test" / "0.png").rename(tmp_path / "test" / "batch1" / "0.png")
    found = labeled_images(str(tmp_path), model)
    labels = np.concatenate([labels for _, labels in found.batches])
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_file_of_no_run_has_no_run(tmp_path: Path) -> None:
    assert own_run(tmp_path / "export" / "student.onnx") is None
