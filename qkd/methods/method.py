"""What a method of distillation is: the places of a run at which it may have its say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from qkd.config import PhaseConfig, RunConfig, TermConfig
from qkd.data import Splits
from qkd.progress import Progress
from qkd.run.folder import RunFolder
from qkd.terms.modules import ModuleBank
from qkd.terms.step import DistillStep
from qkd.terms.taps import tap_paths_of
from qkd.terms.teacher_memory import TeacherMemory, memory_for
from qkd.terms.weighting import WeightedTerms, build_terms
from qkd.training import Batch, Partner, Phase
from qkd.training.assembly import Context, Role
from qkd.training.job import Backward, Job, Source, plain_backward
from quantizers import Student

if TYPE_CHECKING:
    from qkd.roles.learner import StudentRole


class Synthesis(Protocol):
    """What makes images in the space that the teacher sees."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return normalized images, and the classes that they were made for; None where no class was asked for."""
        ...


class TappedStep(Protocol):
    """A training step with forward hooks."""

    def __call__(self, batch: Batch) -> Any:
        """Return the :class:`~qkd.training.StepResult` of a batch."""
        ...

    def tapped(self) -> AbstractContextManager[object]:
        """Hold the hooks within a block."""
        ...


@dataclass(frozen=True)
class Guide:
    """What the student of a run learns from, if it is trained yet.

    Args:
        load: Gives it in eval mode, on the CPU; raises FileNotFoundError where it is not there yet.
        files: Its weights, and those of the teachers behind it.
        net: A name of ``qkd ls nets``.
        words: A description for people.
        below: What it learned from itself, and what is looked at in its place before it is trained.
        untrained: What is said then.
    """

    load: Callable[[], nn.Module]
    files: tuple[Path, ...]
    net: str
    words: str
    below: Guide | None = None
    untrained: str = ""


@dataclass(frozen=True)
class Beside:
    """What learns with a net in that net's own training.

    Args:
        phase: Of the whole training.
        partners: What learns.
        save: Writes it into the net's folder; returns the files.
    """

    phase: Phase
    partners: tuple[Partner, ...]
    save: Callable[[Path], list[Path]]


@dataclass
class Lesson:
    """What the phases of a distillation are built from; methods share it.

    Args:
        config: Its ``student`` section has the loss terms.
        phases: Names, lengths and what is special about each.
        student: The net that is trained, low-bit or float.
        teacher: What it learns from.
        view: Gives the teacher's images; None where it sees the student's.
        net: The student's float net, on the student's device: the shapes of its features.
        splits: The images.
        run: The run folder, for what was trained before; None outside a run.
        weights: What the student starts from; None where that is random.
        bank: Modules of the terms of all phases.
    """

    config: RunConfig
    phases: Sequence[PhaseConfig]
    student: nn.Module
    teacher: nn.Module
    view: Callable[[Batch], Tensor] | None
    net: nn.Module
    splits: Splits
    run: RunFolder | None
    weights: Path | None
    bank: ModuleBank

    @property
    def student_paths(self) -> Mapping[str, str] | None:
        """Float module path -> path within the student; None where the paths are the same."""
        return tap_paths_of(self.student)

    def terms(self, terms: Sequence[TermConfig], bank: ModuleBank | None = None) -> WeightedTerms:
        """Return the sum of terms, with their modules.

        Args:
            terms: As the config has them.
            bank: Of their modules; absent: that of the student's terms.
        """
        smoothing = self.config.student.train.label_smoothing
        return build_terms(terms, label_smoothing=smoothing, bank=self.bank if bank is None else bank)

    def distill_step(
        self, terms: Sequence[TermConfig], first_epoch: int, *, student_learns: bool = True
    ) -> DistillStep:
        """Return the step of a student beside a fixed teacher.

        Args:
            terms: The loss.
            first_epoch: Of the training, where they begin to decay.
            student_learns: False: only modules of terms get a gradient.
        """
        return DistillStep(
            self.student, self.teacher, self.terms(terms), view=self.view, tap_paths=self.student_paths,
            first_epoch=first_epoch, student_learns=student_learns, memory=self._memory(),
        )  # fmt: skip

    def _memory(self) -> TeacherMemory | None:
        """Return what keeps the teacher's logits: where it sees clean images, or the student's are never augmented."""
        student, data = self.config.student, self.config.data
        sees_raw = student.view == "clean" or (student.view == "same" and student.agent.policy == "none")
        return memory_for(
            self.splits, data.eval_batch_size, epochs=student.train.epochs, sees_raw=sees_raw, teacher=self.teacher
        )

    def start_of(self, asked: Callable[[PhaseConfig], bool]) -> int:
        """Return the epoch of the training, from 0, in which the first phase begins that is asked for; else 0."""
        first = 0
        for phase in self.phases:
            if asked(phase):
                return first
            first += phase.epochs
        return 0


class Method:
    """A method of distillation; one object serves one training. What it does not override is as without it.

    A method of your own: derive a class, name it in a config (``student.method: path/to/file.py:Name``), and override
    ``takes`` and ``step``; that is enough for a step that is not in :mod:`qkd.methods`.

    Args:
        config: The run's; ``config.student.method_options`` are the options of a method of your own.
    """

    brings_loss = True
    """Whether a phase that it takes does without the student's own terms; the phase's own come on top."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.partners: tuple[Partner, ...] = ()
        """Nets that learn beside the student; set by :meth:`prepare`."""
        self.low_bit: tuple[Student, ...] = ()
        """Those of them that are calibrated at the start, as the student is."""

    @property
    def why_one_device(self) -> str:
        """Return why its steps cannot be shared by several devices; empty where they can.

        They can if the loss is a mean over images (of terms that say how they compare them), all that learns is reached
        by ``backward``, and what is read at a step is the batch: each device then takes a share of every batch.
        """
        return f"{type(self).__name__} does not say that devices may share its batches (why_one_device)"

    def faults(self) -> Iterable[str]:
        """Return what is wrong with the config, a line each with the key it is about; empty if it can be trained."""
        return ()

    # images

    def images(self, splits: Splits) -> Splits:
        """Return the images of a run as its student may use them."""
        return splits

    def synthesis(self, context: Context) -> Synthesis | None:  # noqa: ARG002
        """Return what makes images in place of the training images, for calibration; None where they are those.

        Asked for once the nets are prepared.

        Args:
            context: The run, with what has been trained before the student.
        """
        return None

    def source(self, context: Context) -> Callable[[Job], Source] | None:  # noqa: ARG002
        """Return what makes the student's batches; None where they are the training images.

        Args:
            context: As for :meth:`synthesis`.
        """
        return None

    def calibration_images(self, images: Tensor) -> Tensor:
        """Return what calibrates a student for a batch of normalized images."""
        return images

    # trainings before the student's, and what the student learns from

    def sub_trainings(self, context: Context, before: str) -> Iterator[Role]:  # noqa: ARG002
        """Yield the trainings that a role needs first, in order.

        Args:
            context: The run.
            before: ``teacher`` or ``student``.
        """
        yield from ()

    def float_twin(self, role: StudentRole) -> Role | None:  # noqa: ARG002
        """Return the training of the float net that a student starts from; None where it learns from the labels.

        Args:
            role: Whose start it is; its ``student.float_train`` is set.
        """
        return None

    def borrow(self, run: RunFolder, source: Path, progress: Progress) -> None:
        """Take over what another run, whose teacher is taken, has made out of that teacher.

        Args:
            run: The run.
            source: The other run's folder.
            progress: Where to say so.
        """

    def taken_over(self) -> tuple[str, ...] | None:
        """Return what, beside the teacher, a student of other widths takes over of a run: names of manifests.

        Returns:
            None: a run of other widths is another run, with a name that a person gives it. Else it is a run beside the
            first one, named after its widths, and :meth:`borrow` copies what these manifests name.
        """
        return None

    def start(self, run: RunFolder, student: Student) -> None:
        """Give a student other weights than those of its float net, in place, before it is calibrated.

        Args:
            run: The run folder, with what was trained before.
            student: Low-bit, not calibrated.
        """

    def beside_teacher(self, net: nn.Module, splits: Splits) -> Beside | None:  # noqa: ARG002
        """Return what learns with the teacher in its own training; None where it learns by itself."""
        return None

    def guide(self, run: RunFolder, below: Guide) -> Guide:  # noqa: ARG002
        """Return what the student learns from, given what it would learn from without this method."""
        return below

    def made_from(self, run: RunFolder) -> Mapping[str, Path]:  # noqa: ARG002
        """Return further files of the run folder that the student's training is made from, by name.

        A checkpoint keeps the hash of each under its name, and the stage's manifest by its path: with another file,
        training starts over.
        """
        return {}

    # phases

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher learns beside the student; its parameters then require a gradient."""
        return False

    def takes(self, phase: PhaseConfig) -> bool:  # noqa: ARG002
        """Return whether it brings the step of a phase."""
        return False

    def prepare(self, lesson: Lesson) -> None:
        """Build what its steps share, before the first of them is asked for: nets, optimizers, ``partners``."""

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:
        """Return the step of a phase that it takes.

        Args:
            lesson: Nets and step that it is built from.
            phase: As the config has it.
            terms: Of the phase: its own, or the student's where those apply.
            first_epoch: Of the training, where they begin to decay.
        """
        raise NotImplementedError(f"{type(self).__name__} takes phase {phase.name}, so it needs a step")

    def backward(self, lesson: Lesson, phase: PhaseConfig) -> Backward:  # noqa: ARG002
        """Return what turns the result of a step into gradients."""
        return plain_backward

    def enter(self, lesson: Lesson, phase: PhaseConfig) -> None:
        """Put its nets into the modes of a phase; teacher (eval) and student (train) are in theirs."""

    def stretched(self, phase: PhaseConfig, factor: float, end: int) -> PhaseConfig:  # noqa: ARG002
        """Return a phase for a training of another length, its own epochs apart.

        Args:
            phase: With its new length.
            factor: New length of the training over the old.
            end: Where the phase ends now, in epochs of the training.
        """
        return phase

    # what came of it

    def results(self, context: Context, role: str, model: nn.Module) -> Mapping[str, Any]:  # noqa: ARG002
        """Return further keys of a role's ``result.json``; test images may be read.

        ``rows`` is a list of nets for the report: ``role`` (words for people), and, where they are known, ``net``,
        ``test_accuracy`` (a fraction), ``weight_bits`` with ``act_bits``, ``teaches`` (whether the student learned from
        it).

        Args:
            context: The run.
            role: ``teacher`` or ``student``.
            model: The role's net, trained, on the context's device.
        """
        return {}
