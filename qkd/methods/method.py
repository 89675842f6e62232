"""The interface of a distillation method: the points of a run where it can intervene."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
    """A source of images in the teacher's input space."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return normalized images, and the classes that they were made for; None if no class was requested."""
        ...


class TappedStep(Protocol):
    """A training step with forward hooks."""

    def __call__(self, batch: Batch) -> Any:
        """Return the :class:`~qkd.training.StepResult` of a batch."""
        ...

    def tapped(self) -> AbstractContextManager[object]:
        """Register the hooks for the duration of a block."""
        ...


@dataclass(frozen=True)
class Guide:
    """What the student of a run learns from, whether trained yet or not.

    Args:
        load: Loads it in eval mode, on the CPU; raises FileNotFoundError if it does not exist yet.
        files: Its weights, and those of its own teachers.
        net: A name of ``qkd ls nets``.
        words: A description for people.
        below: Its own guide, which is also inspected in its place before it is trained.
        untrained: The note to print in that case.
    """

    load: Callable[[], nn.Module]
    files: tuple[Path, ...]
    net: str
    words: str
    below: Guide | None = None
    untrained: str = ""


@dataclass(frozen=True)
class Beside:
    """Modules that learn with a net in that net's own training.

    Args:
        phase: The phase that covers the whole training.
        partners: The modules that learn.
        save: Writes them to the net's folder; returns the files.
    """

    phase: Phase
    partners: tuple[Partner, ...]
    save: Callable[[Path], list[Path]]


@dataclass
class Lesson:
    """The shared inputs of a distillation's phases.

    Args:
        config: Its ``student`` section has the loss terms.
        phases: Names, lengths and the particulars of each.
        student: The net to train, low-bit or float.
        teacher: The net it learns from.
        view: Gives the teacher's images; None if it sees the student's.
        net: The student's float net, on the student's device: the shapes of its features.
        splits: The images.
        run: The run folder, for nets trained earlier; None outside a run.
        weights: Initial weights of the student; None if random.
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
        """Float module path -> path within the student; None if the paths are the same."""
        return tap_paths_of(self.student)

    def terms(self, terms: Sequence[TermConfig], bank: ModuleBank | None = None) -> WeightedTerms:
        """Return the sum of terms, with their modules.

        Args:
            terms: As the config has them.
            bank: Their modules; those of the student's terms if None.
        """
        smoothing = self.config.student.train.label_smoothing
        return build_terms(terms, label_smoothing=smoothing, bank=self.bank if bank is None else bank)

    def distill_step(
        self, terms: Sequence[TermConfig], first_epoch: int, *, student_learns: bool = True
    ) -> DistillStep:
        """Return the step of a student with a fixed teacher.

        Args:
            terms: The loss.
            first_epoch: Epoch of the training in which their decay starts.
            student_learns: If False, only modules of terms get a gradient.
        """
        return DistillStep(
            self.student, self.teacher, self.terms(terms), view=self.view, tap_paths=self.student_paths,
            first_epoch=first_epoch, student_learns=student_learns, memory=self._memory(),
        )  # fmt: skip

    def _memory(self) -> TeacherMemory | None:
        """Return a cache of the teacher's logits, if it sees clean images or the student's are never augmented."""
        student, data = self.config.student, self.config.data
        sees_raw = student.view == "clean" or (student.view == "same" and self.config.student_agent.policy == "none")
        return memory_for(
            self.splits, data.eval_batch_size, epochs=student.train.epochs, sees_raw=sees_raw, teacher=self.teacher
        )

    def start_of(self, asked: Callable[[PhaseConfig], bool]) -> int:
        """Return the epoch, from 0, in which the first matching phase begins; 0 if there is none."""
        first = 0
        for phase in self.phases:
            if asked(phase):
                return first
            first += phase.epochs
        return 0


class Method:
    """A distillation method; one object per training. Anything it does not override works as without it.

    To write your own method, derive a class, name it in a config (``student.method: path/to/file.py:Name``), and
    override ``takes`` and ``step``; that is enough for a step that is not in :mod:`qkd.methods`.

    Checkpoints hold the state of the nets and of ``partners``. What steps remember otherwise, in plain attributes, is
    lost when a training resumes.

    Args:
        config: The run's; ``config.student.method_options`` has the options of your own method.
    """

    brings_loss = True
    """Whether a phase that it handles ignores the student's terms; the phase's own terms are added. Set it to False if
    ``step`` computes ``terms``, as a step that ends in ``lesson.distill_step(terms)`` does."""

    reads_images = True
    """Whether the student may learn from the run's training images; if not, no part of the run reads them for it."""

    option_names: Collection[str] | None = None
    """Names of the options that your own method takes; others are refused. If None, the class checks them itself."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.partners: tuple[Partner, ...] = ()
        """Nets that learn with the student; set by :meth:`prepare`."""
        self.low_bit: tuple[Student, ...] = ()
        """Those of them that are calibrated at the start, like the student."""

    @property
    def why_one_device(self) -> str:
        """Return why its steps cannot be split across devices; empty if they can.

        They can if the loss is a mean over images (of terms that state how they compare them), ``backward`` reaches
        everything that learns, and a step reads only the batch: each device then takes a share of every batch.
        """
        return f"{type(self).__name__} does not say that devices may share its batches (why_one_device)"

    def faults(self) -> Iterable[str]:
        """Return the faults of the config, one per line with its key; empty if it can be trained."""
        return ()

    # images

    def images(self, splits: Splits) -> Splits:
        """Return the images of a run that its student is allowed to use."""
        return splits

    def synthesis(self, context: Context) -> Synthesis | None:  # noqa: ARG002
        """Return the source of calibration images, or None to use the training images.

        Called once the nets are prepared.

        Args:
            context: The run, with the nets trained before the student.
        """
        return None

    def begin(self, role: str, context: Context) -> None:
        """Initialize the method's own nets, before the student is calibrated; not called when a training resumes.

        Args:
            role: Name of the student's random streams.
            context: As for :meth:`synthesis`.
        """

    def source(self, context: Context) -> Callable[[Job], Source] | None:  # noqa: ARG002
        """Return the source of the student's batches, or None to use the training images.

        Args:
            context: As for :meth:`synthesis`.
        """
        return None

    def calibration_images(self, images: Tensor) -> Tensor:
        """Return the calibration images for a batch of normalized images."""
        return images

    # trainings before the student's, and the student's guide

    def sub_trainings(self, context: Context, before: str) -> Iterator[Role]:  # noqa: ARG002
        """Yield the trainings that a role needs first, in order.

        Args:
            context: The run.
            before: ``teacher`` or ``student``.
        """
        yield from ()

    def float_twin(self, role: StudentRole) -> Role | None:  # noqa: ARG002
        """Return the training of the float net that a student starts from; None if it learns from the labels.

        Args:
            role: The student role that starts from it; its ``student.float_train`` is set.
        """
        return None

    def require_source(self, source: Path) -> None:
        """Check that another run, whose teacher this run reuses, has whatever the method needs besides that teacher.

        Args:
            source: The other run's folder; its teacher is complete.

        Raises:
            ValueError: If something is missing, or does not fit.
        """

    def borrow(self, run: RunFolder, source: Path, progress: Progress) -> None:
        """Copy what another run has made from its teacher, which this run reuses.

        Args:
            run: The run.
            source: The other run's folder.
            progress: Where to report it.
        """

    def taken_over(self) -> tuple[str, ...] | None:
        """Return the manifests, besides the teacher's, that a student of other widths reuses from a run.

        Returns:
            None if a run of other widths is a separate run that a person names. Otherwise it is a run next to the
            first one, named after its widths, and :meth:`borrow` copies what these manifests name.
        """
        return None

    def start(self, run: RunFolder, student: Student) -> None:
        """Give a student other weights than those of its float net, in place, before it is calibrated.

        Args:
            run: The run folder, with the nets trained before.
            student: Low-bit, not calibrated.
        """

    def beside_teacher(self, net: nn.Module, splits: Splits) -> Beside | None:  # noqa: ARG002
        """Return the modules that learn with the teacher in its own training, or None."""
        return None

    def guide(self, run: RunFolder, below: Guide) -> Guide:  # noqa: ARG002
        """Return the student's guide, given the one without this method."""
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
        """Whether the teacher learns with the student; its parameters then require a gradient."""
        return False

    def takes(self, phase: PhaseConfig) -> bool:  # noqa: ARG002
        """Return whether it provides the step of a phase."""
        return False

    def prepare(self, lesson: Lesson) -> None:
        """Build what its steps share, before the first of them is requested: nets, optimizers, ``partners``."""

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:
        """Return the step of a phase that it handles.

        Args:
            lesson: The nets and the step that it builds on.
            phase: As in the config.
            terms: Terms of the phase: its own, or the student's if those apply.
            first_epoch: Epoch of the training in which their decay starts.
        """
        raise NotImplementedError(f"{type(self).__name__} handles phase {phase.name}, so it must implement `step`")

    def backward(self, lesson: Lesson, phase: PhaseConfig) -> Backward:  # noqa: ARG002
        """Return the function that turns the result of a step into gradients."""
        return plain_backward

    def enter(self, lesson: Lesson, phase: PhaseConfig) -> None:
        """Set the modes of its nets for a phase; those of the teacher (eval) and student (train) are set already."""

    def stretched(self, phase: PhaseConfig, factor: float, end: int) -> PhaseConfig:  # noqa: ARG002
        """Return a phase for a training of another length, except for the number of its own epochs.

        Args:
            phase: With its new length.
            factor: New length of the training over the old.
            end: New end of the phase, in epochs of the training.
        """
        return phase

    # results

    def results(self, context: Context, role: str, model: nn.Module) -> Mapping[str, Any]:  # noqa: ARG002
        """Return further keys of a role's ``result.json``; test images may be read.

        ``rows`` is a list of nets for the report: ``role`` (words for people), and, if known, ``net``,
        ``test_accuracy`` (a fraction), ``weight_bits`` with ``act_bits``, ``teaches`` (whether the student learned from
        it).

        Args:
            context: The run.
            role: ``teacher`` or ``student``.
            model: The role's net, trained, on the context's device.
        """
        return {}
