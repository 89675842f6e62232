"""Data sets by name: load one, check it, and hold out a validation part of its training images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkd.data.domains import divide_domains, domain_mark
from qkd.data.errors import DataError
from qkd.data.labels import class_notes
from qkd.data.loading.facts import DataFacts, facts_of, file_digest
from qkd.data.loading.overlap import overlap_notes
from qkd.data.loading.preprocessing import preprocessed
from qkd.data.sampling import stratified_quotas, take_quotas
from qkd.data.sets import (
    Fit,
    FolderSplit,
    Form,
    list_folder,
    load_digits_splits,
    load_folder_splits,
    load_npz_splits,
    load_vision_splits,
    resize_parts,
)
from qkd.data.sets.digits import SIDE
from qkd.data.splits import Parts, Split, Splits
from qkd.data.statistics import channel_statistics
from qkd.files.user_paths import looked_in
from qkd.foreign import nearest
from qkd.image_size import height_width, image_size_of

if TYPE_CHECKING:
    from pathlib import Path

    from qkd.config import DataConfig


def _digits(config: DataConfig) -> Parts:
    return load_digits_splits(SIDE if config.image_size is None else config.image_size)


def _vision(config: DataConfig) -> Parts:
    return load_vision_splits(config.name, config.root, download=config.download)


def _npz(config: DataConfig) -> Parts:
    return load_npz_splits(_folder_of(config, "train.npz and test.npz"))


def _folder(config: DataConfig) -> Parts:
    return load_folder_splits(_folder_of(config, CLASS_FOLDERS), folder_form(config))


def folder_form(config: DataConfig) -> Form:
    """Return the form that a config gives the images of a folder."""
    fit = Fit(config.resize, config.resize_size, config.interpolation)
    return Form(config.image_size, fit, config.channels, config.test_fraction, config.split_seed)


CLASS_FOLDERS = "train/<class>/ and test/<class>/, or <class>/ alone"

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
    """Load a data set and split it: train and validation from its training images, test unchanged.

    The validation part, and then the part that ``train_limit`` keeps, are stratified by class and drawn from
    ``seed``; the test part never depends on it. Every class keeps at least one training image.

    Args:
        config: The ``data`` section of an experiment.
        seed: Seed of the split, not negative.

    Returns:
        The three parts, with classes, shape, mean and standard deviation per channel (fractions 0..1), and a
        fingerprint.

    Raises:
        DataError: If the set is unknown, missing, damaged or inconsistent, the split leaves a class untrained, or a
            part is smaller than the batches that ``batch_statistics`` scores it in.
        ValueError: If torchvision has no weights for the net that ``preprocess`` names.
        OSError: If a file of the set cannot be read.
    """
    _require_known(config.name)
    given, config = config, preprocessed(config)
    whole = parts = DATASETS[config.name](config)
    target = None
    hash_file = functools.cache(file_digest)  # of each file once
    facts = facts_of(parts, hash_file)
    parts, resize = _in_form(parts, config)
    fingerprint = facts.fingerprint
    if config.domains is not None:
        (parts, target), fingerprint = divide_domains(parts, config), domain_mark(fingerprint, config)
    everything, test, classes, notes = parts[:4]
    if len(classes) < 2:
        raise DataError(f"data: every image of {config.name!r} is of one class ({classes[0]}); needs at least two")
    generator = torch.Generator().manual_seed(seed)
    learned_rows, val_rows = _validation(parts, config.val_fraction, generator)
    train, val = everything.subset(learned_rows), everything.subset(val_rows)
    drawn = val_rows if config.domains is None else None  # domains have other rows
    notes = (
        *notes, *class_notes(everything.labels, test.labels, classes), *overlap_notes(whole, hash_file, drawn),
        *_unused(given, config, everything.image_shape[1:], resize),
    )  # fmt: skip
    learned = len(train)
    train = _limit(train, config.train_limit, len(classes), generator)
    channels, height, width = everything.image_shape
    size = image_size_of(height, width)
    _check_channels(config, channels)
    _require_full_batch(config, {"validation": len(val), "test": len(test)})
    mean, std = channel_statistics(train) if config.mean is None or config.std is None else (config.mean, config.std)
    return Splits(
        train, val, test, classes, channels, size, mean, std, fingerprint, facts=facts, notes=notes, resize=resize,
        held_out=_held_out(parts, len(train), learned, len(val), config), target=target,
    )  # fmt: skip


def _require_full_batch(config: DataConfig, counts: Mapping[str, int]) -> None:
    """Raise before training the error that scoring would raise after it."""
    size = config.batch_statistics or 0
    small = [f"{count} {name} images" for name, count in counts.items() if 0 < count < size]
    if small:
        raise DataError(
            f"data.batch_statistics: scoring needs at least one full batch of {size} images, but there are only "
            f"{' and '.join(small)}; lower it, or omit it to use running statistics"
        )


def _in_form(parts: Parts, config: DataConfig) -> tuple[Parts, str]:
    """Return the parts with the size and channels that the config asks for, and the name of the resize rule."""
    if isinstance(parts.train, FolderSplit):
        return parts, parts.train.fit.name
    channels, height, width = parts.train.image_shape
    wanted = config.channels or channels, *height_width(config.image_size or (height, width))
    fit = folder_form(config).fit
    has_own = config.image_size is None or config.name == "digits"  # which have been enlarged
    rule = "none" if has_own else fit.name
    if wanted == (channels, height, width):
        return parts, rule if fit.resize_size is None else "none"  # arrays of the target size are used as they are
    return resize_parts(parts, channels=wanted[0], image_size=wanted[1:], fit=fit), rule


def _held_out(parts: Parts, train: int, learned: int, val: int, config: DataConfig) -> str:
    """Return one line that says what is held out from training."""
    chosen = "its own part" if parts.val_rows is not None else f"{config.val_fraction:g} of {len(parts.train):,} images"
    unused = f"; {learned - train:,} unused (data.train_limit)" if learned > train else ""
    validation = f"{val:,} for validation ({chosen})" if val else "none for validation"
    return (
        f"{train:,} training images; held out: {validation}, {len(parts.test):,} for the test "
        f"({parts.test_words}){unused}"
    )


def read_facts(config: DataConfig) -> DataFacts:
    """Return the current facts of a data set, reading as little as possible: images of a folder are not decoded.

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
        return facts_of(list_folder(_folder_of(config, CLASS_FOLDERS), folder_form(config)))
    return facts_of(DATASETS[config.name](config))


def _require_known(name: str) -> None:
    if name not in DATASETS:
        raise DataError(f"data.name: unknown data set {name!r}{_nearest(name)}; known: {', '.join(DATASETS)}")


def _folder_of(config: DataConfig, content: str) -> Path:
    if config.path is None:
        raise DataError(f"data.path: missing; data set {config.name!r} needs a folder with {content}")
    if not config.path.is_dir():
        raise DataError(
            f"data.path: {config.path} is not a folder{looked_in(config.path)}; data set {config.name!r} needs one "
            f"with {content}"
        )
    return config.path


def _validation(parts: Parts, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows of training and of validation images: the set's own validation part, or a share drawn from it."""
    if parts.val_rows is not None:
        return parts.learned_rows, parts.val_rows
    labels = parts.train.labels
    counts = torch.bincount(labels)
    # A class with one image stays in training: validating a class that is never trained would be useless.
    quotas = torch.minimum(stratified_quotas(counts, round(len(labels) * fraction)), (counts - 1).clamp(min=0))
    val, train = take_quotas(labels, quotas, generator)
    return train, val


def _unused(given: DataConfig, config: DataConfig, size: Sequence[int], resize: str) -> list[str]:
    """Return one line per given key of resizing without effect: new configs are refused, older runs are told."""
    lines = []
    if given.interpolation not in ("bilinear", config.interpolation):
        lines.append(f"interpolation: not used, because `preprocess` sets it to {config.interpolation}")
    if given.resize_size not in (None, config.resize_size):
        lines.append(f"resize_size: not used, because `preprocess` sets it to {config.resize_size}")
    elif given.resize_size is not None and resize == "none":
        lines.append("resize_size: not used, because the images have the target size already")
    elif given.resize_size is not None and given.resize_size < min(size):
        lines.append(f"resize_size: not used, because it is below the size of the images, {min(size)}")
    return [f"data.{line}" for line in lines]


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


def _check_channels(config: DataConfig, channels: int) -> None:
    if config.channels is not None and config.channels != channels:
        raise DataError(f"data.channels: {config.channels}, but `domains` with a color have {channels}; omit it")
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != channels:
            way = "; data.channels: 3 reads gray images as color" if channels == 1 else ""
            raise DataError(f"data.{name}: has {len(values)} values, but the images have {channels} channels{way}")


def _nearest(name: str) -> str:
    near = nearest(name, DATASETS)
    return f"; did you mean {near[0]!r}?" if near else ""
