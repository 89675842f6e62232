"""Information flow modeling: divergences of the probabilities that images of a batch are neighbors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_choice, check_features
from qkd.losses.choices import DIVERGENCES, FLOW_REDUCTIONS, KERNELS, Divergence, FlowReduction, Kernel
from qkd.losses.given import given
from qkd.losses.stable import in_full_precision, offset_unit_rows

NORM_EPSILON = 1e-6  # added to norms and squared distances, as published
RATIO_EPSILON = 1e-6  # of divergence `kl`, as published
LEAST_SIMILARITY = 1e-7  # antiparallel features give (cos + 1) / 2 = -6e-8 in float32, which has no logarithm
Constant = Callable[[Tensor], Tensor]  # detaches what a kernel takes as a constant
LEAST_PROBABILITY = 1e-12  # `kagan` divides by probabilities, and `rbf` gives some as small as 1e-300


@in_full_precision
def information_flow_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    kernel: Kernel = "combined",
    divergence: Divergence = "jeffreys",
    sigma: float = 1.0,
    reduction: FlowReduction = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""Return the divergence of neighbor probabilities in two layers (information flow modeling).

    .. math:: J = \frac1{B^2} \sum_{ij} (P_{ij} - Q_{ij}) (\ln P_{ij} - \ln Q_{ij})

    with :math:`P, Q` the rows, summing to one (diagonal included), of the kernel matrices of teacher and student. With
    :math:`d_{ij} = \sqrt{\|x_i - x_j\|^2 + \epsilon}` and :math:`\epsilon = 10^{-6}` the kernels are

    - ``cosine``: :math:`(\langle x_i, x_j \rangle / ((|x_i| + \epsilon)(|x_j| + \epsilon)) + 1) / 2`, at least 1e-7;
    - ``t``: :math:`1 / (1 + d)`; ``cauchy``: :math:`1 / (1 + d^2 / \sigma^2)`;
    - ``rbf``: :math:`\exp(-d / \sigma)` (of :math:`d`, not its square, as in the released code);
      ``adaptive_rbf``: likewise with :math:`\sigma` the mean of :math:`d` over the batch, a constant (in the
      teacher's kernel only where the teacher is one);
    - ``combined``: the loss with ``cosine`` plus the loss with ``t``.

    Divergences, each summed over all pairs: ``jeffreys`` as above; ``kl`` :math:`P \ln(\epsilon + P / (\epsilon + Q))`;
    ``abs`` :math:`|P - Q|`; ``squared`` :math:`(P - Q)^2`; ``exponential`` :math:`P (\ln P - \ln Q)^2`; ``kagan``
    :math:`(P - Q)^2 / P`.

    Args:
        student_feature: Shape ``[batch, ...]``, floating; flattened to one row per image.
        teacher_feature: Shape ``[batch, ...]``; all but ``batch`` may differ. Treated as a constant.
        kernel: Similarity of a pair of images.
        divergence: How to compare two rows of probabilities.
        sigma: :math:`\sigma > 0` of ``rbf`` and ``cauchy``, in units of the feature; unused by the others.
        reduction: ``mean`` over all pairs, as published, shrinks with the batch; ``row_mean`` is ``batch`` times that.
        normalize: Divide each feature by its root mean square over the batch first (ours): every kernel but ``cosine``
            and ``adaptive_rbf`` depends on scale, and a low-bit student has its own scale.

    Returns:
        A scalar, shape ``[]``, in nats for ``jeffreys`` and ``kl``; zero where both features are equal up to rotation
        (``kl``: of the size of its epsilon). ``jeffreys``, ``abs`` and ``squared`` do not change when student and
        teacher are swapped.

    Raises:
        ValueError: If the batches differ, a feature has no dimension besides the batch, a choice is unknown, or
            ``sigma`` is not positive and finite.

    References:
        Passalis, Tzelepi, Tefas, `Heterogeneous Knowledge Distillation Using Information Flow Modeling
        <https://arxiv.org/abs/2005.00727>`_, 2020, section 3; its released code for the further kernels and
        divergences. The form of ``exponential`` is the one in common use, our reading.

    Note:
        Probabilities are kept as logarithms, so that none underflows; ``kagan`` alone divides by a probability, clamped
        to at least 1e-12. Distances are computed from centered features, which changes only their rounding. In float32
        that can be seen where two images have the same features: the ``t`` kernel's loss is then off by up to a few
        percent. An image with an all-zero feature gets no gradient through the cosine kernel (published: 1e6 times
        that of any other).

    Example:
        >>> feature = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        >>> information_flow_loss(feature, feature, kernel="rbf", divergence="kagan").item()
        0.0
    """
    check_features(student_feature, teacher_feature)
    check_choice("kernel", kernel, KERNELS)
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("reduction", reduction, FLOW_REDUCTIONS)
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be positive and finite, got {sigma=}")
    student, teacher = student_feature.flatten(1), given(teacher_feature).flatten(1)
    if normalize:
        student, teacher = (rows / _root_mean_square(rows) for rows in (student, teacher))
    kernels: tuple[Kernel, ...] = ("cosine", "t") if kernel == "combined" else (kernel,)
    sides = ((teacher, given), (student, Tensor.detach))  # the teacher's own scale is part of what it teaches
    parts = [
        _DIVERGENCES[divergence](*(_log_rows(_KERNELS[one](rows, sigma, constant)) for rows, constant in sides))
        for one in kernels
    ]
    total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return total / len(student) if reduction == "row_mean" else total / len(student) ** 2


def _log_rows(log_kernel: Tensor) -> Tensor:
    """Return log probabilities, ``[batch, batch]``: the kernel's rows divided by their sums."""
    return functional.log_softmax(log_kernel, dim=1)


def _squared_distances(rows: Tensor) -> Tensor:
    """Return squared distances of all pairs plus epsilon, ``[batch, batch]``; the diagonal is epsilon exactly.

    Uses one matrix product: differences of all pairs of a convolution's output would be too expensive for a step.
    """
    rows = rows - rows.detach().mean(0)  # less cancellation, and equal rows become zeros
    squares = rows.square().sum(1)
    apart = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * rows @ rows.T).clamp_min(0)
    is_other = 1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return apart * is_other + NORM_EPSILON


def _cosine(rows: Tensor, _sigma: float, _constant: Constant) -> Tensor:
    units = offset_unit_rows(rows, NORM_EPSILON)
    return ((units @ units.T + 1) / 2).clamp_min(LEAST_SIMILARITY).log()


def _t(rows: Tensor, _sigma: float, _constant: Constant) -> Tensor:
    return -torch.log1p(_squared_distances(rows).sqrt())


def _cauchy(rows: Tensor, sigma: float, _constant: Constant) -> Tensor:
    return -torch.log1p(_squared_distances(rows) / sigma**2)


def _rbf(rows: Tensor, sigma: float, _constant: Constant) -> Tensor:
    return -_squared_distances(rows).sqrt() / sigma


def _adaptive_rbf(rows: Tensor, _sigma: float, constant: Constant) -> Tensor:
    apart = _squared_distances(rows).sqrt()
    return -apart / constant(apart.mean())


# logarithms of the kernels, of rows [batch, features]
_KERNELS: dict[str, Callable[[Tensor, float, Constant], Tensor]] = {
    "adaptive_rbf": _adaptive_rbf,
    "cauchy": _cauchy,
    "cosine": _cosine,
    "rbf": _rbf,
    "t": _t,
}


def _jeffreys(p_log: Tensor, q_log: Tensor) -> Tensor:
    return ((p_log.exp() - q_log.exp()) * (p_log - q_log)).sum()


def _kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    p, q = p_log.exp(), q_log.exp()
    return (p * torch.log(RATIO_EPSILON + p / (RATIO_EPSILON + q))).sum()


def _abs(p_log: Tensor, q_log: Tensor) -> Tensor:
    return (p_log.exp() - q_log.exp()).abs().sum()


def _squared(p_log: Tensor, q_log: Tensor) -> Tensor:
    return (p_log.exp() - q_log.exp()).square().sum()


def _exponential(p_log: Tensor, q_log: Tensor) -> Tensor:
    return (p_log.exp() * (p_log - q_log).square()).sum()


def _kagan(p_log: Tensor, q_log: Tensor) -> Tensor:
    p = p_log.exp()
    return ((p - q_log.exp()).square() / p.clamp_min(LEAST_PROBABILITY)).sum()


# sums over all pairs, of log probabilities of teacher and student
_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "abs": _abs,
    "exponential": _exponential,
    "jeffreys": _jeffreys,
    "kagan": _kagan,
    "kl": _kl,
    "squared": _squared,
}


def _root_mean_square(rows: Tensor) -> Tensor:
    size = rows.detach().abs().amax()
    size = torch.where(size > 0, size, torch.ones_like(size))
    mean = (rows / size).square().mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean)).sqrt() * size
