"""Where teacher and student disagree: what an adversarial generator maximizes and DFAD's student minimizes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_choice, check_logits, check_temperature
from qkd.losses.given import given
from qkd.losses.stable import in_full_precision

MEASURES = ("divergence", "distance")
REDUCTIONS = ("batchmean", "mean")
JS_TEMPERATURE = 3.0  # of DeepInversion's competition
JS_FLOOR, JS_CEILING = 0.01, 0.99  # its probabilities are clamped to these, and not normalized again


@in_full_precision
def logit_distance_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Return DFAD's distance between logits: the mean of their absolute differences.

    .. math:: L = \frac{1}{B K} \sum |z_s - z_t|

    Args:
        student_logits: Shape ``[batch, classes]``, floating.
        teacher_logits: Same shape. Treated as a constant.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes differ.

    References:
        Fang et al., `Data-Free Adversarial Distillation <https://arxiv.org/abs/1912.11006>`_, 2019.

    Example:
        >>> logit_distance_loss(torch.zeros(1, 2), torch.tensor([[1.0, -3.0]])).item()
        2.0
    """
    check_logits(student_logits, teacher_logits)
    return functional.l1_loss(student_logits, given(teacher_logits))


@in_full_precision
def disagreement_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    measure: str = "divergence",
    reduction: str = "batchmean",
    temperature: float = 1.0,
) -> Tensor:
    r"""Return minus the distance between student and teacher: the adversarial loss of a generator.

    This is the student's own loss with the opposite sign: :math:`-\mathrm{KL}(\sigma(z_t/\tau) \| \sigma(z_s/\tau))`,
    without a factor :math:`\tau^2`, or minus :func:`logit_distance_loss`. Gradients flow into both sides.

    Args:
        student_logits: Shape ``[batch, classes]``, floating.
        teacher_logits: Same shape.
        measure: ``"divergence"`` (ZSKT, DFQ) or ``"distance"`` (DFAD: mean absolute difference of logits).
        reduction: Reduction of the divergence: ``"batchmean"`` (DFQ), or ``"mean"`` over batch times classes (ZSKT's
            code).
        temperature: Temperature of the divergence, positive.

    Returns:
        A scalar, shape ``[]``, at most 0.

    Raises:
        ValueError: If the shapes differ, or an option is out of range.

    References:
        Micaelli, Storkey, `Zero-shot Knowledge Transfer <https://arxiv.org/abs/1905.09768>`_, 2019; Fang et
        al., `Data-Free Adversarial Distillation <https://arxiv.org/abs/1912.11006>`_, 2019.

    Example:
        >>> disagreement_loss(torch.zeros(1, 2), torch.tensor([[1.0, -3.0]]), measure="distance").item()
        -2.0
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    check_choice("measure", measure, MEASURES)
    check_choice("reduction", reduction, REDUCTIONS)
    if measure == "distance":
        return -functional.l1_loss(student_logits, teacher_logits)
    rows = _divergences(student_logits, teacher_logits, temperature)
    return -rows.sum() / (len(rows) if reduction == "batchmean" else student_logits.numel())


@in_full_precision
def decision_adversarial_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Return CMI's adversarial loss: minus the divergence, over images on whose class both nets agree.

    .. math:: L = -\frac1B \sum_b \mathrm{KL}(\sigma(z_t) \| \sigma(z_s))_b\;
              1\{\arg\max z_{t,b} = \arg\max z_{s,b}\}

    Args:
        student_logits: Shape ``[batch, classes]``, floating; the gradient flows into both sides.
        teacher_logits: Same shape.

    Returns:
        A scalar, shape ``[]``, at most 0: the mean is over all images.

    Raises:
        ValueError: If the shapes differ.

    References:
        Fang et al., `Contrastive Model Inversion <https://arxiv.org/abs/2105.08584>`_, 2021.

    Example:
        >>> z = torch.tensor([[1.0, -3.0]])
        >>> decision_adversarial_loss(-z, z).item()  # they disagree, so the image is ignored
        -0.0
    """
    check_logits(student_logits, teacher_logits)
    agree = (student_logits.argmax(1) == teacher_logits.argmax(1)).to(student_logits.dtype)
    return -(_divergences(student_logits, teacher_logits, 1.0) * agree).mean()


@in_full_precision
def competition_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = JS_TEMPERATURE) -> Tensor:
    r"""Return Adaptive DeepInversion's competition: 1 minus the Jensen-Shannon divergence of both nets, as released.

    .. math:: L = 1 - \mathrm{clamp}_{[0,1]}\big( \tfrac12 \mathrm{KL}(M \| P) + \tfrac12 \mathrm{KL}(M \| Q) \big)

    with :math:`P = \sigma(z_s/\tau)`, :math:`Q = \sigma(z_t/\tau)`, :math:`M = (P + Q)/2`, each clamped to
    ``[0.01, 0.99]`` (and not normalized again), a mean over the batch. The argument order follows the released code;
    the textbook form is :math:`\mathrm{KL}(P \| M)`.

    Args:
        student_logits: Shape ``[batch, classes]``, floating; the gradient flows into both sides.
        teacher_logits: Same shape.
        temperature: :math:`\tau > 0`.

    Returns:
        A scalar, shape ``[]``, in ``[0, 1]``.

    Raises:
        ValueError: If the shapes differ, or ``temperature`` is not positive and finite.

    References:
        Yin et al., `Dreaming to Distill <https://arxiv.org/abs/1912.08795>`_, 2020.

    Example:
        >>> z = torch.tensor([[1.0, -3.0]])
        >>> competition_loss(z, z).item()
        1.0
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    student, teacher = (torch.softmax(z / temperature, dim=1) for z in (student_logits, teacher_logits))
    middle = ((student + teacher) / 2).clamp(JS_FLOOR, JS_CEILING)
    sides = torch.stack((student, teacher)).clamp(JS_FLOOR, JS_CEILING)
    divergence = (middle * (middle.log() - sides.log())).sum()  # of both sides
    return 1 - (divergence / (2 * len(student_logits))).clamp(0, 1)


def _divergences(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) of each image, shape ``[batch]``, with gradients into both."""
    student, teacher = (torch.log_softmax(z / temperature, dim=1) for z in (student_logits, teacher_logits))
    return (teacher.exp() * (teacher - student)).sum(1)
