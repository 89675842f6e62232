"""How far apart the features of two domains are: the maximum mean discrepancy."""

from __future__ import annotations

import torch
from torch import Tensor

from qkd.losses.checks import check_choice, check_features
from qkd.losses.stable import distances, in_full_precision

KERNEL_NAMES = ("gaussian", "linear")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the mean squared distance: five kernels, averaged


@in_full_precision
def mean_discrepancy_loss(source_feature: Tensor, target_feature: Tensor, *, kernel: str = "gaussian") -> Tensor:
    r"""Return the squared maximum mean discrepancy of two sets of features (MMD).

    .. math:: L = \frac{1}{n^2}\sum_{ij} k(s_i, s_j) + \frac{1}{m^2}\sum_{ij} k(t_i, t_j)
                  - \frac{2}{nm}\sum_{ij} k(s_i, t_j)

    This is the biased estimate: it includes pairs of a row with itself, so it is never negative.

    Args:
        source_feature: :math:`s`, shape ``[n, ...]``, floating; the gradient flows into both.
        target_feature: :math:`t`, shape ``[m, ...]``, rows of the same size.
        kernel: ``"gaussian"``: the mean of :math:`\exp(-\|a - b\|^2 / (f \bar d))` over ``f`` in 1/4, 1/2, 1, 2, 4,
            where :math:`\bar d`, a constant, is the mean squared distance of all pairs of different rows;
            ``"linear"``: :math:`a \cdot b`, which compares means.

    Returns:
        A scalar, shape ``[]``; 0 where both sets are equal. With the Gaussian kernel it does not change when both are
        scaled.

    Raises:
        ValueError: If a feature has no dimension besides the batch, rows differ in size, a set is empty, or ``kernel``
            is unknown.

    References:
        Gretton et al., `A Kernel Two-Sample Test <https://jmlr.org/papers/v13/gretton12a.html>`_, 2012; the
        kernels of arXiv 2005.07839 were not available to us, so the bandwidths are ours.

    Example:
        >>> mean_discrepancy_loss(torch.zeros(2, 3), torch.ones(4, 3), kernel="linear").item()
        3.0
    """
    check_choice("kernel", kernel, KERNEL_NAMES)
    for feature in (source_feature, target_feature):
        check_features(feature)
    source, target = source_feature.flatten(1), target_feature.flatten(1)
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            f"needs features of the same size, got {tuple(source_feature.shape)} and {tuple(target_feature.shape)}"
        )
    if kernel == "linear":
        return (source.mean(0) - target.mean(0)).square().sum()
    rows, count = torch.cat([source, target]), len(source)
    size = rows.detach().abs().amax()
    rows = rows / torch.where(size > 0, size, torch.ones_like(size))  # kernels are scale-free, but squares overflow
    squares = distances(rows).square()  # without a tensor of all differences: features may be large
    pairs = max(1, len(rows) * (len(rows) - 1))
    width = (squares.detach().sum() / pairs).clamp_min(torch.finfo(squares.dtype).tiny)
    kernels = torch.stack([(-squares / (factor * width)).exp() for factor in FACTORS]).mean(0)
    return kernels[:count, :count].mean() + kernels[count:, count:].mean() - 2 * kernels[:count, count:].mean()
