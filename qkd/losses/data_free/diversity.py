"""How different generated images are from each other: RDSKD's inter-sample loss, MSGAN's mode seeking."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_features, check_logits, check_scalar
from qkd.losses.stable import in_full_precision, row_norms

RATIO_EPSILON = 1e-12  # its square is finite in float32; below 1e-9 of any ratio of real images
MODE_EPSILON = 1e-5  # MSGAN's, as in FedGen's code


@in_full_precision
def image_diversity_loss(images: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Return RDSKD's inter-sample loss of a batch's two halves: it rewards distant images with close outputs.

    .. math:: L_d = \frac{1}{r + \epsilon},\quad
              r = \frac{\|x_2 - x_1\|_F}{\sqrt{\|\sigma(v_2) - \sigma(v_1)\|_F^2 + \epsilon}}

    The norms are over the whole half batch, not a mean over pairs. The distance of the outputs is in the denominator,
    as published; this differs from MSGAN.

    Args:
        images: Shape ``[batch, ...]``, an even number, floating: first half :math:`x_1`, second half :math:`x_2`.
        teacher_logits: :math:`v`, shape ``[batch, classes]``.

    Returns:
        A scalar, shape ``[]``, positive.

    Raises:
        ValueError: If the shapes do not fit, there are fewer than two classes, or the batch is not even.

    Note:
        Published with :math:`\epsilon = 10^{-20}` outside only: a saturated teacher (equal outputs) then has a NaN
        gradient, and equal images an infinite one. Here :math:`\epsilon = 10^{-12}` is used in both places.

    References:
        Han et al., Robustness and Diversity Seeking Data-Free Knowledge Distillation, ICASSP 2021.

    Example:
        >>> x, v = torch.tensor([[0.0], [4.0]]), torch.tensor([[9.0, 0.0], [0.0, 9.0]])
        >>> round(image_diversity_loss(x, v).item(), 3)  # sqrt(2) / 4
        0.353
    """
    check_logits(teacher_logits, teacher_logits, least_classes=2)
    _check_halves(images, teacher_logits)
    first, second = images.flatten(1).chunk(2)
    near, far = functional.softmax(teacher_logits, dim=1).chunk(2)
    ratio = row_norms((second - first).flatten()) / ((far - near).square().sum() + RATIO_EPSILON).sqrt()
    return 1 / (ratio + RATIO_EPSILON)


@in_full_precision
def mode_seeking_loss(images: Tensor, latents: Tensor) -> Tensor:
    r"""Return MSGAN's regularizer of a batch's two halves: different latents should give different images.

    .. math:: L = \Big( \frac{\mathrm{mean}|G(z_1) - G(z_2)|}{\mathrm{mean}|z_1 - z_2|} + 10^{-5} \Big)^{-1}

    Args:
        images: :math:`G(z)`, shape ``[batch, ...]``, an even number, floating.
        latents: :math:`z`, shape ``[batch, ...]``.

    Returns:
        A scalar, shape ``[]``, positive; ``1e5`` where the images of both halves are equal, and, without a gradient,
        where their latents are.

    Raises:
        ValueError: If the batches differ, or are not even.

    References:
        Mao et al., `Mode Seeking GANs <https://arxiv.org/abs/1903.05628>`_, 2019.

    Example:
        >>> round(mode_seeking_loss(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]])).item(), 4)
        0.5
    """
    _check_halves(images, latents)
    far, near = (_mean_distance(both) for both in (images, latents))
    is_apart = ~(near <= 0)
    ratio = torch.where(is_apart, far, 0) / torch.where(is_apart, near, 1)
    return 1 / (ratio + MODE_EPSILON)


@in_full_precision
def exponential_increment(loss: Tensor, reference: Tensor | float, *, limit: float = 20.0) -> Tensor:
    r"""Return RDSKD's penalty :math:`\exp(L - L_\mathrm{prev})`: a loss that has grown weighs more in the gradient.

    Args:
        loss: :math:`L`, shape ``[]``.
        reference: :math:`L_\mathrm{prev}`, a constant; 0 at first.
        limit: Largest exponent. Beyond it, value and slope are held at ``exp(limit)``, so that neither
            overflows and the generator still gets a gradient.

    Returns:
        A scalar, shape ``[]``; 1 where both are equal.

    Raises:
        ValueError: If the loss is not a scalar, or ``limit`` is not positive and finite.

    References:
        Han et al., Robustness and Diversity Seeking Data-Free Knowledge Distillation, ICASSP 2021.

    Example:
        >>> exponential_increment(torch.tensor(0.5), 0.5).item()
        1.0
    """
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"limit must be positive and finite, got {limit=}")
    check_scalar(loss=loss)
    grown = loss - (reference.detach() if isinstance(reference, Tensor) else reference)
    return (grown - (grown - limit).clamp_min(0).detach()).exp()


def _mean_distance(both: Tensor) -> Tensor:
    first, second = both.flatten(1).chunk(2)
    return (second - first).abs().mean()


def _check_halves(images: Tensor, others: Tensor) -> None:
    for batch in (images, others):
        check_features(batch)
    if len(images) != len(others) or len(images) % 2:
        raise ValueError(
            f"needs two halves of one batch: an even number of images and outputs, got {len(images)} and {len(others)}"
        )
