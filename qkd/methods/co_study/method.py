"""Co-study as a method: a phase with terms for the teacher, too."""

from __future__ import annotations

from collections.abc import Sequence

from qkd.config import PhaseConfig, TermConfig
from qkd.methods.co_study.step import CoStudyStep
from qkd.methods.method import Lesson, Method, TappedStep
from qkd.roles.nets import blank_images
from qkd.terms.modules import build_bank
from qkd.training import Partner


class CoStudy(Method):
    """Method for the phases with ``teacher_terms``; the teacher is a partner for the whole training."""

    brings_loss = False

    @property
    def why_one_device(self) -> str:
        """Return an empty string: both nets learn from one loss."""
        return ""

    @property
    def trains_teacher(self) -> bool:
        """Return True."""
        return True

    def takes(self, phase: PhaseConfig) -> bool:
        """Return whether the teacher has terms in a phase."""
        return phase.teacher_terms is not None

    def prepare(self, lesson: Lesson) -> None:
        """Build the modules of the teacher's terms."""
        studies = [phase for phase in lesson.phases if self.takes(phase)]
        terms = [term for phase in studies for term in phase.teacher_terms or ()]
        images = blank_images(lesson.splits, next(lesson.student.parameters()).device)
        self._bank = build_bank(lesson.teacher, lesson.net, terms, images, seed=self.config.seed)
        modules = (Partner("teacher_terms", self._bank.modules),) if len(self._bank.modules) else ()
        factor = studies[0].teacher_lr_factor  # the same in all
        self.partners = (*modules, Partner("teacher", lesson.teacher, factor))

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:
        """Return the step of both nets."""
        taught = lesson.terms(phase.teacher_terms or (), self._bank)
        return CoStudyStep(
            lesson.student, lesson.teacher, lesson.terms(terms), taught,
            view=lesson.view, tap_paths=lesson.student_paths, first_epoch=first_epoch,
        )  # fmt: skip

    def enter(self, lesson: Lesson, phase: PhaseConfig) -> None:
        """Set up the teacher to learn."""
        lesson.teacher.train(self.takes(phase))
