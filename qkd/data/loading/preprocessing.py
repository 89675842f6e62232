"""Fill in the preprocessing that trained weights expect: mean, std, size and resize rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkd.image_size import height_width

if TYPE_CHECKING:
    from qkd.config import DataConfig


def preprocessed(config: DataConfig) -> DataConfig:
    """Return a data section with the values that ``preprocess`` stands for; other given values are kept.

    For a set that is not a folder, only mean and std apply, since its images have a fixed size.

    Args:
        config: The ``data`` section of an experiment.

    Raises:
        qkd.nets.WeightsError: If torchvision has no weights for the net that ``preprocess`` names.
    """
    if config.preprocess is None:
        return config
    from qkd.nets.imagenet import preprocessing_of  # imports torchvision, so only if needed

    wanted = preprocessing_of(config.preprocess)
    values: dict[str, object] = {"mean": wanted.mean, "std": wanted.std}
    if config.name == "folder":
        size = config.image_size or wanted.image_size
        share = wanted.resize_size / wanted.image_size  # shorter side over center crop, at any size
        values |= {"image_size": size, "channels": config.channels or 3, "interpolation": wanted.interpolation}
        values |= {"resize_size": round(min(height_width(size)) * share)} if config.resize == "crop" else {}
    return config.model_copy(update=values)
