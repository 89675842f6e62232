"""Say how large the images of a data set are and how many classes it has, without reading it where that is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qkd.config import DataConfig
from qkd.data.domains import channels_in
from qkd.data.loading.load import load_splits
from qkd.image_size import ImageSize


@dataclass(frozen=True)
class ImageShape:
    """What a net must know of a data set.

    Args:
        classes: How many, at least 2.
        channels: Of an image: 1 or 3.
        image_size: Its side in pixels, or height and width.
    """

    classes: int
    channels: int
    image_size: ImageSize


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

    Args:
        config: The ``data`` section of an experiment.

    Returns:
        Number of classes, channels, and size in pixels.

    Raises:
        DataError: If an npz or a folder cannot be read, or the set is unknown.
        ValueError: If torchvision has no weights for the net that ``preprocess`` names.
        OSError: If a file of the set cannot be read.
    """
    if config.name in PUBLISHED:
        shape = PUBLISHED[config.name]
        if config.name == "digits" and config.image_size is not None:  # which are enlarged
            shape = replace(shape, image_size=config.image_size)
        return replace(shape, channels=channels_in(config.domains or {}, shape.channels))
    splits = load_splits(config, seed=0)
    return ImageShape(len(splits.classes), splits.channels, splits.image_size)
