"""NumPy archives: what is read, and a clear refusal of everything that could spoil a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qkd.config import DataConfig
from qkd.data import DataError, MemorySplit, Splits, load_splits

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3


def write(folder: Path, part: str = "train", **arrays: npt.ArrayLike) -> None:
    np.savez(folder / f"{part}.npz", **arrays)  # type: ignore[arg-type]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write(tmp_path, "train", images=IMAGES, labels=LABELS)
    write(tmp_path, "test", images=IMAGES[:9], labels=LABELS[:9])
    return tmp_path


def load(folder: Path, **settings: Any) -> Splits:
    return load_splits(DataConfig(name="npz", path=folder, **settings), seed=0)


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_colour_images_are_read_channels_first(good: Path) -> None:
    splits = load(good, val_fraction=0.0)
    assert isinstance(splits.train, MemorySplit) and isinstance(splits.test, MemorySplit)
    assert (splits.channels, splits.image_size, splits.classes) == (3, 6, ("0", "1", "2"))
    assert np.array_equal(splits.train.images.permute(0, 2, 3, 1).numpy(), IMAGES)
    assert np.array_equal(splits.test.labels.numpy(), LABELS[:9])
    assert splits.mean == pytest.approx(tuple(IMAGES.mean((0, 1, 2)) / 255))
    assert splits.std == pytest.approx(tuple(IMAGES.std((0, 1, 2)) / 255))


@pytest.mark.parametrize("shape", [(30, 6, 6), (30, 6, 6, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_grey_images_and_any_integers_are_read(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, images=IMAGES[..., 0].reshape(shape), labels=LABELS.astype(dtype))
    splits = load(tmp_path)
    assert splits.channels == 1
    assert splits.train.labels.dtype == torch.int64
    assert splits.train.batch(torch.tensor([0]), "cpu")[0].shape == (1, 1, 6, 6)


def test_class_names_come_from_the_json_file(good: Path) -> None:
    (good / "classes.json").write_text(json.dumps(["cat", "dog", "eel", "fox"]))
    assert load(good).classes == ("cat", "dog", "eel", "fox")


def test_a_channel_that_never_changes_does_not_divide_by_zero(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, images=np.full_like(IMAGES, 7), labels=LABELS)
    assert load(tmp_path).std == (1 / 255,) * 3


def test_the_fingerprint_changes_with_a_pixel_a_label_and_a_name(good: Path) -> None:
    before = load(good).fingerprint
    assert load(good).fingerprint == before
    changed = IMAGES.copy()
    changed[4, 3, 2, 1] ^= 1
    write(good, "train", images=changed, labels=LABELS)
    pixel = load(good).fingerprint
    write(good, "train", images=IMAGES, labels=LABELS[::-1])
    label = load(good).fingerprint
    write(good, "train", images=IMAGES, labels=LABELS)
    (good / "classes.json").write_text(json.dumps(["cat", "dog", "eel"]))
    assert len({before, pixel, label, load(good).fingerprint}) == 4


BROKEN_IMAGES = IMAGES / 255
BROKEN_IMAGES[0, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "array images missing, found ['labels']"),
        ({"images": IMAGES, "y": LABELS}, "array labels missing"),
        ({"images": IMAGES / 255, "labels": LABELS}, "must be uint8 (0..255), found float64"),
        ({"images": BROKEN_IMAGES, "labels": LABELS}, "1 of its values are NaN or infinite"),
        ({"images": IMAGES.astype(np.int64), "labels": LABELS}, "must be uint8 (0..255), found int64"),
        ({"images": IMAGES[:, None], "labels": LABELS}, "must be [n, height, width] or"),
        ({"images": IMAGES[:, 0, 0], "labels": LABELS}, "must be [n, height, width]"),
        ({"images": np.moveaxis(IMAGES, 3, 1), "labels": LABELS}, "(channels last), found [30, 3, 6, 6]"),
        ({"images": IMAGES[:, :5], "labels": LABELS}, "must be square, found 5x6"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "`images` is empty"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "`labels` must be integers, found float64"),
        ({"images": IMAGES, "labels": LABELS > 0}, "`labels` must be integers, found bool"),
        ({"images": IMAGES, "labels": LABELS[:29]}, "found labels [29] for 30 images"),
        ({"images": IMAGES, "labels": LABELS.reshape(30, 1)}, "found labels [30, 1] for 30 images"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels must be 0..1 (2 classes), found -1..1"),
        ({"images": IMAGES, "labels": np.array([{"a": 1}] * 30)}, "holds pickled objects"),
        ({"images": np.array([None] * 30), "labels": LABELS}, "holds pickled objects"),
    ],
)
def test_broken_arrays_are_refused(good: Path, arrays: dict[str, npt.NDArray[Any]], message: str) -> None:
    write(good, "train", **arrays)
    text = refusal(good)
    assert message in text
    assert "train.npz" in text


def test_labels_beyond_the_names_are_refused(good: Path) -> None:
    (good / "classes.json").write_text(json.dumps(["cat", "dog"]))
    assert "labels must be 0..1 (2 classes), found 0..2" in refusal(good)


def test_labels_of_the_test_part_beyond_training_are_refused(good: Path) -> None:
    write(good, "test", images=IMAGES[:9], labels=np.full(9, 3))
    assert "test.npz: labels must be 0..2" in refusal(good)


def test_a_class_that_is_tested_but_never_trained_is_refused(good: Path) -> None:
    (good / "classes.json").write_text(json.dumps(["cat", "dog", "eel", "fox"]))
    write(good, "test", images=IMAGES[:9], labels=np.full(9, 3))
    assert "classes [3] are in test.npz but not in train.npz" in refusal(good)


def test_parts_of_different_size_are_refused(good: Path) -> None:
    write(good, "test", images=IMAGES[:9, :4, :4], labels=LABELS[:9])
    assert "images of train.npz are 6x6x3 and those of test.npz 4x4x3" in refusal(good)


@pytest.mark.parametrize("text", ["{", '{"0": "cat"}', "[]", "[1, 2, 3]", '["a", "a", "b"]'])
def test_broken_class_names_are_refused(good: Path, text: str) -> None:
    (good / "classes.json").write_text(text)
    assert "classes.json" in refusal(good)


def test_a_missing_file_is_named(good: Path) -> None:
    (good / "test.npz").unlink()
    assert "test.npz: no such file; needs train.npz and test.npz" in refusal(good)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.999])
def test_a_truncated_archive_is_named(good: Path, keep: float) -> None:
    path = good / "train.npz"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    assert "train.npz: damaged or no NumPy archive" in refusal(good)


def test_an_altered_archive_is_named(good: Path) -> None:
    data = bytearray((good / "train.npz").read_bytes())
    data[1000] ^= 255  # inside the pixels: the archive's own check sum tells
    (good / "train.npz").write_bytes(data)
    assert "train.npz: damaged or no NumPy archive" in refusal(good)


def test_a_plain_pickle_is_refused(good: Path) -> None:
    np.save(good / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (good / "train.npz").write_bytes((good / "x.npy").read_bytes())
    assert "train.npz: damaged or no NumPy archive" in refusal(good)
    (good / "train.npz").write_bytes(b"\x80\x04N.")
    assert "train.npz: is a pickle, which is never opened" in refusal(good)


def test_another_size_than_configured_is_refused(good: Path) -> None:
    with pytest.raises(DataError, match="only a folder of images is resized"):
        load(good, image_size=32)
