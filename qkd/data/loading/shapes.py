"""The image size and number of classes of a data set, without reading the set if they are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qkd.config import DataConfig
from qkd.data.domains import channels_in
from qkd.data.loading.load import load_splits
from qkd.data.loading.preprocessing import preprocessed
from qkd.image_size import ImageSize


@dataclass(frozen=True)
class ImageShape:
    """The facts about a data set that a net is built from.

    Args:
        classes: Number of classes, at least 2.
        channels: Channels of an image: 1 or 3.
        image_size: Side of an image in pixels, or height and width.
    """

    classes: int
    channels: int
    image_size: ImageSize


# As published; the shapes of the other sets (npz, folder) depend on their files.
PUBLISHED = {
    "cifar10": ImageShape(10, 3, 32),
    "cifar100": ImageShape(100, 3, 32),
    "digits": ImageShape(10, 1, 8),
    "fashion-mnist": ImageShape(10, 1, 28),
    "mnist": ImageShape(10, 1, 28),
    "svhn": ImageShape(10, 3, 32),
}


def image_shape(config: DataConfig) -> ImageShape:
    """Return the image shape and number of classes of a data set; only npz files and folders are read for this.

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
        config = preprocessed(config)
        shape = PUBLISHED[config.name]
        size, channels = config.image_size or shape.image_size, config.channels or shape.channels
        return replace(shape, image_size=size, channels=channels_in(config.domains or {}, channels))
    splits = load_splits(config, seed=0)
    return ImageShape(len(splits.classes), splits.channels, splits.image_size)
