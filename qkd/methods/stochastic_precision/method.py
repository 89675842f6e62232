"""Self-distillation from a stochastic-precision copy as a method: a term in addition to those of a phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from qkd.config import PhaseConfig, SelfDistillationConfig, TermConfig
from qkd.methods.method import Lesson, Method, TappedStep
from qkd.methods.stochastic_precision.step import SelfStep
from quantizers import Student


class StochasticPrecision(Method):
    """Method for the phases in which a student with a fixed teacher learns from a sum of terms."""

    brings_loss = False

    @property
    def why_one_device(self) -> str:
        """Return an empty string: its term is a mean over images, and the draws are the same on all devices."""
        return ""

    def takes(self, phase: PhaseConfig) -> bool:
        """Return whether the phase sums terms for the student."""
        is_fixed = phase.teacher_terms is None and phase.meta is None
        return is_fixed and phase.trains == "student" and phase.combine == "sum"

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:  # noqa: ARG002
        """Return the step of a phase: its terms, and the copy's term."""
        if not isinstance(lesson.student, Student):
            raise ValueError("student.self_distillation needs a low-bit student: a float net has no coarser copy")
        options = cast(SelfDistillationConfig, self.config.student.self_distillation)
        return SelfStep(lesson.distill_step(terms, first_epoch), lesson.student, options, seed=self.config.seed)
