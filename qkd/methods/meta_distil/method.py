"""MetaDistil as a method: a quiz is held out, and the teacher learns from the student's result on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from qkd.config import MetaConfig, PhaseConfig, TermConfig
from qkd.data import Splits, take_quiz
from qkd.methods.meta_distil.quiz import Quiz
from qkd.methods.meta_distil.schedule import MetaSchedule
from qkd.methods.meta_distil.step import MetaStep
from qkd.methods.method import Lesson, Method, TappedStep
from qkd.training import Partner
from quantizers import quantizer_scales


class MetaDistil(Method):
    """Method for the phases with ``meta``; the teacher is a partner with its own optimizer."""

    brings_loss = False

    @property
    def trains_teacher(self) -> bool:
        """Return True."""
        return True

    @property
    def why_one_device(self) -> str:
        """Return why a batch cannot be split across devices: a quiz judges a student step on the whole batch."""
        return "MetaDistil differentiates the student's step on the whole batch, which no single device has"

    def images(self, splits: Splits) -> Splits:
        """Return the images without the quiz.

        Raises:
            ValueError: If there are not enough training images for the quiz.
        """
        images = self.config.student.quiz_images
        if images is None:
            return splits
        try:
            return take_quiz(splits, images, seed=self.config.seed)
        except ValueError as error:
            raise ValueError(f"student.phases: meta.{error}") from error

    def takes(self, phase: PhaseConfig) -> bool:
        """Return whether a phase has a quiz."""
        return phase.meta is not None

    def prepare(self, lesson: Lesson) -> None:
        """Build the teacher's optimizer; gradients reach its weights only within a step."""
        learning = [parameter for parameter in lesson.teacher.parameters() if parameter.requires_grad]
        lesson.teacher.requires_grad_(False)
        # its teacher's rate decreases through later phases
        self._taught_from = lesson.start_of(self.takes)
        first = next(phase.meta for phase in lesson.phases if phase.meta is not None)
        momentum, decay = first.teacher_momentum, first.teacher_weight_decay
        # each step sets the learning rate
        self._optimizer = torch.optim.SGD(learning, lr=0.0, momentum=momentum, weight_decay=decay)
        self.partners = (Partner("teacher", lesson.teacher, optimizer=self._optimizer),)

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:
        """Return the step that assumes, teaches and pilots."""
        splits, train, meta = lesson.splits, self.config.student.train, cast(MetaConfig, phase.meta)
        if splits.quiz is None:
            raise ValueError(f"phase {phase.name}: meta needs a quiz, but the images have none; see qkd.data.take_quiz")
        size = min(self.config.data.batch_size, len(splits.train))
        device = next(lesson.teacher.parameters()).device
        steps = len(splits.train) // size
        return MetaStep(
            lesson.student,
            lesson.teacher,
            lesson.terms(terms),
            Quiz(splits.quiz, batch_size=size, mean=splits.mean, std=splits.std, seed=self.config.seed, device=device),
            MetaSchedule(
                train, meta, steps_per_epoch=steps, lr_factor=phase.rate_factor, first_epoch=self._taught_from
            ),
            self._optimizer,
            order=meta.order,
            scales=lambda: quantizer_scales(lesson.student),
            scale_lr_factor=train.scale_lr_factor,
            view=lesson.view,
            tap_paths=lesson.student_paths,
            first_epoch=first_epoch,
        )

    def stretched(self, phase: PhaseConfig, factor: float, end: int) -> PhaseConfig:
        """Return a phase with a proportional start of its quiz, before the phase ends."""
        if phase.meta is None:
            return phase
        start = min(int(phase.meta.teacher_start_epoch * factor), end - 1)
        return phase.model_copy(update={"meta": phase.meta.model_copy(update={"teacher_start_epoch": start})})
