"""Soft targets over very many classes, estimated from drawn ones: other rows of the last layer are not read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_choice, check_logits, check_temperature, is_count
from qkd.losses.given import given
from qkd.losses.stable import in_full_precision

PROPOSALS = ("difference", "teacher", "uniform")


class SampledClasses(NamedTuple):
    """Classes that a sum over all classes is estimated from: :func:`draw_classes` or :func:`every_class`.

    Args:
        classes: int64, shape ``[drawn]``; one may occur several times.
        weights: The weight of each in a sum, shape ``[drawn]``: ``1 / (drawn * probability)``.
    """

    classes: Tensor
    weights: Tensor


@in_full_precision
def class_proposal(
    student_probabilities: Tensor,
    teacher_probabilities: Tensor,
    *,
    kind: str = "difference",
    uniform_share: float = 0.1,
) -> Tensor:
    r"""Return the probabilities that classes are drawn with, for a whole batch.

    .. math:: \pi = (1 - u)\, \hat d + u / K

    Args:
        student_probabilities: :math:`q`, floating, shape ``[batch, classes]``, or running means ``[1, classes]``.
        teacher_probabilities: :math:`p`, same shape.
        kind: What :math:`\hat d`, which sums to 1, is proportional to: ``"difference"``: the mean of :math:`|p - q|`
            over the batch; ``"teacher"``: the mean of :math:`p`; ``"uniform"``: 1.
        uniform_share: :math:`u` in ``(0, 1]``: no class has probability 0, or estimates would be biased.

    Returns:
        Shape ``[classes]``, positive, sum 1.

    Raises:
        ValueError: If the shapes differ, there is no image or no class, a probability is negative (as logits are),
            ``kind`` is unknown, or ``uniform_share`` is outside ``(0, 1]``.

    References:
        Dynamic importance sampling: the abstract; its mixture over ranks was not available to us, so the form is ours.
        By the teacher: Sparse Logit Sampling, arXiv 2503.16870, 2025.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.5, 0.25, 0.25]])
        >>> [round(share, 4) for share in class_proposal(q, p, uniform_share=0.3).tolist()]
        [0.1, 0.45, 0.45]
    """
    check_logits(student_probabilities, teacher_probabilities)
    check_choice("kind", kind, PROPOSALS)
    if not 0 < uniform_share <= 1:
        raise ValueError(f"uniform_share must be in (0, 1], got {uniform_share=}")
    student, teacher = student_probabilities.detach(), teacher_probabilities.detach()
    if bool((student < 0).any()) or bool((teacher < 0).any()):
        raise ValueError("needs probabilities, got negative numbers; take the softmax of logits first")
    shapes = {"difference": (teacher - student).abs(), "teacher": teacher, "uniform": torch.ones_like(teacher)}
    sizes = shapes[kind].mean(0)
    total = sizes.sum()
    even = torch.full_like(sizes, 1 / len(sizes))
    is_positive = ~(total <= 0)  # NaNs stay, and draw_classes refuses them
    shares = torch.where(is_positive, sizes / torch.where(is_positive, total, 1), even)
    return (1 - uniform_share) * shares + uniform_share * even


def draw_classes(proposal: Tensor, count: int, generator: torch.Generator) -> SampledClasses:
    """Return classes drawn with replacement, and the weight of each.

    Args:
        proposal: Probabilities, shape ``[classes]``, positive and finite: those of :func:`class_proposal`. If they do
            not sum to 1, they are divided by their sum.
        count: How many, positive.
        generator: For the draws, on the CPU.

    Returns:
        The classes and weights ``1 / (count * probability)``, on the device of ``proposal``, at least float32.

    Raises:
        ValueError: If ``count`` is not positive, or a probability is not positive and finite.

    Example:
        >>> draw_classes(torch.full((4,), 0.25), 2, torch.Generator()).weights.tolist()
        [2.0, 2.0]
    """
    is_vector = proposal.dim() == 1 and proposal.is_floating_point()
    if not is_count(count) or not is_vector or not bool((proposal > 0).all() & proposal.isfinite().all()):
        raise ValueError(
            f"needs positive, finite probabilities [classes] and a positive count, an integer, got {proposal.dtype} "
            f"{tuple(proposal.shape)}, {count=}"
        )
    steps = proposal.double().cumsum(0)
    places = torch.rand(count, generator=generator, dtype=torch.float64).to(steps.device) * steps[-1]
    classes = torch.searchsorted(steps, places, right=True).clamp_max(len(proposal) - 1)
    weights = steps[-1] / (count * proposal[classes].double())
    return SampledClasses(classes, weights.to(torch.promote_types(proposal.dtype, torch.float32)))


def every_class(classes: int, device: torch.device | str = "cpu") -> SampledClasses:
    """Return all classes, each once: with them an estimate is the exact sum.

    Args:
        classes: How many there are, positive.
        device: The device of the result.

    Returns:
        The classes, and weights of 1.

    Raises:
        ValueError: If ``classes`` is not positive.

    Example:
        >>> every_class(3).classes.tolist()
        [0, 1, 2]
    """
    if classes < 1:
        raise ValueError(f"classes must be positive, got {classes}")
    return SampledClasses(torch.arange(classes, device=device), torch.ones(classes, device=device))


@in_full_precision
def estimated_log_normalizers(
    student_feature: Tensor,
    class_weights: Tensor,
    class_bias: Tensor | None,
    sampled: SampledClasses,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""Return the logarithm of each image's estimated sum of exponentials, a constant.

    .. math:: c = \log \sum_j w_j e^{z_{k_j}}

    Args:
        student_feature: The input to the last layer, shape ``[batch, features]``.
        class_weights: Weights of the last layer, shape ``[classes, features]``.
        class_bias: Bias of the last layer, shape ``[classes]``; None if it has none.
        sampled: A different draw from the one that the loss is estimated from.
        temperature: That of the loss, positive: logits, bias included, are divided by it.

    Returns:
        Shape ``[batch]``. With every class it is exact.

    Raises:
        ValueError: If features and weights do not fit, or ``temperature`` is not positive and finite.

    Example:
        >>> features, rows = torch.zeros(1, 2), torch.ones(4, 2)
        >>> round(estimated_log_normalizers(features, rows, None, every_class(4)).item(), 4)  # ln 4
        1.3863
    """
    check_temperature(temperature)
    with torch.no_grad():
        logits = _logits(student_feature, class_weights, class_bias, sampled.classes) / temperature
        return torch.logsumexp(logits + sampled.weights.to(logits).log(), dim=1)


@in_full_precision
def sampled_soft_target_loss(
    student_feature: Tensor,
    class_weights: Tensor,
    class_bias: Tensor | None,
    teacher_log_probabilities: Tensor,
    sampled: SampledClasses,
    log_normalizers: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""Return soft targets estimated from drawn classes: an unbiased estimate of a bound of the divergence.

    .. math:: L = \frac{\tau^2}{B} \sum_b \Big[ \sum_j w_j \big( p_{k_j} (\log p_{k_j} - z_{k_j})
                  + e^{z_{k_j} - c_b} \big) + c_b - 1 \Big]

    For any :math:`c` its mean over draws is at least :math:`\tau^2\, \mathrm{KL}(p \| q)`, and equal to it, value and
    gradient, where :math:`c = \log \sum_k e^{z_k}`: since the sum over classes is outside the logarithm, weights
    :math:`w` make it unbiased. Only drawn rows of the last layer are read. The gradient of ``class_weights`` is sparse
    if they are a parameter; it has all rows if they are computed from one, as those of a low-bit layer are.

    Args:
        student_feature: The input to the last layer, shape ``[batch, features]``, floating.
        class_weights: Weights of the last layer, shape ``[classes, features]``; for a low-bit layer, the dequantized
            ones.
        class_bias: Bias of the last layer, shape ``[classes]``; None if it has none.
        teacher_log_probabilities: :math:`\log p` of the drawn classes, at the temperature, shape ``[batch, drawn]``.
            Constants.
        sampled: The drawn classes with their weights.
        log_normalizers: :math:`c`, shape ``[batch]``: of :func:`estimated_log_normalizers` at the same temperature,
            with another draw, or exact. Constants.
        temperature: :math:`\tau > 0` of the student's logits; their factor is its square.

    Returns:
        A scalar, shape ``[]``, in nats.

    Raises:
        ValueError: If the shapes do not fit, or ``temperature`` is not positive and finite.

    References:
        Ours; importance weights as in arXiv 2503.16870, 2025.

    Example:
        >>> features, rows = torch.zeros(1, 2), torch.ones(4, 2)
        >>> targets, exact = torch.full((1, 4), 0.25).log(), torch.tensor([4.0]).log()
        >>> round(sampled_soft_target_loss(features, rows, None, targets, every_class(4), exact).item(), 6)
        0.0
    """
    check_temperature(temperature)
    batch = len(student_feature)
    if teacher_log_probabilities.shape != (batch, len(sampled.classes)) or log_normalizers.shape != (batch,):
        raise ValueError(
            f"needs the teacher's logarithms [batch, drawn] and normalizers [batch] of {batch} images and "
            f"{len(sampled.classes)} drawn classes, got {tuple(teacher_log_probabilities.shape)} and "
            f"{tuple(log_normalizers.shape)}"
        )
    logits = _logits(student_feature, class_weights, class_bias, sampled.classes) / temperature
    targets, constants = given(teacher_log_probabilities), log_normalizers.detach()
    terms = targets.exp() * (targets - logits) + (logits - constants[:, None]).exp()
    sums = (terms * sampled.weights.to(terms)).sum(1) + constants - 1
    return sums.mean() * temperature**2


def _logits(feature: Tensor, weights: Tensor, bias: Tensor | None, classes: Tensor) -> Tensor:
    if feature.dim() != 2 or weights.dim() != 2 or feature.shape[1] != weights.shape[1] or len(feature) == 0:
        raise ValueError(
            f"needs features [batch, features] and weights [classes, features], got {tuple(feature.shape)} and "
            f"{tuple(weights.shape)}"
        )
    if classes.device.type == "cpu" and not 0 <= int(classes.min()) <= int(classes.max()) < len(weights):
        raise ValueError(
            f"drawn classes must be 0 to {len(weights) - 1}, one per row of weights, got {classes.tolist()}"
        )
    if bias is not None and bias.shape != weights.shape[:1]:
        raise ValueError(f"needs one bias per class, {tuple(weights.shape[:1])}, got {tuple(bias.shape)}")
    # A sparse gradient has drawn rows only, but most operations cannot pass it on.
    rows = functional.embedding(classes, weights, sparse=weights.is_leaf)
    logits = feature @ rows.T
    return logits if bias is None else logits + bias.index_select(0, classes)
