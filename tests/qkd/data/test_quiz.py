"""The quiz: out of the training images, stratified, seeded, and told by the fingerprint."""

from __future__ import annotations

import pytest
import torch

from qkd.data import MemorySplit, Split, Splits, take_quiz
from qkd.testing import synthetic_splits


@pytest.fixture(scope="module")
def splits() -> Splits:
    return synthetic_splits(train=80, val=8)


def rows(split: Split) -> set[bytes]:
    images, labels = split.batch(torch.arange(len(split)), "cpu")
    return {image.numpy().tobytes() + bytes([int(label)]) for image, label in zip(images, labels, strict=True)}


def test_every_image_is_on_one_side(splits: Splits) -> None:
    taken = take_quiz(splits, 20, seed=0)
    assert taken.quiz is not None and (len(taken.quiz), len(taken.train)) == (20, 60)
    assert not rows(taken.quiz) & rows(taken.train)
    assert rows(taken.quiz) | rows(taken.train) == rows(splits.train)
    assert torch.bincount(taken.quiz.labels).tolist() == [5, 5, 5, 5]
    assert (taken.val, taken.test, taken.mean, taken.std) == (splits.val, splits.test, splits.mean, splits.std)
    assert splits.quiz is None and len(splits.train) == 80


def test_seed_and_size_choose_it_and_the_fingerprint_tells(splits: Splits) -> None:
    one, again, other, larger = (
        take_quiz(splits, images, seed=seed) for images, seed in ((20, 0), (20, 0), (20, 1), (24, 0))
    )
    assert one.quiz is not None and again.quiz is not None and other.quiz is not None
    assert rows(one.quiz) == rows(again.quiz) != rows(other.quiz)
    assert one.fingerprint == again.fingerprint
    assert len({splits.fingerprint, one.fingerprint, other.fingerprint, larger.fingerprint}) == 4


def test_it_moves_along(splits: Splits) -> None:
    taken = take_quiz(splits, 20, seed=0).to("meta")
    assert isinstance(taken.quiz, MemorySplit) and taken.quiz.images.device.type == "meta"


@pytest.mark.parametrize("images", [0, 3, 77, 80, 999])
def test_a_class_lacks_on_one_side(splits: Splits, images: int) -> None:
    with pytest.raises(ValueError, match=f"quiz_images: {images} of 80 training images leave . of 4 classes"):
        take_quiz(splits, images, seed=0)


def test_one_quiz_is_enough(splits: Splits) -> None:
    with pytest.raises(ValueError, match="a quiz of 20 images has already been held out"):
        take_quiz(take_quiz(splits, 20, seed=0), 20, seed=0)
