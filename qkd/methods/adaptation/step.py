"""A training step of teacher and student on images of two domains, one of them labeled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qkd.config import AdaptationConfig
from qkd.losses import (
    adapted_student_loss,
    adapting_teacher_loss,
    discrepancy_weight,
    mean_discrepancy_loss,
    student_share,
)
from qkd.methods.adaptation.source import target_of
from qkd.terms.taps import Taps
from qkd.training.job import Batch, StepResult
from qkd.training.supervised import LogitsGuard


class AdaptationStep:
    r"""The joint step.

    .. math:: L = (1 - b)(\mathrm{CE}(z_T(x_s), y) + g\, \mathrm{MMD}(f_T(x_s), f_T(x_t)))
              + b\, \big( a \tau^2 \mathrm{KL}_s + (1 - a)\, \mathrm{CE}(z_S(x_s), y) + \tau^2 \mathrm{KL}_t \big)

    with :math:`b` from 0.1 to 0.9, exponentially, and :math:`g = 2 / (1 + e^{-10 p}) - 1`, where :math:`p` is the
    fraction of training done: 0 at its first step, 1 at its last. The first summand updates only the teacher, the
    second only the student. Each net sees both domains in one forward pass, so that batch norm has the statistics of
    their mixture, in training and later (ours; the paper's choice was not available to us).

    Args:
        student: Gives logits ``[batch, classes]``; in train mode.
        teacher: The same; its parameters require gradients.
        settings: Temperature, shares, and which features to align.
        epochs: Number of epochs of the whole training.
        steps: Steps per epoch.
        label_smoothing: Share of a label that is spread over all classes, in both cross-entropies.

    Raises:
        ValueError: If the tap does not name a module of the teacher.

    References:
        arXiv 2005.07839, 2020.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        settings: AdaptationConfig,
        *,
        epochs: int,
        steps: int,
        label_smoothing: float = 0.0,
    ) -> None:
        self._student, self._teacher, self._settings = student, teacher, settings
        self._smoothing = label_smoothing
        self._steps, self._last = steps, max(1, epochs * steps - 1)
        self._taps = Taps(teacher, (settings.teacher_tap,), role="teacher")
        self._guard, self._student_guard = LogitsGuard(), LogitsGuard("the student")

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Register the forward hook of the teacher for the duration of a block."""
        with self._taps:
            yield

    def progress(self, batch: Batch) -> float:
        """Return the fraction of training done before a batch, in ``[0, 1]``."""
        return min(1.0, (batch.epoch * self._steps + batch.step) / self._last)

    def __call__(self, batch: Batch) -> StepResult:
        """Return the loss of both nets, its two parts, and the student's logits of the labeled images."""
        settings, count, progress = self._settings, len(batch.labels), self.progress(batch)
        images = torch.cat([batch.images, target_of(batch)])
        student, teacher = self._student(images), self._teacher(images)
        self._guard(teacher)
        self._student_guard(student)
        features = self._taps.take()[settings.teacher_tap]
        apart = mean_discrepancy_loss(features[:count], features[count:], kernel=settings.kernel)
        teaching = adapting_teacher_loss(
            teacher[:count], batch.labels, apart, progress=progress, label_smoothing=self._smoothing
        )
        learning = adapted_student_loss(
            student[:count], student[count:], teacher[:count], teacher[count:], batch.labels,
            progress=progress, temperature=settings.temperature, source_share=settings.source_share,
            label_smoothing=self._smoothing,
        )  # fmt: skip
        facts = {"discrepancy": apart.detach(), **_schedule(progress, apart)}
        terms = {"adapting_teacher": teaching, "adapted_student": learning}
        return StepResult(teaching + learning, terms, student[:count], facts=facts)


def _schedule(progress: float, like: Tensor) -> dict[str, Tensor]:
    return {
        "student_share": like.new_tensor(student_share(progress)),
        "discrepancy_weight": like.new_tensor(discrepancy_weight(progress)),
    }
