r"""Follow by how much a loss's soft targets re-scale each image's gradient: :math:`w_t` of Tang et al. 2020."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkd.config import TermConfig
from qkd.distill.losses import gradient_rescaling
from qkd.distill.terms import Outputs

RESCALING_LIMIT = 10.0  # where the student is sure, its own gradient is nearly zero and the ratio has no bound
DEFAULT_TEMPERATURE = 4.0
# Losses whose gradient by the logits, summed over the wrong classes, is that of soft targets of the true class.
RESCALING_LOSSES = ("soft_target", "teacher_confidence")


@dataclass(frozen=True)
class SoftTerm:
    """A term with soft targets.

    Args:
        weight: Factor in the sum, positive.
        temperature: Positive.
        scale: :math:`c`; None: the temperature squared.
        is_mean: Whether it is divided by the number of classes, too.
    """

    weight: float
    temperature: float
    scale: float | None = None
    is_mean: bool = False


@dataclass(frozen=True)
class SoftTargets:
    """What of a loss re-scales gradients.

    Args:
        hard_weight: Of the cross-entropy with the labels, not negative.
        terms: At least one.
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
    """Return what a loss's terms do to gradients at the logits; None where none of them has soft targets.

    Terms on features are left out, and so is label smoothing of the cross-entropy.

    Args:
        terms: As the config has them.
        epoch: Of their phase, from 0, for weights that decay.
    """
    soft = tuple(_soft_term(term, epoch) for term in terms if term.loss in RESCALING_LOSSES and term.weight > 0)
    hard = sum(term.weight * term.decay**epoch for term in terms if term.loss == "cross_entropy")
    return SoftTargets(hard, soft) if soft else None


def loss_rescaling(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, targets: SoftTargets) -> Tensor:
    r"""Return :math:`w_t` of each image for a loss of several terms, shape ``[batch]``, without gradient.

    It is the sum, over the wrong classes, of the loss's gradients by the student's logits, over that of the plain
    cross-entropy times the sum of the weights. With one term it is
    :func:`~qkd.distill.losses.gradient_rescaling`.

    Args:
        student_logits: Shape ``[batch, classes]``.
        teacher_logits: Same shape.
        labels: Shape ``[batch]``, int64.
        targets: The loss.

    Raises:
        ValueError: If shapes do not fit, or there are fewer than two classes.
    """
    total = torch.full_like(student_logits[:, 0], targets.hard_weight).detach()
    for term in targets.terms:
        scale = term.temperature**2 if term.scale is None else term.scale
        scale = scale / student_logits.shape[1] if term.is_mean else scale
        total = total + term.weight * gradient_rescaling(
            student_logits, teacher_logits, labels, teacher_share=1.0, temperature=term.temperature, scale=scale
        )
    return total / targets.total_weight


def rescaling_facts(rescaling: Tensor) -> Mapping[str, Tensor]:
    """Return mean, standard deviation and the 10, 50 and 90 % quantiles of :math:`w_t` over images.

    Values beyond +-10 count as +-10: where the student is almost sure, the ratio's denominator is almost zero.

    Args:
        rescaling: Of :func:`loss_rescaling`, shape ``[images]``, at least one.

    Returns:
        ``w_mean``, ``w_std``, ``w_p10``, ``w_p50``, ``w_p90``, shape ``[]`` each, float32. The quantiles are values of
        images (the nearest rank).

    Raises:
        ValueError: If there is no image.
    """
    if rescaling.dim() != 1 or len(rescaling) == 0:
        raise ValueError(f"needs w_t of at least one image, [images], got {tuple(rescaling.shape)}")
    w = rescaling.detach().float().clamp(-RESCALING_LIMIT, RESCALING_LIMIT)
    ordered = w.sort().values
    low, middle, high = (ordered[round((len(w) - 1) * share)] for share in (0.1, 0.5, 0.9))
    return {"w_mean": w.mean(), "w_std": w.std(correction=0), "w_p10": low, "w_p50": middle, "w_p90": high}


def step_facts(terms: Sequence[TermConfig], outputs: Outputs, *, epoch: int) -> Mapping[str, Tensor]:
    """Return :func:`rescaling_facts` of a training step; empty where a loss has no soft targets at its logits.

    Empty, too, where images are mixed: there is no one true class.

    Args:
        terms: Of the loss.
        outputs: Of the step's forward passes.
        epoch: Of the phase, from 0.
    """
    targets = soft_targets(terms, epoch=epoch)
    if targets is None or outputs.teacher_logits is None or outputs.other_labels is not None:
        return {}
    student, teacher = (logits.detach().float() for logits in (outputs.student_logits, outputs.teacher_logits))
    return rescaling_facts(loss_rescaling(student, teacher, outputs.labels, targets))


def _soft_term(term: TermConfig, epoch: int) -> SoftTerm:
    scale = term.options.get("scale")
    return SoftTerm(
        term.weight * term.decay**epoch,
        float(term.options.get("temperature", DEFAULT_TEMPERATURE)),
        None if scale is None else float(scale),
        term.options.get("reduction") == "mean",
    )
