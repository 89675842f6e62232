"""Folders of images: decoding in process and by workers, sizes, and a refusal that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qkd.config import DataConfig
from qkd.data import DataError, Splits, iterate, load_splits, normalise

COLOURS = {"ant": (200, 10, 10), "bee": (10, 200, 10)}


def paint(
    path: Path, size: tuple[int, int] = (12, 12), colour: tuple[int, int, int] = (9, 9, 9), seed: int = 0
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 40, (size[1], size[0], 3))
    Image.fromarray((noise + np.array(colour)).astype(np.uint8)).save(path)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    for part, count in (("train", 10), ("test", 3)):
        for name, colour in COLOURS.items():
            for index in range(count):
                paint(tmp_path / part / name / f"{index}.png", colour=colour, seed=index)
    return tmp_path


def load(folder: Path, **settings: Any) -> Splits:
    return load_splits(DataConfig(name="folder", path=folder, **settings), seed=0)


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, **settings)
    return str(caught.value)


def test_images_and_classes_are_those_of_the_files(good: Path) -> None:
    splits = load(good, val_fraction=0.2)
    assert (splits.classes, splits.channels, splits.image_size) == (("ant", "bee"), 3, 12)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 4, 6)
    assert torch.bincount(splits.val.labels).tolist() == [2, 2]
    images, labels = splits.test.batch(torch.arange(6), "cpu")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    for index in range(6):
        path = good / "test" / ("ant", "bee")[index // 3] / f"{index % 3}.png"
        assert np.array_equal(images[index].permute(1, 2, 0).numpy(), np.array(Image.open(path)))


def test_mean_and_std_are_those_of_the_training_images(good: Path) -> None:
    splits = load(good)
    pixels = splits.train.batch(torch.arange(len(splits.train)), "cpu")[0].double() / 255
    assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert splits.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())
    out = normalise((pixels * 255).round().to(torch.uint8), splits.mean, splits.std)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_batches_of_one_process_in_the_same_order(good: Path, workers: int) -> None:
    train = load(good).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(5))
    before = torch.get_rng_state()
    alone = list(iterate(train, order, 4, "cpu", drop_last=False))
    together = list(iterate(train, order, 4, "cpu", drop_last=False, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(alone) == len(together) == 5
    for (images, labels), (other_images, other_labels) in zip(alone, together, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_grey_images_stay_grey_unless_one_is_in_colour(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in "ab":
            for index in range(3):
                paint(tmp_path / part / name / f"{index}.png", seed=index)
                path = tmp_path / part / name / f"{index}.png"
                Image.open(path).convert("L").save(path)
    assert load(tmp_path).channels == 1
    assert load(tmp_path).train.batch(torch.tensor([0]), "cpu")[0].shape == (1, 1, 12, 12)
    paint(tmp_path / "test" / "a" / "0.png")
    assert load(tmp_path).channels == 3


def test_images_are_resized_and_cropped_to_the_size_asked_for(good: Path) -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 255  # the middle square, which the crop keeps
    Image.fromarray(wide).save(good / "train" / "ant" / "0.png")
    splits = load(good, image_size=10, val_fraction=0.0)
    assert splits.image_size == 10
    image = splits.train.batch(torch.tensor([0]), "cpu")[0][0]
    assert image.shape == (3, 10, 10)
    assert int(image[:, :, 1:-1].min()) == 255


def test_the_fingerprint_is_of_names_and_sizes(good: Path, tmp_path: Path) -> None:
    before = load(good).fingerprint
    assert load(good).fingerprint == before
    (good / "train" / "ant" / "0.png").rename(good / "train" / "ant" / "x.png")
    assert load(good).fingerprint != before


def test_mixed_sizes_need_a_size(good: Path) -> None:
    paint(good / "train" / "bee" / "9.png", size=(13, 12))
    text = refusal(good)
    assert "9.png: is 13x12, but" in text and "set data.image_size" in text
    assert load(good, image_size=12).image_size == 12


def test_images_that_are_not_square_need_a_size(tmp_path: Path) -> None:
    for part in ("train", "test"):
        paint(tmp_path / part / "a" / "0.png", size=(14, 12))
    assert "is 14x12, not square; set data.image_size" in refusal(tmp_path)


@pytest.mark.parametrize("image_size", [None, 8])
def test_a_file_that_is_no_image_is_named_at_once(good: Path, image_size: int | None) -> None:
    (good / "train" / "bee" / "4.png").write_text("not an image")
    assert "4.png: cannot be read as an image" in refusal(good, image_size=image_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_when_it_is_decoded(good: Path, workers: int) -> None:
    splits = load(good)
    broken = good / "test" / "bee" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    batches = iterate(splits.test, torch.arange(6), 2, "cpu", drop_last=False, workers=workers)
    with pytest.raises(DataError, match=r"2\.png: cannot be read as an image .*replace or delete it"):
        list(batches)


def test_images_of_sixteen_bits_are_refused(good: Path) -> None:
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(good / "train" / "ant" / "1.png")
    assert "not 8 bit a channel" in refusal(good)


def test_an_empty_class_folder_is_named(good: Path) -> None:
    (good / "train" / "cat").mkdir()
    (good / "train" / "cat" / "notes.txt").write_text("none yet")
    assert "cat: class folder without images" in refusal(good)


def test_a_class_that_is_tested_but_never_trained_is_named(good: Path) -> None:
    paint(good / "test" / "cow" / "0.png")
    assert "classes ['cow'] are not in" in refusal(good)


def test_missing_parts_are_named(good: Path) -> None:
    (good / "test").rename(good / "validation")
    assert "test: no such folder" in refusal(good)
    (good / "test").mkdir()
    assert "test: has no class folders" in refusal(good)
