"""Scikit-learn's handwritten digits: 1,797 real 8x8 gray images that ship with the library, enlarged on request."""

from __future__ import annotations

import torch
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.splits import MemorySplit, Parts
from qkd.image_size import ImageSize, height_width, size_text

SIDE = 8  # pixels, as published
TEST_EVERY = 5  # one in five images of each class: a test part of 20 %
CLASSES = tuple(str(digit) for digit in range(10))


def load_digits_splits(image_size: ImageSize = SIDE) -> Parts:
    """Return the parts of the digits, with pixel values 0..16 scaled to 0..255.

    The test part is the middle one of every five images of a class, in the set's order. It is stratified and not
    random, so it is the same for every seed, library version and machine.

    Args:
        image_size: Size in pixels that the images are enlarged to, bilinearly: a side or ``(height, width)``. On 8x8
            pixels, a net spends most of its time on overhead.

    Returns:
        Both parts, images uint8 ``[n, 1, height, width]``, and the classes ``0`` to ``9``.

    Raises:
        DataError: If ``image_size`` is smaller than the images.

    References:
        Alpaydin, Kaynak, `Optical Recognition of Handwritten Digits <https://doi.org/10.24432/C50P49>`_, 1998.
    """
    height, width = height_width(image_size)
    if min(height, width) < SIDE:
        raise DataError(
            f"data.image_size: digits are {SIDE}x{SIDE} pixels and can be enlarged, but not reduced to "
            f"{size_text(image_size)}; set it to {SIDE} or more, or omit it"
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.int64)
    images = enlarged(enlarged(images, width).transpose(1, 2), height).transpose(1, 2).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    is_test = every_nth_of_each_class(labels, TEST_EVERY)
    train, test = (MemorySplit(images[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return Parts(train, test, CLASSES)


def enlarged(images: Tensor, side: int) -> Tensor:
    """Return images with their last axis resampled to ``side`` pixels, linearly, with half-pixel centers.

    It computes with integers, so that every machine and version gets the same pixels; halves are rounded up.

    Args:
        images: int64, shape ``[..., pixels]``, values 0..255.
        side: Size of the last axis afterward, at least its current size.

    Returns:
        int64, shape ``[..., side]``; ``images`` itself if nothing changes.
    """
    pixels = images.shape[-1]
    if side == pixels:
        return images
    # center of pixel i in units of 1 / (2 side) of an old pixel, clamped to the first and last old center
    place = (torch.arange(side) * 2 * pixels + pixels - side).clamp(0, 2 * side * (pixels - 1))
    left = torch.div(place, 2 * side, rounding_mode="floor")
    share = place - 2 * side * left
    right = (left + 1).clamp(max=pixels - 1)
    total = images[..., left] * (2 * side - share) + images[..., right] * share
    return torch.div(total + side, 2 * side, rounding_mode="floor")


def every_nth_of_each_class(labels: Tensor, n: int) -> Tensor:
    """Return a bool mask over all labels, true for the middle one of every ``n`` images of a class."""
    is_chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        is_chosen[members[n // 2 :: n]] = True
    return is_chosen
