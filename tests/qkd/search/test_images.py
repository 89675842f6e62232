"""The images of a search: out of the training images alone, stratified, disjoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkd.config import SearchConfig
from qkd.data import MemorySplit, Split
from qkd.search import search_splits
from qkd.search.images import JoinedSplit, join, without_validation
from qkd.testing import synthetic_images, synthetic_splits


class Poisoned:
    """A test part that may not even be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the test images were touched: {name}")


def images(split: Split) -> list[bytes]:
    if not len(split):
        return []
    return [image.numpy().tobytes() for image in split.batch(torch.arange(len(split)), "cpu")[0]]


def numbered(count: int, first: int) -> MemorySplit:
    """Return images that are all different, of four classes."""
    values = torch.arange(first, first + count)
    pixels = torch.stack([values // 256, values % 256], 1).view(-1, 1, 2, 1).expand(-1, 1, 2, 2)
    return MemorySplit(pixels.to(torch.uint8), values % 4)


def splits_of(train: int, val: int) -> Any:
    splits = synthetic_splits()
    splits.train, splits.val, splits.test = numbered(train, 0), numbered(val, 1000), Poisoned()
    return splits


@pytest.mark.parametrize(("train_images", "val_images", "found"), [
    (40, None, (40, 20)), (4000, None, (80, 20)), (40, 12, (40, 12)), (40, 60, (40, 60)), (40, 20, (40, 20))
])  # fmt: skip
def test_sizes_and_where_images_come_from(train_images: int, val_images: int | None, found: tuple[int, int]) -> None:
    splits = splits_of(80, 20)
    made = search_splits(splits, SearchConfig(train_images=train_images, val_images=val_images), seed=0)
    assert (len(made.train), len(made.val)) == found and len(made.test) == 0
    train, val = set(images(made.train)), set(images(made.val))
    assert len(train) == found[0] and len(val) == found[1] and not train & val
    assert train <= set(images(splits.train)) and val <= set(images(splits.train)) | set(images(splits.val))
    assert torch.bincount(made.train.labels).tolist() == [found[0] // 4] * 4
    assert (made.mean, made.std) == (splits.mean, splits.std)
    assert len(without_validation(made).val) == 0 and images(without_validation(made).train) == images(made.train)


def test_the_seed_divides() -> None:
    settings = SearchConfig(train_images=40, val_images=30)
    first, again, other = (search_splits(splits_of(80, 20), settings, seed=seed) for seed in (0, 0, 1))
    assert images(first.train) == images(again.train) and images(first.val) == images(again.val)
    assert images(first.train) != images(other.train)


def test_what_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match=r"search\.val_images: 61 are requested, but there are 60: 20 of data\.val"):
        search_splits(splits_of(80, 20), SearchConfig(train_images=40, val_images=61), seed=0)
    with pytest.raises(ValueError, match=r"needs validation images: set search\.val_images"):
        search_splits(splits_of(80, 0), SearchConfig(train_images=40), seed=0)
    with pytest.raises(ValueError, match=r"search\.train_images: 2 images leave 2 classes"):
        search_splits(splits_of(80, 20), SearchConfig(train_images=2), seed=0)


def test_two_parts_as_one() -> None:
    first, second = (MemorySplit(*synthetic_images(count, seed=count)) for count in (5, 7))
    plain, joined = join(first, second), JoinedSplit(first, second)
    assert isinstance(plain, MemorySplit) and len(plain) == len(joined) == 12
    for indices in (torch.tensor([11, 0, 4, 5, 5, 10]), torch.tensor([6]), torch.tensor([3, 1])):
        for a, b in zip(plain.batch(indices, "cpu"), joined.batch(indices, "cpu"), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(plain.labels, joined.labels)
    assert images(joined.subset(torch.tensor([1, 7]))) == images(plain.subset(torch.tensor([1, 7])))
    assert join(first, second.subset(torch.zeros(0, dtype=torch.int64))) is first
