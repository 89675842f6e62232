"""Reject tensors and numbers that a loss is not defined for, and report what was found."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral

import torch
from torch import Tensor


def check_logits(student_logits: Tensor, teacher_logits: Tensor, *, least_classes: int = 1) -> None:
    """Raise unless both have the same shape ``[batch, classes]``.

    Raises:
        ValueError: If they are not, or there are fewer than ``least_classes`` classes.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher need logits of the same shape [batch, classes], "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    _check_not_empty(student_logits)
    if student_logits.shape[1] < least_classes:
        raise ValueError(f"needs at least {least_classes} classes, got {student_logits.shape[1]}")


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise unless labels are int64, ``[batch]``, one per row of logits, and valid classes.

    Raises:
        ValueError: If they are not. On a GPU the values are not checked, because that would synchronize.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 class numbers, got {str(labels.dtype).removeprefix('torch.')}")
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"need logits [batch, classes] and labels [batch], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    _check_not_empty(logits)
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels must be 0 to {logits.shape[1] - 1} for {logits.shape[1]} classes, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )


def check_share(share: Tensor, labels: Tensor) -> None:
    """Raise unless there is one share in ``[0, 1]`` per label.

    Raises:
        ValueError: If there is not. On a GPU the values are not checked.
    """
    if share.shape != labels.shape:
        raise ValueError(
            f"other_labels and other_share need the shape of labels, {tuple(labels.shape)}, got {tuple(share.shape)}"
        )
    if share.device.type == "cpu" and not 0 <= float(share.min()) <= float(share.max()) <= 1:
        raise ValueError(f"other_share must be in [0, 1], got {float(share.min())} to {float(share.max())}")


def _check_not_empty(tensor: Tensor) -> None:
    if len(tensor) == 0:
        raise ValueError("the batch is empty: a loss is a mean over images")
    if tensor.numel() == 0:
        raise ValueError(f"needs at least one number per image, got {tuple(tensor.shape)}")


def check_scalar(**parts: Tensor) -> None:
    """Raise unless every part of a sum is a scalar; any other would make the loss a vector.

    Raises:
        ValueError: If one is not. The message names it.
    """
    for name, part in parts.items():
        if part.dim():
            raise ValueError(f"{name} must be a scalar, shape (), got {tuple(part.shape)}")


def check_temperature(temperature: float, scale: float | None = None) -> None:
    """Raise unless the temperature is positive and finite, and the scale, if given, finite and not negative.

    Raises:
        ValueError: If they are not.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature=}")
    if scale is not None and not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be finite and not negative, got {scale=}")


def check_weight(**weights: float) -> None:
    """Raise unless every weight is finite and not negative.

    Raises:
        ValueError: If one is not. The message names it.
    """
    for name, value in weights.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def is_count(value: object) -> bool:
    """Return whether a number is an integer of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_count(**counts: int) -> None:
    """Raise unless every count is an integer of at least 1.

    Raises:
        ValueError: If one is not. The message names it.
    """
    for name, value in counts.items():
        if not is_count(value):
            raise ValueError(f"{name} must be at least 1 and an integer, got {value!r}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless a value is one of the choices.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_features(*features: Tensor) -> None:
    """Raise unless all are ``[batch, ...]`` with the same batch size, and none is empty.

    Raises:
        ValueError: If they are not.
    """
    if any(feature.dim() < 2 for feature in features) or len({len(feature) for feature in features}) > 1:
        shapes = " and ".join(str(tuple(feature.shape)) for feature in features)
        raise ValueError(f"need features [batch, ...] of one batch, got {shapes}")
    for feature in features:
        _check_not_empty(feature)


def check_maps(student_feature: Tensor, teacher_feature: Tensor) -> None:
    """Raise unless both are ``[batch, channels, height, width]`` with the same batch size.

    Raises:
        ValueError: If they are not.
    """
    if student_feature.dim() != 4 or teacher_feature.dim() != 4 or len(student_feature) != len(teacher_feature):
        raise ValueError(
            f"need features [batch, channels, height, width] of one batch, "
            f"got {tuple(student_feature.shape)} and {tuple(teacher_feature.shape)}"
        )
    _check_not_empty(student_feature)
    _check_not_empty(teacher_feature)


def check_feature_lists(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], *, least: int) -> None:
    """Raise unless both lists have the same length and hold features ``[batch, channels, ...]`` of one batch.

    Raises:
        ValueError: If they are not, or have fewer than ``least`` features.
    """
    if len(student_features) != len(teacher_features) or len(student_features) < least:
        raise ValueError(
            f"student and teacher need the same number of features, at least {least}, "
            f"got {len(student_features)} and {len(teacher_features)}"
        )
    for student, teacher in zip(student_features, teacher_features, strict=True):
        check_features(student, teacher)
    sizes = sorted({len(feature) for feature in student_features})
    if len(sizes) > 1:
        raise ValueError(f"need features of one batch, got batches of {', '.join(map(str, sizes))}")
