"""Loading by name: the digits, the division into parts, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from qkd.config import DataConfig
from qkd.data import DATASETS, DataError, MemorySplit, Splits, load_splits
from qkd.testing import write_npz_set


def digits(seed: int = 0, **settings: object) -> Splits:
    return load_splits(DataConfig(name="digits", **settings), seed=seed)  # type: ignore[arg-type]


def keys(split: object) -> list[bytes]:
    assert isinstance(split, MemorySplit)
    return [bytes(image.numpy()) + bytes([label]) for image, label in zip(split.images, split.labels, strict=True)]


def test_every_data_set_of_the_schema_is_known() -> None:
    assert sorted(DATASETS) == ["cifar10", "cifar100", "digits", "fashion-mnist", "folder", "mnist", "npz", "svhn"]


def test_digits_are_real_and_whole() -> None:
    splits = digits()
    assert (splits.channels, splits.image_size, splits.classes) == (1, 8, tuple("0123456789"))
    source = load_digits()
    expected = sorted(
        bytes((image * 255 / 16).round().astype("uint8")) + bytes([label])
        for image, label in zip(source.images, source.target, strict=True)
    )
    assert sorted(keys(splits.train) + keys(splits.val) + keys(splits.test)) == expected


def test_a_fifth_of_every_digit_is_tested() -> None:
    splits = digits(val_fraction=0.0)
    tested, total = torch.bincount(splits.test.labels), torch.bincount(splits.train.labels)
    shares = tested / (tested + total)
    assert len(splits.test) == 359
    assert bool(((shares > 0.19) & (shares < 0.21)).all())


def test_the_test_part_depends_on_no_seed_and_the_others_do() -> None:
    first, again, other = digits(0), digits(0), digits(1)
    assert keys(first.test) == keys(other.test)
    assert keys(first.train) == keys(again.train) and keys(first.val) == keys(again.val)
    assert keys(first.val) != keys(other.val)
    assert first.fingerprint == other.fingerprint


def test_validation_is_stratified_and_disjoint_from_training() -> None:
    splits = digits(val_fraction=0.25)
    assert len(splits.val) == pytest.approx(0.25 * 1438, abs=1)
    shares = torch.bincount(splits.val.labels) / torch.bincount(torch.cat((splits.val.labels, splits.train.labels)))
    assert bool(((shares > 0.24) & (shares < 0.26)).all())
    assert len(digits(val_fraction=0.0).val) == 0


def test_scores_by_batch_statistics_have_a_full_batch() -> None:
    """Otherwise it would show with the first score, after the training."""
    digits(val_fraction=0.1, batch_statistics=128)
    digits(val_fraction=0.0, batch_statistics=359)
    said = "at least one full batch of 200 images, but there are only 144 validation images;"
    with pytest.raises(DataError, match=said):
        digits(val_fraction=0.1, batch_statistics=200)
    with pytest.raises(DataError, match="of 360 images, but there are only 359 test images;"):
        digits(val_fraction=0.0, batch_statistics=360)


def test_train_limit_is_stratified_and_touches_training_only() -> None:
    splits, whole = digits(train_limit=100), digits()
    assert torch.bincount(splits.train.labels).tolist() == pytest.approx([10] * 10, abs=1)
    assert len(splits.train) == 100
    assert set(keys(splits.train)) < set(keys(whole.train))
    assert keys(splits.val) == keys(whole.val)
    assert len(digits(train_limit=10**6).train) == len(whole.train)


def test_mean_and_std_are_those_of_the_training_part() -> None:
    splits = digits(train_limit=200)
    assert isinstance(splits.train, MemorySplit)
    pixels = splits.train.images.double() / 255
    assert splits.mean == pytest.approx((pixels.mean().item(),))
    assert splits.std == pytest.approx((pixels.std(correction=0).item(),))


def test_moving_keeps_the_parts() -> None:
    splits = digits()
    assert splits.to("cpu") is splits
    images, labels = splits.test.batch(torch.tensor([3, 1]), "cpu")
    assert isinstance(splits.test, MemorySplit)
    assert torch.equal(images, splits.test.images[[3, 1]]) and torch.equal(labels, splits.test.labels[[3, 1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "digit"}, "unknown data set 'digit'; did you mean 'digits'"),
        ({"name": "imagenet"}, "known: cifar10"),
        ({"name": "npz"}, "data.path: missing; data set 'npz' needs a folder with train.npz"),
        ({"name": "folder", "path": "no/such/place"}, "no/such/place is not a folder"),
        ({"name": "digits", "image_size": 4}, "digits are 8x8 pixels and can be enlarged, but not reduced to"),
        ({"name": "digits", "train_limit": 5}, "5 images leave 5 of 10 classes without a training image"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_splits(DataConfig(**settings), seed=0)  # type: ignore[arg-type]


def test_sets_in_arrays_are_resized(tmp_path: Path) -> None:
    config = DataConfig(name="npz", path=write_npz_set(tmp_path), image_size=32)
    splits = load_splits(config, seed=0)
    assert (splits.image_size, splits.resize) == (32, "crop")
    splits = digits(image_size=32)
    assert (splits.image_size, splits.resize) == (32, "none")


def test_one_class_cannot_be_learned(tmp_path: Path) -> None:
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=np.ones((6, 4, 4), np.uint8), labels=np.zeros(6, np.int64))
    with pytest.raises(DataError, match="one class"):
        load_splits(DataConfig(name="npz", path=tmp_path), seed=0)
