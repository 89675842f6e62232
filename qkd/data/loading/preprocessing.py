"""Fill in the preprocessing that trained weights expect: mean, std, size and resize rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkd.image_size import height_width

if TYPE_CHECKING:
    from qkd.config import DataConfig


def preprocessed(config: DataConfig) -> DataConfig:
    """Return a data section with the values that ``preprocess`` stands for.

    ``image_size``, ``channels`` and ``resize`` are kept if given. Mean, std, ``resize_size`` and ``interpolation`` are
    those of the weights: a new config that gives any of them, too, is refused. One of an older run is read as it was
    then, so that its images stay the same. A set that is not a folder keeps the size of its images unless
    ``image_size`` is given.

    Args:
        config: The ``data`` section of an experiment.

    Raises:
        qkd.nets.WeightsError: If torchvision has no weights for the net that ``preprocess`` names.
    """
    if config.preprocess is None:
        return config
    from qkd.nets.imagenet import preprocessing_of  # imports torchvision, so only if needed

    wanted = preprocessing_of(config.preprocess)
    values: dict[str, object] = {"mean": wanted.mean, "std": wanted.std, "channels": config.channels or 3}
    if config.name == "folder" or config.image_size is not None:
        size = config.image_size or wanted.image_size
        share = wanted.resize_size / wanted.image_size  # shorter side over center crop, at any size
        values |= {"image_size": size, "interpolation": wanted.interpolation}
        values |= {"resize_size": round(min(height_width(size)) * share)} if config.resize == "crop" else {}
    return config.model_copy(update=values)
