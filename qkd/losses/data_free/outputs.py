"""What a teacher's outputs say about generated images: how sure it is of each, and how evenly they cover classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_choice, check_logits
from qkd.losses.stable import in_full_precision, widened

LOGARITHMS = ("e", "10")


@in_full_precision
def one_hot_loss(teacher_logits: Tensor) -> Tensor:
    r"""Return how far the teacher's outputs are from one-hot: the cross-entropy with its own decisions.

    .. math:: L = -\frac1B \sum_b \log \max_k \sigma(v_b)_k

    RDSKD calls it authenticity, DAFL the one-hot loss. In nats, averaged over the batch; it tends to 0 for a teacher
    that is sure of every image.

    Args:
        teacher_logits: :math:`v`, shape ``[batch, classes]``, floating; the gradient flows into it.

    Returns:
        A scalar, shape ``[]``, in ``[0, ln classes]``.

    Raises:
        ValueError: If the shape is wrong, the batch is empty, or there are fewer than two classes.

    References:
        Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_, 2019.

    Example:
        >>> round(one_hot_loss(torch.zeros(2, 4)).item(), 4)  # ln 4
        1.3863
    """
    check_logits(teacher_logits, teacher_logits, least_classes=2)
    return functional.cross_entropy(teacher_logits, teacher_logits.detach().argmax(1))


@in_full_precision
def class_balance_loss(teacher_logits: Tensor, *, base: str = "e") -> Tensor:
    r"""Return the negative entropy of the batch's mean class probabilities: smallest if classes are equally frequent.

    .. math:: L = \sum_k \bar p_k \log \bar p_k,\quad \bar p = \frac1B \sum_b \sigma(v_b)

    Computed from logarithms, so that a class of probability 0 gives no NaN and keeps its gradient.

    Args:
        teacher_logits: :math:`v`, shape ``[batch, classes]``, floating; the gradient flows into it.
        base: Base of the logarithm: ``"e"`` (RDSKD, CMI, DFQ) or ``"10"`` (DAFL; 2.3026 times smaller).

    Returns:
        A scalar, shape ``[]``, in ``[-log classes, 0]``.

    Raises:
        ValueError: If the shape is wrong, the batch is empty, there are fewer than two classes, or ``base`` is
            unknown.

    References:
        Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_, 2019 (base 10 in its
        code); Han et al., RDSKD, 2021 (natural).

    Example:
        >>> round(class_balance_loss(torch.zeros(2, 4)).item(), 4)  # -ln 4
        -1.3863
    """
    check_logits(teacher_logits, teacher_logits, least_classes=2)
    check_choice("base", base, LOGARITHMS)
    logs = torch.logsumexp(functional.log_softmax(teacher_logits, dim=1), dim=0) - math.log(len(teacher_logits))
    entropy = (logs.exp() * logs).sum()
    return entropy / math.log(10) if base == "10" else entropy


@in_full_precision
def feature_activation_loss(teacher_feature: Tensor) -> Tensor:
    r"""Return DAFL's activation loss: minus the mean magnitude of the input to the teacher's last layer.

    .. math:: L = -\frac1N \sum |f|

    Args:
        teacher_feature: :math:`f`, shape ``[batch, ...]``, floating; the gradient flows into it.

    Returns:
        A scalar, shape ``[]``, at most 0.

    Raises:
        ValueError: If it is empty.

    References:
        Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_, 2019.

    Example:
        >>> feature_activation_loss(torch.tensor([[1.0, -3.0]])).item()
        -2.0
    """
    if teacher_feature.numel() == 0:
        raise ValueError(f"the feature is empty: {tuple(teacher_feature.shape)}; a loss is a mean over images")
    return -widened(teacher_feature).abs().mean()
