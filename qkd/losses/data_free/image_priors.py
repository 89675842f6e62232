"""What images should look like to a teacher's batch norm, and as images: statistics and total variation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkd.losses.checks import check_choice
from qkd.losses.stable import in_full_precision, row_norms

STATISTICS = ("norms", "squares")
VARIATIONS = ("norms", "magnitudes")


@in_full_precision
def batch_norm_loss(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_variances: Sequence[Tensor],
    *,
    form: str = "norms",
) -> Tensor:
    r"""Return how far a batch's statistics at each batch norm are from the teacher's running statistics.

    .. math::
        \text{norms:}\ \sum_l \|\hat\sigma^2_l - \sigma^2_l\|_2 + \|\hat\mu_l - \mu_l\|_2 \qquad
        \text{squares:}\ \frac1L \sum_l \mathrm{MSE}(\sigma^2_l, \hat\sigma^2_l) + \mathrm{MSE}(\mu_l, \hat\mu_l)

    Mean and *biased* variance of each channel, over the batch and the image plane, of the input to the batch norm.

    Args:
        inputs: The input to each batch norm, shape ``[batch, channels, ...]``; the gradient flows into it.
        running_means: :math:`\hat\mu_l`, shape ``[channels]`` each; constants.
        running_variances: :math:`\hat\sigma^2_l`, likewise.
        form: ``"norms"`` (DeepInversion, CMI, DFQ: norms, summed) or ``"squares"`` (GDFQ: mean squares, averaged).

    Returns:
        A scalar, shape ``[]``; exactly 0, with gradient 0, where all statistics agree.

    Raises:
        ValueError: If the lists are empty or differ in length, channels do not fit, or ``form`` is unknown.

    References:
        Yin et al., `Dreaming to Distill <https://arxiv.org/abs/1912.08795>`_, 2020; Xu et al.,
        `Generative Low-bitwidth Data Free Quantization <https://arxiv.org/abs/2003.03603>`_, 2020.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm_loss([x], [torch.tensor([2.0])], [torch.tensor([1.0])]).item()
        0.0
    """
    check_choice("form", form, STATISTICS)
    if not inputs or len({len(inputs), len(running_means), len(running_variances)}) > 1:
        raise ValueError(
            f"needs equal numbers of means, variances and batch norm inputs, at least one, got {len(running_means)}, "
            f"{len(running_variances)} and {len(inputs)}; a teacher without batch norm has no such statistics"
        )
    parts = [_differences(*layer) for layer in zip(inputs, running_means, running_variances, strict=True)]
    if form == "norms":
        return torch.stack([row_norms(one) for part in parts for one in part]).sum()
    return torch.stack([one.square().mean() for part in parts for one in part]).sum() / len(parts)


def _differences(entering: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    if entering.dim() < 2 or entering.numel() == 0 or not mean.shape == variance.shape == entering.shape[1:2]:
        raise ValueError(
            f"needs inputs [batch, channels, ...] with statistics [channels], got {tuple(entering.shape)}, "
            f"{tuple(mean.shape)} and {tuple(variance.shape)}"
        )
    values = entering.transpose(0, 1).flatten(1)
    found = torch.var_mean(values, dim=1, correction=0)
    return found[0] - variance.detach().to(values), found[1] - mean.detach().to(values)


@in_full_precision
def total_variation_loss(images: Tensor, *, form: str = "norms") -> Tensor:
    r"""Return how much neighboring pixels differ, in four directions: across, down and both diagonals.

    Args:
        images: Shape ``[batch, channels, height, width]``, floating, at least two pixels high and wide.
        form: ``"norms"``: the sum of four Frobenius norms over the whole batch (DeepInversion); ``"magnitudes"``: the
            sum of four means of absolute differences (CMI).

    Returns:
        A scalar, shape ``[]``; 0, with gradient 0, for images of one color.

    Raises:
        ValueError: If images are not two-dimensional or too small, or ``form`` is unknown.

    References:
        Yin et al., `Dreaming to Distill <https://arxiv.org/abs/1912.08795>`_, 2020.

    Example:
        >>> total_variation_loss(torch.ones(1, 1, 4, 4)).item()
        0.0
    """
    check_choice("form", form, VARIATIONS)
    if images.dim() != 4 or images.numel() == 0 or min(images.shape[2:]) < 2:
        raise ValueError(
            f"needs images [batch, channels, height, width] of at least two pixels each way, got {tuple(images.shape)}"
        )
    steps = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., 1:, 1:] - images[..., :-1, :-1],
    )
    parts = [row_norms(one.flatten()) if form == "norms" else one.abs().mean() for one in steps]
    return torch.stack(parts).sum()
