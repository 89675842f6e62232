"""Joint distillation and domain adaptation as a method: it takes the phases without their own terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

from qkd.config import AdaptationConfig, PhaseConfig, TermConfig
from qkd.data import Splits
from qkd.methods.adaptation.checks import config_faults
from qkd.methods.adaptation.float_twin import AdaptedFloatRole
from qkd.methods.adaptation.source import PairedSource, require_target
from qkd.methods.adaptation.step import AdaptationStep
from qkd.methods.method import Lesson, Method, TappedStep
from qkd.training import Partner
from qkd.training.assembly import Context, Role
from qkd.training.job import Job, Source

if TYPE_CHECKING:
    from qkd.roles.learner import StudentRole


class Adaptation(Method):
    """The teacher adapts to a domain without labels, and the student follows it on both domains.

    Departures from the released code: the student's loss moves no teacher, divergences are from the teacher to the
    student, and no image of the test chooses an epoch.
    """

    @property
    def why_one_device(self) -> str:
        """Return why devices cannot share its batches."""
        return "the discrepancy of features compares all images of both domains, and only those of one are shared"

    @property
    def settings(self) -> AdaptationConfig:
        """Return the section of the config."""
        return cast(AdaptationConfig, self.config.student.adaptation)

    @property
    def trains_teacher(self) -> bool:
        """Return True."""
        return True

    def faults(self) -> Iterable[str]:
        """Return what of the config does not fit the method."""
        return config_faults(self.config)

    def images(self, splits: Splits) -> Splits:
        """Return the images unchanged.

        Raises:
            ValueError: If there are none of the unseen domain.
        """
        require_target(splits)
        return splits

    def source(self, context: Context) -> Callable[[Job], Source]:  # noqa: ARG002
        """Return what makes batches of both domains."""
        return PairedSource

    def float_twin(self, role: StudentRole) -> Role:
        """Return the float net that the student starts from: adapted, too."""
        return AdaptedFloatRole(role)

    def takes(self, phase: PhaseConfig) -> bool:
        """Return whether a phase lacks its own terms."""
        return phase.terms is None

    def prepare(self, lesson: Lesson) -> None:
        """Let the teacher learn beside the student."""
        self.partners = (Partner("teacher", lesson.teacher, self.settings.teacher_lr_factor),)

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:  # noqa: ARG002
        """Return the step of both nets on both domains."""
        images = len(lesson.splits.train)
        epochs = sum(one.epochs for one in lesson.phases)
        steps = images // max(1, min(self.config.data.batch_size, images))
        return AdaptationStep(lesson.student, lesson.teacher, self.settings, epochs=epochs, steps=steps)

    def enter(self, lesson: Lesson, phase: PhaseConfig) -> None:
        """Let the teacher learn."""
        lesson.teacher.train(self.takes(phase))
