"""How steep the blocks of a net are: Lipschitz constants from features, and LONDON's loss in our reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkd.losses.checks import check_count, check_feature_lists
from qkd.losses.given import given
from qkd.losses.stable import in_full_precision, row_norms, unit_rows

ITERATIONS = 10


@in_full_precision
def lipschitz_constants(features: Sequence[Tensor], *, iterations: int = ITERATIONS) -> Tensor:
    r"""Return a constant for each block between two features: the spectral norm of its transmitting matrix's root.

    .. math:: c_l = \sigma_{\max}(X_l^\top Y_l) = \sqrt{\| (X_l^\top Y_l)^\top (X_l^\top Y_l) \|_2}

    where :math:`X_l` and :math:`Y_l` hold one image per row, of length 1: the input and output of the block. Power
    iteration finds the vector, through which no gradient flows; the matrix itself is never formed. It approaches the
    constant from below, quickly for features that are never negative. Otherwise ten steps may stop several percent
    short.

    Args:
        features: In network order, at least two, shape ``[batch, ...]`` each, floating.
        iterations: Steps of the power iteration, at least 1. It starts from the rows' sum and, since the sum may be
            orthogonal to the vector, also from fixed random numbers, and takes the better of the two.

    Returns:
        One per block, shape ``[features - 1]``; 0 for features of zeros.

    Raises:
        ValueError: If there are fewer than two features, batches differ, or ``iterations`` is below 1.

    References:
        Shang et al., Lipschitz Continuity Guided Knowledge Distillation, ICCV 2021 (the abstract; the formula is ours).

    Example:
        >>> rows = torch.eye(2)
        >>> round(lipschitz_constants([rows, rows]).item(), 5)
        1.0
    """
    check_feature_lists(features, features, least=2)
    check_count(iterations=iterations)
    rows = [unit_rows(feature.flatten(1)) for feature in features]
    return torch.stack([_spectral(*pair, iterations) for pair in zip(rows, rows[1:], strict=False)])


@in_full_precision
def lipschitz_loss(
    student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor], *, iterations: int = ITERATIONS
) -> Tensor:
    r"""Return how much steeper or flatter the student's blocks are than the teacher's (LONDON, our reading).

    .. math:: L = \frac1N \sum_l \Big( \frac{c_l^s - c_l^t}{c_l^t} \Big)^2

    Args:
        student_stages: The inputs and outputs of its blocks, in order, shape ``[batch, ...]`` each.
        teacher_stages: The same for the teacher, with as many blocks and the same batch; sizes may differ. Constants.
        iterations: Steps of the power iteration.

    Returns:
        A scalar, shape ``[]``; 0 where all constants agree. Blocks in which the teacher gives only zeros add nothing;
        :math:`N` counts them, too.

    Raises:
        ValueError: If the lists do not fit, or ``iterations`` is below 1.

    References:
        Shang et al., Lipschitz Continuity Guided Knowledge Distillation, ICCV 2021 (the abstract; the formula is ours).

    Example:
        >>> features = [torch.rand(4, 3), torch.rand(4, 5)]
        >>> lipschitz_loss(features, features).item()
        0.0
    """
    check_feature_lists(student_stages, teacher_stages, least=2)
    student = lipschitz_constants(student_stages, iterations=iterations)
    teacher = lipschitz_constants([given(one) for one in teacher_stages], iterations=iterations).to(student)
    steep = ~(teacher <= 0)  # NaNs stay, for the training loop to find
    relative = torch.where(steep, (student - teacher) / torch.where(steep, teacher, 1), torch.zeros_like(student))
    return relative.square().sum() / len(relative)


def _spectral(entering: Tensor, leaving: Tensor, iterations: int) -> Tensor:
    with torch.no_grad():
        drawn = torch.randn(leaving.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        vectors = unit_rows(torch.stack([leaving.sum(0), drawn.to(leaving)]))
        for _ in range(iterations):
            vectors = unit_rows(vectors @ leaving.T @ entering @ entering.T @ leaving)
        best = row_norms(vectors @ leaving.T @ entering).argmax()
    return row_norms(vectors[best] @ leaving.T @ entering)
