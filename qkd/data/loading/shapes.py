"""Say how large the images of a data set are and how many classes it has, without reading it where that is known."""

from __future__ import annotations

from dataclasses import dataclass

from qkd.config import DataConfig
from qkd.data.loading.load import load_splits


@dataclass(frozen=True)
class ImageShape:
    """What a net must know of a data set: number of classes, channels of an image, its side in pixels."""

    classes: int
    channels: int
    image_size: int


# As published; the other sets (npz, folder) are what their files are.
PUBLISHED = {
    "cifar10": ImageShape(10, 3, 32),
    "cifar100": ImageShape(100, 3, 32),
    "digits": ImageShape(10, 1, 8),
    "fashion-mnist": ImageShape(10, 1, 28),
    "mnist": ImageShape(10, 1, 28),
    "svhn": ImageShape(10, 3, 32),
}


def image_shape(config: DataConfig) -> ImageShape:
    """Return the shape of a data set's images, and its classes; only npz and folders are read for it.

    Raises:
        DataError: If an npz or a folder cannot be read, or the set is unknown.
    """
    if config.name in PUBLISHED:
        return PUBLISHED[config.name]
    splits = load_splits(config, seed=0)
    return ImageShape(len(splits.classes), splits.channels, splits.image_size)
