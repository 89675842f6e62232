"""Scikit-learn's handwritten digits: 1,797 real 8x8 gray images that come with the library, no download."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qkd.data.splits import MemorySplit, Parts

TEST_EVERY = 5  # one of five images of each class: a test part of 20 %
CLASSES = tuple(str(digit) for digit in range(10))
SIDE = 8  # pixels, as they come


def load_digits_splits(side: int = SIDE) -> Parts:
    """Return the parts of the digits, pixel values 0..16 spread over 0..255.

    The test part is the middle one of every five images of a class, in the set's own order: fixed, stratified, and
    drawn from no random stream, so that it is the same for every seed, library version and machine.

    Args:
        side: Of the images in pixels, 8 or a multiple of it. Larger images are interpolated (bilinear): the weights are
            binary fractions for powers of two, so that pixels are the same everywhere.

    Returns:
        Both parts, images uint8 ``[n, 1, side, side]``, and the classes ``0`` to ``9``.

    Raises:
        ValueError: If ``side`` is no multiple of 8.

    References:
        Alpaydin, Kaynak, `Optical Recognition of Handwritten Digits <https://doi.org/10.24432/C50P49>`_, 1998.
    """
    if side < SIDE or side % SIDE:
        raise ValueError(f"side must be a multiple of {SIDE} pixels, got {side=}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = _enlarged(torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1), side)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    is_test = every_nth_of_each_class(labels, TEST_EVERY)
    train, test = (MemorySplit(images[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return Parts(train, test, CLASSES)


def _enlarged(images: Tensor, side: int) -> Tensor:
    """Return images with another side in pixels, uint8 as they are."""
    if side == SIDE:
        return images
    return functional.interpolate(images.float(), size=(side, side), mode="bilinear").round().to(torch.uint8)


def every_nth_of_each_class(labels: Tensor, n: int) -> Tensor:
    """Return a mask, bool, over all labels: true at the middle one of every ``n`` images of a class."""
    is_chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        is_chosen[members[n // 2 :: n]] = True
    return is_chosen
