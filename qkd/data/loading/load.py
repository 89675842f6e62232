"""Data sets by name: loads one, checks it, and keeps a validation part back from its training images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from qkd.data.errors import DataError
from qkd.data.labels import class_notes
from qkd.data.loading.facts import DataFacts, facts_of
from qkd.data.sampling import stratified_quotas, take_quotas
from qkd.data.sets import (
    list_folder,
    load_digits_splits,
    load_folder_splits,
    load_npz_splits,
    load_vision_splits,
)
from qkd.data.splits import Parts, Split, Splits
from qkd.data.statistics import channel_statistics
from qkd.foreign import nearest

if TYPE_CHECKING:
    from pathlib import Path

    from qkd.config import DataConfig


def _digits(config: DataConfig) -> Parts:
    return load_digits_splits()


def _vision(config: DataConfig) -> Parts:
    return load_vision_splits(config.name, config.root, download=config.download)


def _npz(config: DataConfig) -> Parts:
    return load_npz_splits(_folder_of(config, "train.npz and test.npz"))


def _folder(config: DataConfig) -> Parts:
    return load_folder_splits(_folder_of(config, "train/<class>/ and test/<class>/"), config.image_size)


DATASETS: dict[str, Callable[[DataConfig], Parts]] = {
    "cifar10": _vision,
    "cifar100": _vision,
    "digits": _digits,
    "fashion-mnist": _vision,
    "folder": _folder,
    "mnist": _vision,
    "npz": _npz,
    "svhn": _vision,
}


def load_splits(config: DataConfig, seed: int) -> Splits:
    """Load a data set and divide it: train and validation from its training images, test as it comes.

    The validation part and, after it, the part that ``train_limit`` keeps are stratified by class and drawn from
    ``seed``; the test part never depends on it. Every class keeps at least one training image.

    Args:
        config: The ``data`` section of an experiment.
        seed: Of the division, not negative.

    Returns:
        The three parts, with classes, shape, mean and standard deviation per channel (fractions 0..1), and a
        fingerprint.

    Raises:
        DataError: If the set is unknown, missing, damaged or inconsistent, or the division leaves a class untrained.
        OSError: If a file of the set cannot be read.
    """
    _require_known(config.name)
    parts = DATASETS[config.name](config)
    everything, test, classes, notes = parts
    if len(classes) < 2:
        raise DataError(f"data: every image of {config.name!r} is of one class ({classes[0]}); needs two at least")
    notes = (*notes, *class_notes(everything.labels, test.labels, classes))
    generator = torch.Generator().manual_seed(seed)
    train, val = _keep_back(everything, config.val_fraction, generator)
    train = _limit(train, config.train_limit, len(classes), generator)
    channels, image_size = _shape(everything)
    _check_size(config, image_size)
    mean, std = channel_statistics(train)
    facts = facts_of(parts)
    return Splits(
        train, val, test, classes, channels, image_size, mean, std, facts.fingerprint, facts=facts, notes=notes
    )


def read_facts(config: DataConfig) -> DataFacts:
    """Return what a data set is now, reading no more of it than that takes: images of a folder are not decoded.

    Args:
        config: The ``data`` section of an experiment.

    Returns:
        Hashes and counts of each part.

    Raises:
        DataError: If the set is unknown, missing, damaged or inconsistent.
        OSError: If a file of the set cannot be read.
    """
    _require_known(config.name)
    if config.name == "folder":
        return facts_of(list_folder(_folder_of(config, "train/<class>/ and test/<class>/")))
    return facts_of(DATASETS[config.name](config))


def _require_known(name: str) -> None:
    if name not in DATASETS:
        raise DataError(f"data.name: unknown data set {name!r}{_nearest(name)}; known: {', '.join(DATASETS)}")


def _folder_of(config: DataConfig, content: str) -> Path:
    if config.path is None:
        raise DataError(f"data.path: missing; data set {config.name!r} needs a folder with {content}")
    if not config.path.is_dir():
        raise DataError(f"data.path: {config.path} is no folder; data set {config.name!r} needs one with {content}")
    return config.path


def _keep_back(split: Split, fraction: float, generator: torch.Generator) -> tuple[Split, Split]:
    counts = torch.bincount(split.labels)
    # A class of one image stays in training: one that is never seen cannot be selected for either.
    quotas = torch.minimum(stratified_quotas(counts, round(len(split) * fraction)), (counts - 1).clamp(min=0))
    val, train = take_quotas(split.labels, quotas, generator)
    return split.subset(train), split.subset(val)


def _limit(split: Split, limit: int | None, classes: int, generator: torch.Generator) -> Split:
    if limit is None or limit >= len(split):
        return split
    present = len(torch.bincount(split.labels).nonzero())
    quotas = stratified_quotas(torch.bincount(split.labels), limit)
    kept = split.subset(take_quotas(split.labels, quotas, generator)[0])
    left = len(torch.bincount(kept.labels).nonzero())
    if left < present:
        raise DataError(
            f"data.train_limit: {limit} images leave {present - left} of {classes} classes without a training image; "
            "raise it"
        )
    return kept


def _shape(split: Split) -> tuple[int, int]:
    channels, height, _ = split.image_shape
    return channels, height


def _check_size(config: DataConfig, found: int) -> None:
    if config.image_size is not None and config.image_size != found:
        raise DataError(
            f"data.image_size: images of {config.name!r} are {found}x{found}, not {config.image_size} pixels wide; "
            "only a folder of images is resized, so leave it out"
        )


def _nearest(name: str) -> str:
    near = nearest(name, DATASETS)
    return f"; did you mean {near[0]!r}?" if near else ""
