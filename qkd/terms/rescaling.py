r"""Track how much a loss's soft targets rescale each image's gradient: :math:`w_t` of Tang et al. 2020.

The gradient of an image is here the sum, over the wrong classes, of the gradients with respect to the student's logits:
:math:`1 - q_t` for the cross-entropy with the labels, with :math:`q_t` the student's probability of the true class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qkd.config import TermConfig
from qkd.losses.checks import check_labels, check_logits
from qkd.losses.stable import log_others, target_difference
from qkd.terms.weighting import Outputs

# An image counts toward the mean of w_t while its wrong classes have at least this probability. Below that, the label's
# gradient is almost zero, and the ratio only reflects how small it is: on digits, whose images are learned within a few
# epochs, most values were beyond +-10.
LEAST_DOUBT = 0.05
DEFAULT_TEMPERATURE = 4.0
# Losses whose gradient by the logits, summed over the wrong classes, is that of soft targets of the true class.
RESCALING_LOSSES = ("soft_target", "teacher_confidence")


@dataclass(frozen=True)
class SoftTerm:
    """A term with soft targets.

    Args:
        weight: Factor in the sum, positive.
        temperature: Positive.
        scale: :math:`c`; None for the temperature squared.
        is_mean: Whether it is also divided by the number of classes.
    """

    weight: float
    temperature: float
    scale: float | None = None
    is_mean: bool = False


@dataclass(frozen=True)
class SoftTargets:
    """The parts of a loss that rescale gradients.

    Args:
        hard_weight: Weight of the cross-entropy with the labels, not negative.
        terms: The soft terms, at least one.
    """

    hard_weight: float
    terms: tuple[SoftTerm, ...]

    @property
    def temperature(self) -> float:
        """Return the temperature of the heaviest term."""
        return max(self.terms, key=lambda term: term.weight).temperature

    @property
    def total_weight(self) -> float:
        """Return the sum of the weights."""
        return self.hard_weight + sum(term.weight for term in self.terms)


def soft_targets(terms: Sequence[TermConfig], *, epoch: int = 0) -> SoftTargets | None:
    """Return how a loss's terms rescale gradients at the logits; None if none of them has soft targets.

    All other terms are ignored, on features or on logits, and so is label smoothing of the cross-entropy.

    Args:
        terms: The terms in the config.
        epoch: Epoch of their phase, from 0, for weights that decay.
    """
    soft = tuple(_soft_term(term, epoch) for term in terms if term.loss in RESCALING_LOSSES and term.weight > 0)
    hard = sum(term.weight * term.decay**epoch for term in terms if term.loss == "cross_entropy")
    return SoftTargets(hard, soft) if soft else None


def image_gradients(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, targets: SoftTargets
) -> tuple[Tensor, Tensor]:
    r"""Return each image's gradients from the plain cross-entropy and from a loss, shape ``[batch]`` each.

    .. math:: g = 1 - q_t, \qquad
              g_L = \frac{a g + \sum_j b_j \frac{c_j}{\tau_j} (\tilde p_t - \tilde q_t)_{\tau_j}}{a + \sum_j b_j}

    with :math:`a` the weight of the cross-entropy and :math:`b_j` the weights of the soft targets. Their ratio is
    :math:`w_t = g_L / g`; with one term it is :func:`~qkd.losses.gradient_rescaling`.

    Args:
        student_logits: Shape ``[batch, classes]``.
        teacher_logits: Same shape.
        labels: Shape ``[batch]``, int64.
        targets: The loss.

    Returns:
        :math:`g` and :math:`g_L`, without a graph.

    Raises:
        ValueError: If shapes do not fit, or there are fewer than two classes.
    """
    check_logits(student_logits, teacher_logits, least_classes=2)
    check_labels(student_logits, labels)
    student, teacher = student_logits.detach(), teacher_logits.detach()
    is_target = functional.one_hot(labels, student.shape[1]).bool()
    hard = log_others(functional.log_softmax(student, dim=1), is_target).exp()
    total = targets.hard_weight * hard
    for term in targets.terms:
        scale = term.temperature**2 if term.scale is None else term.scale
        scale = scale / student.shape[1] if term.is_mean else scale
        logs = [functional.log_softmax(logits / term.temperature, dim=1) for logits in (teacher, student)]
        surer = target_difference(logs[0], logs[1], is_target)
        total = total + term.weight * scale / term.temperature * surer
    return hard, total / targets.total_weight


def rescaling_facts(hard: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Return means over images, from which :func:`summarize` gets :math:`w_t`; they can be averaged over steps.

    Args:
        hard: Gradients of the cross-entropy from :func:`image_gradients`, shape ``[images]``, at least one.
        loss: Gradients of the loss, same shape.

    Returns:
        ``hard_gradient`` and ``loss_gradient``: their means. ``w_counted``: share of the images whose ``hard`` is at
        least 0.05. ``w_sum`` and ``w_square``: means over *all* images of :math:`w_t` and its square, where images
        that do not count add 0. Shape ``[]`` each.

    Raises:
        ValueError: If there are no images, or the shapes differ.
    """
    if hard.dim() != 1 or len(hard) == 0 or hard.shape != loss.shape:
        raise ValueError(
            f"gradients must be [images], of at least one image, got {tuple(hard.shape)} and {tuple(loss.shape)}"
        )
    counts = hard >= LEAST_DOUBT
    w = torch.where(counts, loss / hard.clamp_min(LEAST_DOUBT), 0.0)
    return {
        "hard_gradient": hard.mean(),
        "loss_gradient": loss.mean(),
        "w_counted": counts.to(hard.dtype).mean(),
        "w_sum": w.mean(),
        "w_square": w.square().mean(),
    }


def summarize(facts: Mapping[str, float]) -> dict[str, float | None]:
    """Return a summary of :func:`rescaling_facts`, averaged over steps or not.

    Args:
        facts: Means over images.

    Returns:
        ``w_mean`` and ``w_std`` of the images that count; ``w_share``, their share; ``w_total``, the sum of the loss's
        gradients divided by that of the cross-entropy, over all images. None if the divisor is 0.
    """
    share, hard = facts["w_counted"], facts["hard_gradient"]
    mean = facts["w_sum"] / share if share > 0 else None
    variance = None if mean is None else max(0.0, facts["w_square"] / share - mean**2)
    return {
        "w_mean": mean,
        "w_std": None if variance is None else math.sqrt(variance),
        "w_share": share,
        "w_total": facts["loss_gradient"] / hard if hard > 0 else None,
    }


def step_facts(terms: Sequence[TermConfig], outputs: Outputs, *, epoch: int) -> Mapping[str, Tensor]:
    """Return :func:`rescaling_facts` of a training step; empty if a loss has no soft targets at its logits.

    It is also empty if images are mixed, since there is no single true class.

    Args:
        terms: The terms of the loss.
        outputs: The outputs of the step's forward passes.
        epoch: Epoch of the phase, from 0.
    """
    targets = soft_targets(terms, epoch=epoch)
    if targets is None or outputs.teacher_logits is None or outputs.other_labels is not None:
        return {}
    student, teacher = (logits.detach().float() for logits in (outputs.student_logits, outputs.teacher_logits))
    return rescaling_facts(*image_gradients(student, teacher, outputs.labels, targets))


def _soft_term(term: TermConfig, epoch: int) -> SoftTerm:
    scale = term.options.get("scale")
    return SoftTerm(
        term.weight * term.decay**epoch,
        float(term.options.get("temperature", DEFAULT_TEMPERATURE)),
        None if scale is None else float(scale),
        term.options.get("reduction") == "mean",
    )
