"""ZSKD's data impressions: class similarity from the teacher, targets drawn from it, and the loss of the images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_choice, check_temperature
from qkd.losses.stable import in_full_precision, unit_rows

COMPATS = ("paper", "released")
LEAST_CONCENTRATION = 1e-4


@in_full_precision
def class_similarity(class_weights: Tensor) -> Tensor:
    r"""Return how similar classes are to a teacher: cosines of its last layer's weights, scaled to ``[0, 1]``.

    Args:
        class_weights: Weights of the last linear layer, shape ``[classes, features]``, floating (the transpose of the
            paper's :math:`W`).

    Returns:
        Shape ``[classes, classes]``, symmetric, least entry 0, diagonal 1; ones where all classes are equal.

    Raises:
        ValueError: If the shape is wrong, or there are fewer than two classes.

    References:
        Nayak et al., `Zero-Shot Knowledge Distillation <https://arxiv.org/abs/1905.08114>`_, 2019.

    Example:
        >>> class_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if class_weights.dim() != 2 or len(class_weights) < 2:
        raise ValueError(f"needs weights [classes, features] of at least two classes, got {tuple(class_weights.shape)}")
    rows = unit_rows(class_weights)
    cosines = rows @ rows.T
    return _to_unit_range(cosines, cosines.min(), cosines.max())


@in_full_precision
def dirichlet_concentrations(similarity: Tensor, *, beta: float = 1.0, compat: str = "paper") -> Tensor:
    r"""Return the concentrations of the Dirichlet distribution that each class's targets are drawn from.

    .. math:: \alpha_c = \beta\, \mathrm{minmax}(C_c) + 10^{-4}

    Args:
        similarity: :math:`C` of :func:`class_similarity`, shape ``[classes, classes]``.
        beta: Positive; the paper draws half of the targets with 1 and half with 0.1.
        compat: ``"paper"``, or ``"released"``: there beta cancels in a second min-max and has no effect.

    Returns:
        One row per class, shape ``[classes, classes]``, positive.

    Raises:
        ValueError: If the shape is wrong, ``beta`` is not positive and finite, or ``compat`` is unknown.

    References:
        Nayak et al., `Zero-Shot Knowledge Distillation <https://arxiv.org/abs/1905.08114>`_, 2019.

    Example:
        >>> [round(one, 4) for one in dirichlet_concentrations(torch.eye(2), beta=0.5)[0].tolist()]
        [0.5001, 0.0001]
    """
    check_choice("compat", compat, COMPATS)
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) < 2:
        raise ValueError(
            f"needs similarities [classes, classes] of at least two classes, got {tuple(similarity.shape)}"
        )
    check_temperature(beta)  # positive and finite
    rows = _to_unit_range(similarity, similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True))
    return rows * (beta if compat == "paper" else 1.0) + LEAST_CONCENTRATION


@in_full_precision
def data_impression_loss(teacher_logits: Tensor, targets: Tensor, *, temperature: float = 20.0) -> Tensor:
    r"""Return the loss of ZSKD's images: the teacher's softened outputs against sampled targets.

    .. math:: L = -\frac1B \sum_b \sum_k y_{bk} \log \sigma(v_b / \tau)_k

    Args:
        teacher_logits: :math:`v`, shape ``[batch, classes]``, floating; the gradient flows into it.
        targets: :math:`y`, same shape, rows of probabilities; constants.
        temperature: :math:`\tau > 0`.

    Returns:
        A scalar, shape ``[]``, in nats: a cross-entropy (without :math:`\tau^2`), smallest where it equals the
        entropy of the targets.

    Raises:
        ValueError: If the shapes differ, or ``temperature`` is out of range.

    References:
        Nayak et al., `Zero-Shot Knowledge Distillation <https://arxiv.org/abs/1905.08114>`_, 2019.

    Example:
        >>> round(data_impression_loss(torch.zeros(1, 4), torch.full((1, 4), 0.25)).item(), 4)
        1.3863
    """
    if teacher_logits.dim() != 2 or teacher_logits.shape != targets.shape or targets.numel() == 0:
        raise ValueError(
            f"needs logits and targets of the same shape [batch, classes], got {tuple(teacher_logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    check_temperature(temperature)
    logs = functional.log_softmax(teacher_logits / temperature, dim=1)
    return -(targets.detach() * logs).sum(1).mean()


def _to_unit_range(values: Tensor, least: Tensor, most: Tensor) -> Tensor:
    span = most - least
    is_range = ~(span <= 0)  # NaNs stay
    return torch.where(is_range, (values - least) / torch.where(is_range, span, 1), torch.ones_like(values))
