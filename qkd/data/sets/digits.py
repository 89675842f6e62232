"""Scikit-learn's handwritten digits: 1,797 real 8x8 gray images that come with the library, enlarged on request."""

from __future__ import annotations

import torch
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.splits import MemorySplit, Parts
from qkd.image_size import ImageSize, height_width, size_text

SIDE = 8  # pixels, as the set has them
TEST_EVERY = 5  # one of five images of each class: a test part of 20 %
CLASSES = tuple(str(digit) for digit in range(10))


def load_digits_splits(image_size: ImageSize = SIDE) -> Parts:
    """Return the parts of the digits, pixel values 0..16 spread over 0..255.

    The test part is the middle one of every five images of a class, in the set's own order: fixed, stratified, and
    drawn from no random stream, so that it is the same for every seed, library version and machine.

    Args:
        image_size: Pixels that the images are enlarged to, bilinearly: a side or ``(height, width)``. A net that is
            measured on 8x8 pixels spends most of its time on overhead.

    Returns:
        Both parts, images uint8 ``[n, 1, height, width]``, and the classes ``0`` to ``9``.

    Raises:
        DataError: If ``image_size`` is smaller than the images are.

    References:
        Alpaydin, Kaynak, `Optical Recognition of Handwritten Digits <https://doi.org/10.24432/C50P49>`_, 1998.
    """
    height, width = height_width(image_size)
    if min(height, width) < SIDE:
        raise DataError(
            f"data.image_size: digits are {SIDE}x{SIDE} pixels and can be enlarged, not reduced to "
            f"{size_text(image_size)}; set it to {SIDE} or more, or leave it out"
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

    In whole numbers, so that every machine and version gets the same pixels; halves are rounded up.

    Args:
        images: int64, shape ``[..., pixels]``, values 0..255.
        side: Pixels of the last axis afterward, at least as many as there are.

    Returns:
        int64, shape ``[..., side]``; ``images`` themselves where nothing changes.
    """
    pixels = images.shape[-1]
    if side == pixels:
        return images
    # center of pixel i in units of 1 / (2 side) of an old pixel, held within the first and last old center
    place = (torch.arange(side) * 2 * pixels + pixels - side).clamp(0, 2 * side * (pixels - 1))
    left = torch.div(place, 2 * side, rounding_mode="floor")
    share = place - 2 * side * left
    right = (left + 1).clamp(max=pixels - 1)
    total = images[..., left] * (2 * side - share) + images[..., right] * share
    return torch.div(total + side, 2 * side, rounding_mode="floor")


def every_nth_of_each_class(labels: Tensor, n: int) -> Tensor:
    """Return a mask, bool, over all labels: true at the middle one of every ``n`` images of a class."""
    is_chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        is_chosen[members[n // 2 :: n]] = True
    return is_chosen
