"""HSSAKD as a method: turned images, and branches of the teacher that learn with it, after it, or with the student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from qkd.config import PhaseConfig, RotationsConfig, RunConfig, TermConfig
from qkd.data import Splits
from qkd.image_size import side_of_square
from qkd.losses.turns import turn_images
from qkd.methods.method import Beside, Lesson, Method, TappedStep
from qkd.methods.rotations.branched import BranchedNet
from qkd.methods.rotations.branches import (
    JOINT_FILE,
    STAGE,
    branched_teacher,
    branches_file,
    fresh_branches,
    is_joint,
    load_branches,
    own_training,
    save_branches,
    taps_of,
)
from qkd.methods.rotations.step import BranchStep, PeerStep, RotationStep
from qkd.methods.rotations.training import BranchRole
from qkd.roles.nets import load_float
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.training import Partner, Phase
from qkd.training.assembly import WEIGHTS, Context


class Rotations(Method):
    """Method for the phases without their own terms."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._own = cast(RotationsConfig, config.student.rotations)
        self._learn: list[nn.Module] = []
        self._stay: list[nn.Module] = []

    def images(self, splits: Splits) -> Splits:
        """Return the images unchanged.

        Raises:
            ValueError: If they are not square: turned ones would have a different size.
        """
        side_of_square(splits.image_size, "student.rotations")
        return splits

    def calibration_images(self, images: Tensor) -> Tensor:
        """Return each image in four orientations."""
        return turn_images(images)

    @property
    def why_one_device(self) -> str:
        """Return an empty string: each image is turned by itself."""
        return ""

    @property
    def trains_teacher(self) -> bool:
        """Return whether teacher and student are peers."""
        return self._own.mode == "online"

    def sub_trainings(self, context: Context, before: str) -> Iterator[BranchRole]:
        """Yield the training of the teacher's branches, if they learn after it."""
        if before == "student" and own_training(self.config) is not None:
            yield BranchRole(context)

    def beside_teacher(self, net: nn.Module, splits: Splits) -> Beside | None:
        """Return the teacher's branches, if they learn with it.

        Raises:
            ValueError: If a tap does not name a module, or the config does not train the teacher.
        """
        if not is_joint(self.config):
            return None
        train = self.config.teacher.train
        if train is None:
            raise ValueError("teacher.train: missing; joint branches learn with the teacher")
        branches = fresh_branches(self.config, net, splits, "teacher")
        step = BranchStep(
            branched_teacher(self.config, net, branches), joint=True, label_smoothing=train.label_smoothing
        )

        def enter() -> None:
            branches.train()

        phase = Phase("with branches", train.epochs, step, enter, step.tapped)
        return Beside(
            phase,
            (Partner("branches", branches),),
            lambda folder: [save_branches(folder / JOINT_FILE, branches, self.config, splits)],
        )

    def require_source(self, source: Path) -> None:
        """Check that another run's teacher has branches that learned with it, on the modules that this config names.

        Raises:
            ValueError: If it has none, or they read other modules.
        """
        if not is_joint(self.config):
            return
        theirs = stored_config(source).student.rotations
        if theirs is None or theirs.teacher_branches is None or not theirs.teacher_branches.joint:
            raise ValueError(
                f"teacher.run: the teacher of {source} has no branches that learned with it, which "
                f"student.rotations.teacher_branches.joint reads; use `train` in place of `joint`, so that they learn "
                f"on the finished teacher"
            )
        if theirs.teacher_taps == self._own.teacher_taps:
            return
        net = load_float(source / "teacher" / WEIGHTS)
        there, here = (taps_of(config, net, "teacher") for config in (stored_config(source), self.config))
        if there != here:
            raise ValueError(
                f"student.rotations.teacher_taps: {', '.join(here)}, but the branches of {source} read "
                f"{', '.join(there)}; use the same"
            )

    def made_from(self, run: RunFolder) -> Mapping[str, Path]:
        """Return the teacher's branches, if it has them."""
        path = branches_file(run)
        return {} if path is None else {STAGE: path}

    def takes(self, phase: PhaseConfig) -> bool:
        """Return whether a phase lacks its own terms."""
        return phase.terms is None

    def prepare(self, lesson: Lesson) -> None:
        """Build the student's branches, and the teacher's or the peer's.

        Raises:
            ValueError: If taps cannot be used, or the teacher's trained branches are missing.
        """
        config, own, teacher = self.config, self._own, lesson.teacher
        mine = fresh_branches(config, lesson.net, lesson.splits, "student")
        learner = BranchedNet(
            lesson.student, mine, taps_of(config, lesson.net, "student"), tap_paths=lesson.student_paths, role="student"
        )
        smoothing = config.student.train.label_smoothing
        if own.mode == "offline":
            branches = None if lesson.run is None else load_branches(lesson.run, teacher, lesson.splits)
            if branches is None:
                raise ValueError("offline rotations learn from the teacher's trained branches, but there are none")
            branches.requires_grad_(False)
            taught = branched_teacher(config, teacher, branches)
            self._step: TappedStep = RotationStep(learner, taught, own, label_smoothing=smoothing, view=lesson.view)
            self.partners = (Partner("branches", mine),)
            self._learn, self._stay = [mine], [teacher, branches]
            return
        others = fresh_branches(config, teacher, lesson.splits, "teacher")
        peer = branched_teacher(config, teacher, others)
        self._step = PeerStep(learner, peer, own, label_smoothing=smoothing, view=lesson.view)
        self.partners = (Partner("branches", mine), Partner("teacher", teacher), Partner("teacher_branches", others))
        self._learn = [mine, teacher, others]

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:  # noqa: ARG002
        """Return the step on turned images."""
        return self._step

    def enter(self, lesson: Lesson, phase: PhaseConfig) -> None:  # noqa: ARG002
        """Train or freeze nets and branches."""
        if not self.takes(phase):
            return
        for module in self._learn:
            module.train()
        for module in self._stay:
            module.eval()
