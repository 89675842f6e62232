"""Distillation losses: pure functions of tensors with keyword-only scalars."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

NORM_FLOOR = 1e-12  # below it a row counts as zero and stays zero: 0 / 0 would be NaN, forwards and backwards

Reduction = Literal["batchmean", "mean"]


def cross_entropy_loss(student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Return the cross-entropy with the labels, averaged over the batch.

    .. math:: L = -\frac1B \sum_b \sum_k y_{bk} \log \sigma(z_b)_k,\quad y = (1 - a)\,\mathrm{onehot} + a / K

    Args:
        student_logits: Unnormalised scores :math:`z`, shape ``[batch, classes]``, floating.
        labels: True classes, shape ``[batch]``, int64, in ``0 .. classes - 1``.
        label_smoothing: :math:`a` in ``[0, 1)``, the share of the label spread over all :math:`K` classes.

    Returns:
        A scalar, shape ``[]``, in nats, of the type of the logits.

    Raises:
        ValueError: If the shapes do not fit, or ``label_smoothing`` is out of range.

    References:
        Szegedy et al., `Rethinking the Inception Architecture <https://arxiv.org/abs/1512.00567>`_, 2015, section 7.

    Example:
        >>> cross_entropy_loss(torch.zeros(2, 4), torch.tensor([0, 3])).item() == math.log(4)
        False
        >>> abs(cross_entropy_loss(torch.zeros(2, 4), torch.tensor([0, 3])).item() - math.log(4)) < 1e-6
        True
    """
    if student_logits.dim() != 2 or labels.shape != student_logits.shape[:1]:
        raise ValueError(
            f"need logits [batch, classes] and labels [batch], "
            f"got {tuple(student_logits.shape)} and {tuple(labels.shape)}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing=}")
    return functional.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)


def soft_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    scale: float | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Return the soft-target loss of Hinton et al.

    .. math:: L = c\, \mathrm{KL}(\sigma(z_t / \tau) \,\|\, \sigma(z_s / \tau))

    Args:
        student_logits: Unnormalised scores :math:`z_s`, shape ``[batch, classes]``, floating.
        teacher_logits: :math:`z_t`, same shape. Treated as a constant: no gradient flows into it.
        temperature: :math:`\tau > 0`, dimensionless; 1 leaves the distributions as they are.
        scale: :math:`c \ge 0`; absent: :math:`\tau^2`, which keeps the gradient's size when :math:`\tau` changes.
            Give 1 for the bare divergence.
        reduction: ``"batchmean"`` divides the sum by the batch, ``"mean"`` by batch times classes (as some published
            code does; it is ``classes`` times smaller).

    Returns:
        A scalar, shape ``[]``, in nats, of the type of the student's logits. Zero where both logits are equal.

    Raises:
        ValueError: If the shapes differ or are not two-dimensional, ``temperature`` is not positive and finite,
            ``scale`` is negative or not finite, or ``reduction`` is unknown.

    References:
        Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_,
        2015, section 2.

    Example:
        >>> teacher_logits = torch.tensor([[2.0, 0.0]])
        >>> soft_target_loss(teacher_logits, teacher_logits, temperature=4.0).item()
        0.0
        >>> round(soft_target_loss(torch.zeros(1, 2), teacher_logits, temperature=1.0).item(), 4)
        0.3278
    """
    _check_pair(student_logits, teacher_logits)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature=}")
    if scale is not None and not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be finite and not negative, got {scale=}")
    if reduction not in ("batchmean", "mean"):
        raise ValueError(f"reduction must be 'batchmean' or 'mean', got {reduction=}")
    student_log = functional.log_softmax(student_logits / temperature, dim=1)
    teacher_log = functional.log_softmax(teacher_logits.detach() / temperature, dim=1)
    # "sum" and an own divisor: PyTorch warns that its "mean" is about to change its meaning
    divergence = functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    count = len(student_logits) if reduction == "batchmean" else student_logits.numel()
    return divergence / count * (temperature**2 if scale is None else scale)


def similarity_preserving_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Return how differently two features order the images of a batch by similarity.

    .. math:: L = \frac1{B^2} \| \tilde G_t - \tilde G_s \|_F^2,\quad G = Q Q^T,\quad \tilde G = G
              \text{ with rows of L2 norm 1}

    where :math:`Q` is the feature flattened to one row an image.

    Args:
        student_feature: Shape ``[batch, ...]``, floating.
        teacher_feature: Shape ``[batch, ...]``; everything but ``batch`` may differ from the student's. Treated as a
            constant: no gradient flows into it.

    Returns:
        A scalar, shape ``[]``, dimensionless, in ``[0, 4 / batch]``; zero where both features are equal, and
        unchanged when a feature is scaled or an orthogonal map is applied to it.

    Raises:
        ValueError: If the batches differ, or a feature has no dimension beside the batch.

    References:
        Tung, Mori, `Similarity-Preserving Knowledge Distillation <https://arxiv.org/abs/1907.09682>`_, 2019,
        equations 1 to 4.

    Note:
        An image whose feature is all zero has no direction; its row stays zero (value and gradient).

    Example:
        >>> feature = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        >>> similarity_preserving_loss(feature, 3 * feature).item() < 1e-12
        True
    """
    if student_feature.dim() < 2 or teacher_feature.dim() < 2 or len(student_feature) != len(teacher_feature):
        raise ValueError(
            f"need features [batch, ...] of one batch, "
            f"got {tuple(student_feature.shape)} and {tuple(teacher_feature.shape)}"
        )
    difference = _similarity(teacher_feature.detach()) - _similarity(student_feature)
    return difference.square().sum() / len(student_feature) ** 2


def _similarity(feature: Tensor) -> Tensor:
    """Return the row-normalised Gram matrix of the batch, ``[batch, batch]``."""
    rows = feature.flatten(1)
    # the loss ignores the feature's size, so dividing by its largest entry only keeps the squares from overflowing
    rows = rows / rows.detach().abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
    return functional.normalize(rows @ rows.T, dim=1, eps=NORM_FLOOR)


def _check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher need logits of one shape [batch, classes], "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
