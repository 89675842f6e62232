"""KD-SVD: how the main directions of neighboring features relate, compared between student and teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qkd.losses.checks import check_count, check_feature_lists, check_features
from qkd.losses.stable import in_full_precision

CANDIDATES = 4  # singular vectors of the student to match with the teacher's first one, as published
POWER_ROUNDS, POWERS_A_ROUND = 4, 8  # power iteration, checked for convergence after each round
BANDWIDTH = 8.0  # of the kernel exp(-difference ** 2 / 8)

WidthMatch = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@in_full_precision
def singular_vector_loss(
    student_stages: Sequence[Tensor],
    teacher_stages: Sequence[Tensor],
    *,
    candidates: int = CANDIDATES,
    module: WidthMatch | None = None,
) -> Tensor:
    r"""Return how differently the first singular vectors of neighboring features relate (KD-SVD).

    .. math:: L = \sum_{i \ge 2} \sum_{batch} \sum_{d, d'} (G^s_i[d, d'] - G^t_i[d, d'])^2,\quad
              G_i[d, d'] = \exp(-(v_i[d] - v_{i-1}[d'])^2 / 8)

    where :math:`v_i` is a right singular vector of feature i of an image, seen as a matrix
    ``[height * width, channels]``: the teacher's first, and of the student's first ``candidates`` the one that points
    most in the teacher's direction or against it, turned to it (:func:`aligned_vectors`).

    Args:
        student_stages: In network order, at least two, each ``[batch, channels, ...]``, floating. Height and
            width may differ from the teacher's.
        teacher_stages: Likewise; as many channels as the student's. Treated as constants.
        candidates: At least 1.
        module: Maps the student's features to the teacher's widths
            (:class:`~qkd.terms.width_adapters.WidthAdapters`), where these differ.

    Returns:
        A scalar, shape ``[]``: a sum over batch and pairs of channels, as published. It depends neither on the
        sign of singular vectors, which is arbitrary, nor on a feature's scale.

    Raises:
        ValueError: If there are fewer than two features, lists or batches differ in length, channels differ (after
            ``module``), or ``candidates`` is below 1.

    References:
        Lee, Kim, Song, `Self-supervised Knowledge Distillation Using Singular Value Decomposition
        <https://arxiv.org/abs/1807.06819>`_, 2018.

    Note:
        Published losses leave the teacher's sign to the library. We turn the teacher's vector so that its entries have
        a positive sum: for features after a ReLU, whose first vector has no mixed signs, nothing changes.
    """
    return vector_divergence(*aligned_pairs(student_stages, teacher_stages, candidates=candidates, module=module))


@in_full_precision
def vector_divergence(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Return the sum of squared differences of :func:`relation` over neighbors, batch and channels, shape ``[]``.

    Args:
        students: Vectors of each feature, in order, ``[batch, channels]`` each.
        teachers: Likewise.
    """
    ours, theirs = ([relation(*pair) for pair in _neighbors(vectors)] for vectors in (students, teachers))
    parts = [(mine - other).square().sum() for mine, other in zip(ours, theirs, strict=True)]
    return torch.stack(parts).sum()


def relation(vectors: Tensor, before: Tensor) -> Tensor:
    """Return ``exp(-(v[d] - w[d']) ** 2 / 8)``, shape ``[batch, channels, channels of the feature before]``."""
    return torch.exp(-(vectors.unsqueeze(2) - before.unsqueeze(1)).square() / BANDWIDTH)


@in_full_precision
def aligned_pairs(
    student_stages: Sequence[Tensor],
    teacher_stages: Sequence[Tensor],
    *,
    candidates: int = CANDIDATES,
    module: WidthMatch | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return student's and teacher's vectors of each feature, each ``[batch, channels]``; see :func:`aligned_vectors`.

    Raises:
        ValueError: As for :func:`singular_vector_loss`.
    """
    check_feature_lists(student_stages, teacher_stages, least=2)
    check_count(candidates=candidates)
    students = student_stages if module is None else module(student_stages)
    pairs = [
        aligned_vectors(student, teacher, candidates=candidates)
        for student, teacher in zip(students, teacher_stages, strict=True)
    ]
    return [student for student, _ in pairs], [teacher for _, teacher in pairs]


def aligned_vectors(
    student_feature: Tensor, teacher_feature: Tensor, *, candidates: int = CANDIDATES
) -> tuple[Tensor, Tensor]:
    """Return the student's vector closest to the teacher's first right singular vector, and the latter.

    Of the student's first ``candidates`` vectors the one with the largest absolute cosine is taken, times the
    cosine's sign (0 where all are orthogonal, as published).

    Args:
        student_feature: Shape ``[batch, channels, ...]``, floating.
        teacher_feature: Likewise, as many channels. Treated as a constant.
        candidates: At least 1.

    Returns:
        Two tensors ``[batch, channels]`` with rows of norm 1; rows of zeros for images whose feature is zero.

    Raises:
        ValueError: If the batches or the channels differ, or a feature has no dimension besides the batch.
    """
    check_features(student_feature, teacher_feature)
    if student_feature.shape[1] != teacher_feature.shape[1]:
        raise ValueError(
            f"singular vectors are compared channel by channel, but the student's feature has "
            f"{student_feature.shape[1]} channels and the teacher's {teacher_feature.shape[1]}: "
            f"tap layers of the same width, or give a module that maps the student's"
        )
    teacher = main_direction(teacher_feature)
    vectors = right_singular_vectors(student_feature, candidates)
    cosines = (vectors.detach() * teacher.to(vectors.dtype).unsqueeze(1)).sum(2)
    chosen = cosines.abs().argmax(1, keepdim=True)
    sign = cosines.gather(1, chosen).sign()
    return vectors[torch.arange(len(vectors), device=vectors.device), chosen[:, 0]] * sign, teacher


@in_full_precision
def main_direction(feature: Tensor) -> Tensor:
    """Return the first right singular vector of each image, ``[batch, channels]``, a constant whose sum is positive."""
    feature = feature.detach()
    vectors = _by_powers(_matrix(feature))
    vectors = right_singular_vectors(feature, 1)[:, 0] if vectors is None else vectors
    return torch.where(vectors.sum(1, keepdim=True) < 0, -vectors, vectors)


@in_full_precision
def right_singular_vectors(feature: Tensor, count: int) -> Tensor:
    """Return the first right singular vectors of each image's matrix ``[positions, channels]``.

    The gradient is that of the decomposition through the vectors alone; pairs of singular values that are equal to
    rounding contribute nothing (their vectors may turn into each other freely), so it is always finite.

    Args:
        feature: Shape ``[batch, channels, ...]``, floating.
        count: How many; at most the length of the smaller side.

    Returns:
        Shape ``[batch, count, channels]``, by decreasing singular value, of arbitrary sign. Vectors are zeros where the
        singular value is zero within rounding (any other choice would be arbitrary): where its square is at most the
        precision times the longer side, relative to the first. In float32, that is 1.1 % of the first singular value
        for 1,024 positions.
    """
    with torch.autocast(feature.device.type, enabled=False):
        return _SingularVectors.apply(_matrix(feature), count)  # type: ignore[no-any-return]


def _matrix(feature: Tensor) -> Tensor:
    """Return a feature as ``[batch, positions, channels]``, in single precision at least."""
    rows = feature.flatten(2) if feature.dim() > 2 else feature.unsqueeze(2)
    return rows.mT


def _by_powers(matrix: Tensor) -> Tensor | None:
    """Return the first right singular vectors of matrices without negative entries by power iteration, if it converges.

    It costs a third of a decomposition. Without negative entries the first vector has none either, so that a start
    without zeros cannot miss it; a matrix that does not converge to rounding (equal singular values, say) gives None.
    """
    size = matrix.amax((1, 2), keepdim=True)
    if not bool((matrix.amin() >= 0) & size.isfinite().all()):
        return None
    scaled = matrix / torch.where(size > 0, size, 1)
    is_wide = matrix.shape[2] > matrix.shape[1]
    with torch.autocast(matrix.device.type, enabled=False):
        gram = scaled @ scaled.mT if is_wide else scaled.mT @ scaled
        vectors = gram.sum(2, keepdim=True)
        least = torch.finfo(gram.dtype).eps * math.sqrt(gram.shape[1])
        for _ in range(POWER_ROUNDS):
            for _ in range(POWERS_A_ROUND):
                vectors = gram @ functional.normalize(vectors, dim=1)
            value, unit = vectors.norm(dim=1, keepdim=True), functional.normalize(vectors, dim=1)
            if bool(((gram @ unit - value * unit).norm(dim=1, keepdim=True) <= least * value).all()):
                return functional.normalize(scaled.mT @ unit if is_wide else unit, dim=1)[:, :, 0]
    return None


class _SingularVectors(torch.autograd.Function):
    """Right singular vectors from the eigenvectors of the smaller of the two Gram matrices.

    With C = A^T A, eigenvalues l, and g the gradient of vector v_i, perturbation theory gives
    w = sum over j of v_j (v_j . g) / (l_i - l_j), and the gradient of A is A (w v_i^T + v_i w^T).
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, count: int) -> Tensor:
        size = torch.linalg.vector_norm(matrix, torch.inf, (1, 2), keepdim=True)
        finite = size.isfinite()
        size = torch.where(finite & (size > 0), size, torch.ones_like(size))
        scaled = torch.where(finite, matrix, 0) / size  # vectors are scale-free, but squares overflow
        values, vectors = _decompose(scaled)
        ctx.save_for_backward(scaled, values, vectors, size)
        # non-finite values are for the training loop to find
        return torch.where(finite, vectors[:, :, :count].mT, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scaled, values, vectors, size = ctx.saved_tensors
        count = gradient.shape[1]
        least = torch.finfo(values.dtype).eps * values[:, :1, None]
        along = gradient @ vectors
        gaps = values[:, :count, None] - values[:, None, :]
        inside = (along * _reciprocal(gaps, least)) @ vectors.mT
        outside = (gradient - along @ vectors.mT) * _reciprocal(values[:, :count, None], least)  # eigenvalue zero
        own = vectors[:, :, :count].mT
        turn = (inside + outside) * (own != 0).any(2, keepdim=True)
        result = ((scaled @ turn.mT) @ own + (scaled @ own.mT) @ turn) / size
        # Only a feature of 1e-33 and less has a gradient beyond float32; as published, it is ignored.
        return torch.nan_to_num(result, nan=torch.nan, posinf=0.0, neginf=0.0), None


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues of A^T A, falling, and their vectors in columns; zeros for those in its kernel."""
    rows, columns = matrix.shape[1:]
    is_wide = columns > rows
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT if is_wide else matrix.mT @ matrix)
    values, vectors = values.flip(1).clamp_min(0), vectors.flip(2)
    least = torch.finfo(values.dtype).eps * max(rows, columns) * values[:, :1]
    kept = values > least
    if is_wide:
        vectors = matrix.mT @ vectors / torch.where(kept, values, 1).sqrt().unsqueeze(1)
    return values * kept, vectors * kept.unsqueeze(1)


def _reciprocal(gaps: Tensor, least: Tensor) -> Tensor:
    is_gap = gaps.abs() > least
    return torch.where(is_gap, 1 / torch.where(is_gap, gaps, 1), 0)


def _neighbors(vectors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(vectors[1:], vectors[:-1], strict=True))
