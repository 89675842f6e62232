"""Joint distillation and domain adaptation as a method: it handles the phases without their own terms."""

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
    """The teacher adapts to an unlabeled domain, and the student follows it on both domains.

    Deviations from the released code: the student's loss does not update the teacher, divergences are from the
    teacher to the student, and no test image is used to choose an epoch.
    """

    @property
    def why_one_device(self) -> str:
        """Return why a batch cannot be split across devices."""
        return "the discrepancy of features compares all images of both domains, but only those of one domain are split"

    @property
    def settings(self) -> AdaptationConfig:
        """Return the section of the config."""
        return cast(AdaptationConfig, self.config.student.adaptation)

    @property
    def trains_teacher(self) -> bool:
        """Return True."""
        return True

    def faults(self) -> Iterable[str]:
        """Return faults of the config for the method."""
        return config_faults(self.config)

    def images(self, splits: Splits) -> Splits:
        """Return the images unchanged.

        Raises:
            ValueError: If there are no images of the unseen domain.
        """
        require_target(splits)
        return splits

    def source(self, context: Context) -> Callable[[Job], Source]:  # noqa: ARG002
        """Return the source of batches from both domains."""
        return PairedSource

    def float_twin(self, role: StudentRole) -> Role:
        """Return the float net that the student starts from, which is adapted, too."""
        return AdaptedFloatRole(role)

    def takes(self, phase: PhaseConfig) -> bool:
        """Return whether a phase lacks its own terms."""
        return phase.terms is None

    def prepare(self, lesson: Lesson) -> None:
        """Set up the teacher to learn with the student."""
        self.partners = (Partner("teacher", lesson.teacher, self.settings.teacher_lr_factor),)

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:  # noqa: ARG002
        """Return the step of both nets on both domains."""
        images = len(lesson.splits.train)
        epochs = sum(one.epochs for one in lesson.phases)
        steps = images // max(1, min(self.config.data.batch_size, images))
        smoothing = self.config.student.train.label_smoothing
        return AdaptationStep(
            lesson.student, lesson.teacher, self.settings, epochs=epochs, steps=steps, label_smoothing=smoothing
        )

    def enter(self, lesson: Lesson, phase: PhaseConfig) -> None:
        """Set up the teacher to learn."""
        lesson.teacher.train(self.takes(phase))
