"""A training step of a student with a teacher, plus a term from its own copy at stochastic precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from qkd.config import SelfDistillationConfig
from qkd.losses.checks import check_logits, check_temperature
from qkd.losses.stable import in_full_precision
from qkd.methods.method import TappedStep
from qkd.seeding import stream
from qkd.training import Batch, StepResult
from quantizers import Student
from quantizers.recipes.precision import stochastic_precision

TERM = "self_distillation"


class SelfStep:
    """The step of a phase, with the term of SPEQ.

    Args:
        base: The step without it.
        student: The net that both forward passes use.
        options: Weight, temperature, and the probability that an activation keeps its bits.
        seed: The run's.
    """

    def __init__(self, base: TappedStep, student: Student, options: SelfDistillationConfig, *, seed: int) -> None:
        self._base, self._student, self._options, self._seed = base, student, options, seed

    def tapped(self) -> AbstractContextManager[object]:
        """Register the hooks of the step for the duration of a block."""
        return self._base.tapped()

    def __call__(self, batch: Batch) -> StepResult:
        """Return loss, terms and the student's logits for a batch."""
        result: StepResult = self._base(batch)
        generator = stream(self._seed, "self distillation", batch.epoch, batch.step)  # the same on every device
        with stochastic_precision(self._student, generator, low_share=self._options.low_share), torch.no_grad():
            copy = self._student(batch.images)
        term = soft_cosine_loss(result.logits, copy, temperature=self._options.temperature)
        total = result.loss + self._options.weight * term
        knowledge = None if result.knowledge is None else result.knowledge + self._options.weight * term
        return replace(result, loss=total, terms={**result.terms, TERM: term}, knowledge=knowledge)


@in_full_precision
def soft_cosine_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Return the cosine distance of two softened distributions, averaged over the batch.

    .. math:: L = \tau^2 \left(1 - \frac{p_s \cdot p_t}{|p_s||p_t|}\right),\quad p = \sigma(z / \tau)

    Args:
        student_logits: Unnormalized scores, shape ``[batch, classes]``, floating.
        teacher_logits: Same shape. Treated as a constant: no gradient flows into it.
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        A scalar, shape ``[]``, in ``[0, temperature ** 2]``. Exactly zero where both distributions agree.

    Raises:
        ValueError: If the shapes differ, or ``temperature`` is not positive.

    References:
        Boo, Shin, Choi, Sung, `Stochastic Precision Ensemble <https://arxiv.org/abs/2009.14502>`_, 2021.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    student = (student_logits / temperature).softmax(1)
    teacher = (teacher_logits.detach() / temperature).softmax(1)
    # of unit vectors, 1 - cos is half their squared distance: exactly 0 if they are equal
    apart = functional.normalize(student, dim=1) - functional.normalize(teacher, dim=1)
    return temperature**2 * 0.5 * apart.square().sum(1).mean()
