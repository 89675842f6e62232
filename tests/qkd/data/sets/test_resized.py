"""Sets in memory or in rows of a file, resized: the same pixels as the same images in a folder."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qkd.config import DataConfig
from qkd.data import DataError, MemorySplit, Splits, load_splits, read_facts
from qkd.data.loading.shapes import image_shape
from qkd.data.sets import resampling
from qkd.data.sets.rows import ArraySplit

COUNT, CLASSES = 12, 3
LABELS = np.arange(COUNT) % CLASSES
FORMS: list[dict[str, Any]] = [
    {"image_size": 32},
    {"image_size": 5},
    {"image_size": [20, 31], "resize": "pad"},
    {"image_size": [20, 31], "resize": "stretch", "interpolation": "bicubic"},
    {"image_size": [20, 31], "resize": "crop"},
    {"image_size": 24, "resize_size": 30, "interpolation": "bicubic"},
    {"image_size": 17, "resize": "pad"},  # which they have: the rule is for images of other sizes
    {"image_size": 9, "channels": 1},
    {"image_size": 9, "channels": 3},
    {"channels": 1},
    {"channels": 3},
    {"image_size": 24, "preprocess": "torchvision/efficientnet_b0"},  # bicubic, and a center crop
]


def write(folder: Path, images: np.ndarray[Any, Any]) -> Path:
    """Write a set twice: as archives, and as a folder of PNG files."""
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", images=images, labels=LABELS)
        for number, (image, label) in enumerate(zip(images, LABELS, strict=True)):
            path = folder / part / str(label) / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def load(folder: Path, name: str, **settings: Any) -> Splits:
    return load_splits(DataConfig(name=name, path=folder, val_fraction=0, **settings), seed=0)


def by_class(splits: Splits) -> torch.Tensor:
    """Return all training images, ordered as a folder has them: by class, then by number."""
    order = splits.train.labels.argsort(stable=True)
    return splits.train.batch(order, "cpu")[0]


def test_a_resize_size_that_is_not_used_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, np.zeros((COUNT, 17, 17, 3), np.uint8))
    said = "data.resize_size: not used, because the images have the target size already"
    assert said in load(folder, "npz", image_size=17, resize_size=20).notes
    assert said not in load(folder, "npz", image_size=17).notes
    assert said not in load(folder, "npz", image_size=16, resize_size=20).notes
    assert said not in load(folder, "folder", image_size=17, resize_size=20).notes


@pytest.mark.parametrize("channels", [True, False, 2, "1"])
def test_channels_are_one_or_three(channels: object) -> None:
    with pytest.raises(ValueError, match="channels"):
        DataConfig(name="digits", channels=channels)  # type: ignore[arg-type]


@pytest.fixture(params=["gray", "color"])
def images(request: pytest.FixtureRequest) -> np.ndarray[Any, Any]:
    shape = (COUNT, 17, 17) if request.param == "gray" else (COUNT, 17, 17, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pixels_are_those_of_a_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: np.ndarray[Any, Any],
    form: dict[str, Any],
    is_large: bool,
    is_compiled: bool,
) -> None:
    write(tmp_path, images)
    if not is_compiled:
        monkeypatch.setattr(resampling, "load", lambda: None)
    if is_large:
        for module in ("archive", "arrays", "resized"):
            monkeypatch.setattr(f"qkd.data.sets.{module}.IN_MEMORY_BYTES", 0)
    found, wanted = load(tmp_path, "npz", **form), load(tmp_path, "folder", **form)
    is_kept = (found.channels, found.image_size) == (3 if images.ndim == 4 else 1, 17)
    assert isinstance(found.train, ArraySplit if is_large else MemorySplit)
    assert torch.equal(by_class(found), by_class(wanted))
    assert (found.channels, found.image_size) == (wanted.channels, wanted.image_size)
    assert found.resize == (wanted.resize if "image_size" in form else "none")
    assert found.train.decodes == (is_large and not is_kept)
    assert found.mean == pytest.approx(wanted.mean) and found.std == pytest.approx(wanted.std)


def test_a_part_of_resized_rows_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, np.random.default_rng(1).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8))
    whole = load(tmp_path, "npz", image_size=12).train
    for module in ("archive", "arrays", "resized"):
        monkeypatch.setattr(f"qkd.data.sets.{module}.IN_MEMORY_BYTES", 0)
    rows = torch.tensor([7, 3, 3, 0])
    part = load(tmp_path, "npz", image_size=12).train.subset(rows)
    assert torch.equal(part.batch(torch.tensor([1, 0]), "cpu")[0], whole.batch(torch.tensor([3, 7]), "cpu")[0])
    assert torch.equal(part.labels, whole.labels[rows])


def test_another_process_reads_rows_of_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, np.random.default_rng(5).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8))
    for module in ("archive", "arrays", "resized"):
        monkeypatch.setattr(f"qkd.data.sets.{module}.IN_MEMORY_BYTES", 0)
    part = load(tmp_path, "npz", image_size=12).train
    copy = pickle.loads(pickle.dumps(part))  # noqa: S301 - our own, as multiprocessing sends it
    rows = torch.arange(COUNT)
    assert torch.equal(copy.batch(rows, "cpu")[0], part.batch(rows, "cpu")[0])
    with (tmp_path / "train.npz").open("ab") as file:
        file.write(b"more")
    late = pickle.loads(pickle.dumps(part))  # noqa: S301
    with pytest.raises(DataError, match="was modified while it was in use"):
        late.batch(rows, "cpu")


def test_facts_are_of_the_set_as_published(tmp_path: Path) -> None:
    write(tmp_path, np.random.default_rng(2).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8))
    assert load(tmp_path, "npz", image_size=12).facts == read_facts(DataConfig(name="npz", path=tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion-mnist", "svhn"])
def test_shapes_of_published_sets_follow_the_config(name: str) -> None:
    shape = image_shape(DataConfig(name=name, image_size=[40, 24], channels=3))
    assert (shape.channels, shape.image_size) == (3, (40, 24))


def test_preprocess_makes_gray_sets_color_and_keeps_their_size() -> None:
    shape = image_shape(DataConfig(name="fashion-mnist", preprocess="torchvision/resnet18"))
    assert (shape.channels, shape.image_size) == (3, 28)
    splits = load_splits(DataConfig(name="digits", preprocess="torchvision/resnet18"), seed=0)
    assert (splits.image_shape, len(splits.mean)) == ((3, 8, 8), 3)


def test_domains_with_a_color_refuse_gray(tmp_path: Path) -> None:
    write(tmp_path, np.random.default_rng(3).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8))
    domains = {"plain": {}, "red": {"color": [1, 0, 0]}}
    with pytest.raises(DataError, match="data.channels: 1, but `domains` with a color have 3"):
        load(tmp_path, "npz", channels=1, domains=domains, unseen_domain="red")
    assert load(tmp_path, "npz", channels=3, image_size=10, domains=domains, unseen_domain="red").channels == 3


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=np.zeros((COUNT, 1, 100), np.uint8), labels=LABELS)
    with pytest.raises(DataError, match=r"data.image_size: images of 1x100 would be resized to 4,096x409,600 pixels"):
        load(tmp_path, "npz", image_size=4096)
    assert load(tmp_path, "npz", image_size=[2, 100], resize="stretch").image_size == (2, 100)
