"""Losses on relations between the images of a batch: similarities, distances, angles, probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_features
from qkd.losses.given import given
from qkd.losses.stable import distances, in_full_precision, offset_unit_rows, unit_rows

PKT_EPSILON = 1e-7  # of the published loss, in both logarithms and added to the norms


@in_full_precision
def similarity_preserving_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Return how differently two features order the images of a batch by similarity.

    .. math:: L = \frac1{B^2} \| \tilde G_t - \tilde G_s \|_F^2,\quad G = Q Q^T,\quad \tilde G = G
              \text{ with rows of L2 norm 1}

    where :math:`Q` is the feature flattened to one row per image.

    Args:
        student_feature: Shape ``[batch, ...]``, floating.
        teacher_feature: Shape ``[batch, ...]``; everything except ``batch`` may differ from the student's. Treated as a
            constant: no gradient flows into it.

    Returns:
        A scalar, shape ``[]``, dimensionless, in ``[0, 4 / batch]``; zero where both features are equal, and
        unchanged when a feature is scaled or an orthogonal map is applied to it.

    Raises:
        ValueError: If the batches differ, or a feature has no dimension besides the batch.

    References:
        Tung, Mori, `Similarity-Preserving Knowledge Distillation <https://arxiv.org/abs/1907.09682>`_, 2019,
        equations 1 to 4.

    Note:
        An image whose feature is all zero is similar to none: its row of :math:`\tilde G` stays zero and passes no
        gradient (the published 0 / 1e-12 passes one of 1e10 to a row that a quantizer rounded to zero); the entries
        for it in other rows are like any other image's.

    Example:
        >>> feature = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        >>> similarity_preserving_loss(feature, 3 * feature).item() < 1e-12
        True
    """
    check_features(student_feature, teacher_feature)
    difference = _similarity(given(teacher_feature)) - _similarity(student_feature)
    return difference.square().sum() / len(student_feature) ** 2


def _similarity(feature: Tensor) -> Tensor:
    """Return the row-normalized Gram matrix of the batch, ``[batch, batch]``."""
    rows = feature.flatten(1)
    # the loss ignores the feature's size, so dividing by its largest entry only keeps the squares from overflowing
    rows = rows / rows.detach().abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
    return unit_rows(rows @ rows.T)


@in_full_precision
def distance_relation_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Return how differently two features space the images of a batch (RKD-D).

    .. math:: L = \frac1{B^2} \sum_{ij} \ell_1(\psi^s_{ij} - \psi^t_{ij}),\quad \psi_{ij} = \|x_i - x_j\| / \mu

    with Huber's :math:`\ell_1` (:math:`\delta = 1`) and :math:`\mu` the mean of the nonzero distances.

    Args:
        student_feature: Shape ``[batch, ...]``, floating; flattened to one row per image.
        teacher_feature: Shape ``[batch, ...]``; all but ``batch`` may differ. Treated as a constant.

    Returns:
        A scalar, shape ``[]``; zero where both features are equal up to rotation and scale.

    Raises:
        ValueError: If the batches differ, or a feature has no dimension besides the batch.

    References:
        Park et al., `Relational Knowledge Distillation <https://arxiv.org/abs/1904.05068>`_, 2019, equations 5 to 8.

    Note:
        Images with equal features have distance zero, and no gradient flows through it.
    """
    check_features(student_feature, teacher_feature)
    student, teacher = (_mean_distances(rows) for rows in (student_feature, given(teacher_feature)))
    return functional.smooth_l1_loss(student, teacher)


@in_full_precision
def angle_relation_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Return how much the angles formed by three images of a batch differ (RKD-A).

    .. math:: L = \frac1{B^3} \sum_{ijk} \ell_1(a^s_{ijk} - a^t_{ijk}),\quad
              a_{ijk} = \langle e_{ij}, e_{ik} \rangle,\quad e_{ij} = (x_j - x_i) / \|x_j - x_i\|

    Args:
        student_feature: Shape ``[batch, ...]``, floating; flattened to one row per image. Memory grows with
            ``batch ** 3``.
        teacher_feature: Likewise.

    Returns:
        A scalar, shape ``[]``; zero where both features are equal up to rotation, shift and scale.

    Raises:
        ValueError: If the batches differ, or a feature has no dimension besides the batch.

    References:
        Park et al. 2019, equations 9 to 11.

    Note:
        The direction between equal features is zero, and no gradient flows through it.
    """
    check_features(student_feature, teacher_feature)
    student, teacher = (_angles(rows) for rows in (student_feature, given(teacher_feature)))
    return functional.smooth_l1_loss(student, teacher)


@in_full_precision
def probabilistic_transfer_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Return the divergence of the probabilities that an image of the batch is another's neighbor (PKT).

    .. math:: L = \frac1{B^2} \sum_{ij} P_{ij} \ln \frac{P_{ij} + \epsilon}{Q_{ij} + \epsilon},\quad
              P_{ij} = \frac{k_{ij}}{\sum_j k_{ij}},\quad
              k_{ij} = \frac12 + \frac{\langle x_i, x_j \rangle}{2 (|x_i| + \epsilon)(|x_j| + \epsilon)}

    with :math:`\epsilon = 10^{-7}`, as in the released code.

    Args:
        student_feature: Shape ``[batch, ...]``, gives :math:`Q`.
        teacher_feature: Shape ``[batch, ...]``, gives :math:`P`. Treated as a constant.

    Returns:
        A scalar, shape ``[]``, in nats.

    Raises:
        ValueError: If the batches differ, or a feature has no dimension besides the batch.

    References:
        Passalis, Tefas, `Learning Deep Representations with Probabilistic Knowledge Transfer
        <https://arxiv.org/abs/1803.10837>`_, 2018, equations 3, 5 and 6.

    Note:
        An image whose feature is all zero has cosine 0 with every other, and gets no gradient.
    """
    check_features(student_feature, teacher_feature)
    both = [offset_unit_rows(rows.flatten(1), PKT_EPSILON) for rows in (student_feature, given(teacher_feature))]
    student, teacher = (_rows_to_one(_cosine_kernel(units)) for units in both)
    return (teacher * torch.log((teacher + PKT_EPSILON) / (student + PKT_EPSILON))).mean()


def _cosine_kernel(units: Tensor) -> Tensor:
    """Return ``(cosine + 1) / 2`` of all pairs; rounding may take opposite rows below 0, which has no logarithm."""
    return ((units @ units.T + 1) / 2).clamp_min(0)


def _mean_distances(feature: Tensor) -> Tensor:
    apart = distances(feature.flatten(1))
    count = (apart.detach() > 0).sum().clamp_min(1)
    mean = apart.sum() / count
    return apart / torch.where(mean > 0, mean, torch.ones_like(mean))


def _angles(feature: Tensor) -> Tensor:
    """Return the cosine of the angle at each image between each two others, ``[batch, batch, batch]``.

    Uses products of all pairs, so that no tensor of ``batch ** 2`` differences is needed. Such products cancel where
    two images are close together, so they are computed in float64 (where the device has it). Angles do not depend on
    shift and scale; both are removed first, for precision.
    """
    rows = feature.flatten(1)
    rows = rows if rows.device.type == "mps" else rows.double()
    rows = rows - rows.detach().mean(0)
    rows = rows / rows.detach().abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
    apart = distances(rows)
    inverse = torch.where(apart > 0, 1 / torch.where(apart > 0, apart, torch.ones_like(apart)), torch.zeros_like(apart))
    products = rows @ rows.T
    at_corner = products.diagonal()[:, None, None] + products[None] - products[:, :, None] - products[:, None]
    return (at_corner * inverse[:, :, None] * inverse[:, None]).to(feature.dtype)


def _rows_to_one(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum(1, keepdim=True)
