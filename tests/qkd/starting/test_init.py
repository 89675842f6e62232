"""`qkd init`: what it sees, what it writes, that it runs, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qkd.cli import main
from qkd.cli.entry import parse
from qkd.config.binding import load_config
from qkd.nets import build_net
from qkd.testing import write_npz_set

NET = """
from torch import nn


def build(num_classes, in_channels):
    body = [nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, num_classes))
"""


def paint(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((12, 10),), channels: int = 3) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            width, height = sizes[index % len(sizes)]
            shape = (height, width) if channels == 1 else (height, width, channels)
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.jpg")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["init", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_says_what_it_saw_and_the_config_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(home / "pets", 10)
    assert main(["init", "pets"]) == 0
    text = capsys.readouterr().out
    assert "20 images of 2 classes, color, 10x12 pixels" in text and "classes: cat 10, dog 10" in text
    assert "14 training images; held out: 2 for validation" in text and "wrote pets.yaml" in text
    lines = (home / "pets.yaml").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if not line.startswith("#")]) <= 6
    config = load_config("pets.yaml")
    assert (config.name, config.teacher.net, config.data.batch_size) == ("pets", "resnet20", 8)
    assert main(["run", "pets.yaml", "--dry-run", "teacher.net=resnet8", "threads=1"]) == 0
    assert main(["init", "pets"]) == 2
    assert "already exists; choose another --out" in capsys.readouterr().err


def test_sizes_are_chosen_where_images_differ(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(home / "mixed" / "train", 6, ((150, 110), (300, 90), (100, 100)))
    paint(home / "mixed" / "val", 2, ((150, 110),))
    found = init(capsys, "mixed", "--bits", "w2a3")
    assert found["data"]["smallest"] == "100x100" and found["data"]["largest"] == "90x300"
    config = load_config("mixed.yaml")
    assert (config.data.image_size, config.teacher.net) == (96, "torchvision/resnet18")
    assert (config.student.quant.weight_bits, config.student.quant.act_bits) == (2, 3)
    assert "for the test (val/)" in found["data"]["held_out"]


def test_gray_images_and_archives(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(home / "gray", 5, channels=1)
    assert init(capsys, "gray")["data"]["channels"] == 1
    write_npz_set(home / "arrays")
    assert init(capsys, "arrays")["data"]["kind"] == "npz"
    assert load_config("arrays.yaml").data.name == "npz"
    assert init(capsys)["data"] is None and load_config("digits.yaml").data.name == "digits"


def test_own_net_and_weights_with_another_head(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the head fits is found out; the net's file is named relative to the config."""
    paint(home / "pets", 5)
    (home / "code").mkdir()
    (home / "code" / "mynet.py").write_text(NET, encoding="utf-8")
    for classes, file in ((7, "old.pth"), (2, "same.pth")):
        net = build_net("code/mynet.py:build", classes=classes, channels=3, image_size=8)
        torch.save({"model": net.state_dict()}, home / file)
    words = ("pets", "--net", "code/mynet.py:build", "--out", "configs/new.yaml")
    found = init(capsys, *words, "--weights", "old.pth")
    assert "new head `5` (7 classes in the file)" in found["note"]
    text = (home / "configs" / "new.yaml").read_text(encoding="utf-8")
    assert f"net: ../code/mynet.py:build, weights: {home}/old.pth, head: new" in text and f"path: {home}/pets" in text
    config = load_config("configs/new.yaml")
    assert config.teacher.train is not None and config.teacher.train.lr == 0.01
    found = init(capsys, *words, "--weights", "same.pth", "--force")
    assert "they fit" in found["note"] and load_config("configs/new.yaml").teacher.train is None


NAMES = [
    "2024", "1e5", "0x1F", "null", "true", "no", "2024-05-01", "12:30", "-x", "~tilde", "my images", "fotos\U0001f600",
    "it's", "a:b #c", "{curly}", "x,y", "two\nlines", "cut\u2028line", "[1]", ".5", "b\u00fcro",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_any_name_are_found_by_the_config_and_the_next_command(
    home: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    paint(home / name, 10)
    assert main(["init", f"./{name}", "--net", "resnet8"]) == 0
    said = capsys.readouterr().out
    if name.isprintable():  # others are shown with their control characters escaped
        command = shlex.split(re.search(r"then: (qkd run .*)", said)[1])  # type: ignore[index]
        assert Path(parse(command[1:]).config).is_file()
    (file,) = home.glob("*.yaml")
    config = load_config(file)
    assert config.data.path is not None and config.data.path.resolve() == home / name
    assert re.fullmatch(r"[\w.-]+", config.name)


def loose(folder: Path) -> None:
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")


def one_class(folder: Path) -> None:
    (folder / "cat").mkdir(parents=True)
    for index in range(5):
        Image.new("RGB", (4, 4)).save(folder / "cat" / f"{index}.png")


def damaged(folder: Path) -> None:
    paint(folder, 4)
    (folder / "cat" / "0.jpg").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "has no class folders"),
        (loose, "1 images, but no class folders; put the images of each class into a folder"),
        (one_class, "has only one class (cat)"),
        (damaged, "0.jpg: cannot be read as an image"),
        (lambda folder: (folder / "cat").mkdir(parents=True), "class folder without images"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(home: Path, capsys: pytest.CaptureFixture[str], make: Any, message: str) -> None:
    make(home / "set")
    assert main(["init", "set"]) == 2
    assert message in capsys.readouterr().err
    assert not (home / "set.yaml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "4"], "must be like w4a4"),
        (["--net", "gone.py:build"], "no such file: gone.py"),
        (["--net", "resnet21"], "unknown net 'resnet21'; did you mean"),
        (["--weights", "gone.pth"], "no such weights file"),
    ],
)
def test_options_that_cannot_be_used(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["init", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(home.glob("*.yaml")) == []


def test_gray_images_are_color_to_imagenet_weights(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_net("torchvision/resnet18", classes=1000, channels=3, image_size=64)
    torch.save(made.state_dict(), home / "weights.pth")
    monkeypatch.setattr("qkd.starting.writing.weights_file", lambda *_: home / "weights.pth")
    paint(home / "scans", 10, ((64, 64),), channels=1)
    found = init(capsys, "scans", "--net", "torchvision/resnet18", "--weights", "imagenet")
    assert found["data"]["channels"] == 1
    config = load_config("scans.yaml")
    assert config.data.preprocess == "torchvision/resnet18" and config.teacher.head == "new"
