"""Losses that compare two features value by value, or where in the image they are large."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.losses.checks import check_features, check_maps
from qkd.losses.given import given
from qkd.losses.stable import in_full_precision, unit_rows


@in_full_precision
def hint_loss(student_feature: Tensor, teacher_feature: Tensor, *, module: nn.Module | None = None) -> Tensor:
    r"""Return the mean squared difference of two features (the hint of FitNets).

    .. math:: L = \frac1N \sum (r(f_s) - f_t)^2

    Args:
        student_feature: Shape ``[batch, ...]``, floating.
        teacher_feature: Same shape, or the shape that ``module`` gives. Treated as a constant.
        module: The regressor :math:`r` (:func:`build_adapter`); the identity if None.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes differ after the regressor.

    Example:
        >>> hint_loss(torch.zeros(2, 4, 3, 3), torch.full((2, 4, 3, 3), 0.5)).item()
        0.25

    References:
        Romero et al., `FitNets <https://arxiv.org/abs/1412.6550>`_, 2015, equation 3 (there a sum over the feature and
        one half; the mean keeps its size when layers differ).
    """
    check_features(student_feature, teacher_feature)
    student_feature = student_feature if module is None else module(student_feature)
    if student_feature.shape != teacher_feature.shape:
        raise ValueError(
            f"a hint compares features of the same shape, got {tuple(student_feature.shape)} and "
            f"{tuple(teacher_feature.shape)}: tap layers of the same shape"
        )
    return functional.mse_loss(student_feature, given(teacher_feature))


class Adapter(nn.Module):
    """Brings a student's feature to the teacher's shape: a 1x1 convolution, and an average over the image plane.

    Note: FitNets' regressor is a larger convolution without padding that also changes the size; a 1x1 convolution
    costs less and has been the usual choice since.

    Args:
        channels: Channels of the student and of the teacher.
        size: Height and width of the teacher's feature; None for features that are vectors.
    """

    def __init__(self, channels: tuple[int, int], size: tuple[int, int] | None) -> None:
        super().__init__()
        self.size = size
        self.map: nn.Module = nn.Linear(*channels) if size is None else nn.Conv2d(*channels, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the feature, ``[batch, teacher's channels, height, width]`` or ``[batch, teacher's channels]``."""
        mapped: Tensor = self.map(feature)
        fits = self.size is None or tuple(mapped.shape[2:]) == self.size
        return mapped if fits else functional.adaptive_avg_pool2d(mapped, self.size)


def build_adapter(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module | None:
    """Return a module that maps a feature of one shape to another, or None if they are the same.

    Args:
        student: Without the batch: ``(channels, height, width)`` or ``(channels,)``.
        teacher: Likewise.

    Raises:
        ValueError: If one is an image plane and the other is not.
    """
    if student == teacher:
        return None
    if len(student) != len(teacher) or len(student) not in (1, 3):
        raise ValueError(
            f"there is no adapter from a student's feature {student} to a teacher's {teacher}: tap two convolutional "
            f"layers or two that give vectors"
        )
    return Adapter((student[0], teacher[0]), (teacher[1], teacher[2]) if len(teacher) == 3 else None)


@in_full_precision
def attention_transfer_loss(student_feature: Tensor, teacher_feature: Tensor, *, power: float = 2.0) -> Tensor:
    r"""Return how differently two features spread their attention over the image.

    .. math:: L = \frac{1}{B H W} \sum_b \| \hat a_s - \hat a_t \|_2^2,\quad
              a = \frac1C \sum_c |f_c|^p,\quad \hat a = a / \|a\|_2

    Args:
        student_feature: Shape ``[batch, channels, height, width]``; channels may differ from the teacher's. The larger
            height or width of the two is averaged down to the smaller.
        teacher_feature: Likewise. Treated as a constant.
        power: :math:`p \ge 1`.

    Returns:
        A scalar, shape ``[]``; unchanged when a feature is scaled.

    Raises:
        ValueError: If features are not four-dimensional, the batches differ, or ``power`` is below 1.

    Example:
        >>> feature = torch.rand(2, 4, 3, 3)
        >>> attention_transfer_loss(3 * feature, feature).item() < 1e-12
        True

    References:
        Zagoruyko, Komodakis, `Paying More Attention to Attention <https://arxiv.org/abs/1612.03928>`_, 2017, section
        3.1: equation 2 with the mean of squares, as is common; the paper uses the norm itself.

    Note:
        An image with an all-zero feature has no attention; its map stays zero (value and gradient).
    """
    check_maps(student_feature, teacher_feature)
    if not (math.isfinite(power) and power >= 1):
        raise ValueError(f"power must be at least 1 and finite, got {power}")
    height, width = (min(pair) for pair in zip(student_feature.shape[2:], teacher_feature.shape[2:], strict=True))
    student, teacher = (_attention(maps, (height, width), power) for maps in (student_feature, given(teacher_feature)))
    return functional.mse_loss(student, teacher)


def _attention(maps: Tensor, size: tuple[int, int], power: float) -> Tensor:
    """Return attention as rows of norm 1, ``[batch, height * width]``."""
    if tuple(maps.shape[2:]) != size:
        maps = functional.adaptive_avg_pool2d(maps, size)
    largest = maps.detach().abs().amax((1, 2, 3), keepdim=True)
    # attention is scale-free, but powers overflow
    maps = maps / torch.where(largest > 0, largest, torch.ones_like(largest))
    magnitudes = maps.square() if power == 2 else maps.abs().pow(power)
    return unit_rows(magnitudes.mean(1).flatten(1))
