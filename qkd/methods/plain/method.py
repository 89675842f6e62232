"""Plain distillation as a method: it handles every phase that no other method does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from qkd.config import PhaseConfig, TermConfig
from qkd.methods.method import Lesson, Method, TappedStep
from qkd.terms.combine import clipped_backward
from qkd.training import Batch, StepResult
from qkd.training.job import Backward, plain_backward


class Plain(Method):
    """A student with a fixed teacher; its loss is the weighted sum of a phase's terms."""

    brings_loss = False

    @property
    def why_one_device(self) -> str:
        """Return an empty string: its loss is a sum of terms."""
        return ""

    def takes(self, phase: PhaseConfig) -> bool:  # noqa: ARG002
        """Return True: it handles whatever no other method does."""
        return True

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:
        """Return the step of a phase, for the student or for the modules of its terms alone."""
        if phase.trains == "modules" and not lesson.terms(terms).has_modules:
            raise ValueError(
                f"phase {phase.name}: trains `modules`, but no term needs one at these taps; remove the phase"
            )
        return lesson.distill_step(terms, first_epoch, student_learns=phase.trains == "student")

    def backward(self, lesson: Lesson, phase: PhaseConfig) -> Backward:
        """Return the function that computes gradients: the sum's, or with the teacher-dependent ones clipped."""
        if phase.combine == "sum":
            return plain_backward
        # its epochs are counted through later phases
        start = lesson.start_of(lambda one: one.combine == "clipped")

        def backward(batch: Batch, result: StepResult, scale: Callable[[Tensor], Tensor]) -> None:
            if result.task is None or result.knowledge is None:
                raise ValueError("clipped gradients need terms with and without the teacher")
            parameters = lesson.student.parameters()
            clipped_backward(result.task, result.knowledge, scale, parameters, epoch=batch.epoch - start)

        return backward

    def enter(self, lesson: Lesson, phase: PhaseConfig) -> None:
        """Freeze the student if a phase trains only modules."""
        if phase.trains == "modules":
            lesson.student.eval()
