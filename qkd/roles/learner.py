"""The student's role in a run: its start, its phases, and its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qkd.config import AgentConfig, PhaseConfig, RunConfig, StudentConfig, TrainConfig
from qkd.config.conflicts import MOST_BITS
from qkd.config.training import default_phases
from qkd.data import Splits, epoch_order, iterate, normalize
from qkd.files import sha256_of
from qkd.methods.method import Synthesis
from qkd.methods.table import method_mark, methods_of, reads_images
from qkd.nets import load_weights
from qkd.nets.imagenet import weights_file
from qkd.roles.agents import agent_to_train_with, named_agent, role_agent, training_settings, unsearched_agent
from qkd.roles.float_training import FloatRole
from qkd.roles.guide import TAUGHT, guide_of, load_guide
from qkd.roles.nets import fresh_net, net_facts, prepare_student, save_net, sizes_of
from qkd.roles.outcome import score, write_outcome
from qkd.roles.phases import Distillation, distillation
from qkd.roles.stored import method_hash, schedule_mark, start_mark
from qkd.roles.views import run_view
from qkd.seeding import stream
from qkd.training import FitResult, Phase
from qkd.training.assembly import WEIGHTS, Context, Made, Role
from qkd.training.low_bit.rules import idle_rules, step_rules
from qkd.units import counted, percent
from quantizers import Student, calibrate, quantizer_scales, reestimate_batch_norm, settle


def phases_of(student: StudentConfig) -> tuple[PhaseConfig, ...]:
    """Return the phases of a student: those of the config, or the default."""
    return student.phases or default_phases(student.train)


def stretched_train(train: TrainConfig, epochs: int) -> TrainConfig:
    """Return a training's settings with a different length; the warm-up keeps its share."""
    warmup = train.warmup_epochs * epochs / train.epochs
    return train.model_copy(update={"epochs": epochs, "warmup_epochs": warmup})


def stretched_phases(config: RunConfig, epochs: int) -> tuple[PhaseConfig, ...]:
    """Return a student's phases with a different total length; the last one gets the remainder.

    Args:
        config: The config. Settings of its methods in epochs of the training change in the same proportion.
        epochs: Length of the whole training.
    """
    student, methods = config.student, methods_of(config)
    if not student.phases:
        return phases_of(student.model_copy(update={"train": stretched_train(student.train, epochs)}))
    # untrained attention is useless, so its phase is kept however short the search is
    least = [1 if phase.trains == "modules" else 0 for phase in student.phases]
    shares = [phase.epochs * epochs // student.train.epochs for phase in student.phases]
    lengths = [max(pair) for pair in zip(least, shares, strict=True)]
    lengths[-1] += epochs - sum(lengths)
    if lengths[-1] < 0:
        raise ValueError(f"search.epochs: {epochs} is too few for the student's {len(student.phases)} phases")
    factor, found = epochs / student.train.epochs, []
    for phase, length, end in zip(student.phases, lengths, accumulate(lengths), strict=True):
        made = phase.model_copy(update={"epochs": length})
        for method in methods:
            made = method.stretched(made, factor, end)
        found += [made] if length else []
    return tuple(found)


def student_images(config: RunConfig, splits: Splits) -> Splits:
    """Return the images of a run that its student may use: without those that a method holds back.

    Raises:
        ValueError: If there are not enough training images.
    """
    for method in methods_of(config):
        splits = method.images(splits)
    return splits


class StudentRole:
    """The student of a run, or a net that takes the student's place in a config.

    Args:
        context: The run; its teacher must be complete.
        name: ``student``, or a name for other random streams.
        folder: Its folder in the run folder.
        borrowed: Weights to start from instead of those in the config.
    """

    def __init__(
        self, context: Context, *, name: str = "student", folder: str = "student", borrowed: Path | None = None
    ) -> None:
        self.context, self.name, self.folder, self.title = context, name, folder, name
        self.methods = methods_of(context.config)
        self._borrowed = borrowed
        self._made_from: dict[str, str] = {}

    @property
    def config(self) -> RunConfig:
        """Return the config whose student it is."""
        return self.context.config

    @property
    def train(self) -> TrainConfig:
        """Return optimizer and length of its training."""
        return self.config.student.train

    def agent(self) -> AgentConfig:
        """Return its agent, as found."""
        return agent_to_train_with(self.context.run, "student")

    # its start

    def sub_trainings(self) -> Iterator[Role]:
        """Yield the trainings that must come first: its own float training, and those that methods need."""
        if (own := self.float_role()) is not None:
            if isinstance(own, StudentRole):  # whatever it learns from comes first
                yield from own.sub_trainings()
            yield own
        for method in self.methods:
            yield from method.sub_trainings(self.context, "student")

    def float_role(self) -> Role | None:
        """Return its own float training; None if it starts from something else."""
        config = self.config
        if config.student_start != "float":
            return None
        if config.student.float_train is None:
            raise ValueError(f"{self.name}: float_train is missing")
        own = next((twin for method in self.methods if (twin := method.float_twin(self)) is not None), None)
        if own is not None:
            return own
        return FloatRole(
            self.context, f"{self.name}_float", f"{self.folder}/float", self.title, config.student_net,
            config.student.float_train, self.float_agent, (self.name,),
        )  # fmt: skip

    def float_agent(self) -> AgentConfig:
        """Return the agent of its own float training."""
        return self.config.student.float_agent or self.agent_without_search()

    def agent_without_search(self) -> AgentConfig:
        """Return the student's agent for a training that its search builds on, without the schedule found there."""
        is_own = self.config.student.agent.policy == "search"
        return (
            unsearched_agent(named_agent(self.config, "student")) if is_own else role_agent(self.context.run, "student")
        )

    def file(self) -> Path | None:
        """Return the file of weights that it starts from; None if they are random."""
        places = {"teacher": "teacher", "float": f"{self.folder}/float"}
        place, own = places.get(self.config.student_start), self._borrowed or self.config.student.weights
        if own is not None:
            return weights_file(own, self.config.student_net)
        return None if place is None else self.context.run.path / place / WEIGHTS

    def net(self) -> nn.Module:
        """Return its float net, freshly initialized from the run's seed."""
        return fresh_net(self.config, self.config.student_net, self.context.splits, self.name)

    def float_net(self) -> nn.Module:
        """Return its float net with its starting weights, on the CPU."""
        net, source = self.net(), self.file()
        head = "keep" if source is None or source.is_relative_to(self.context.run.path) else self.config.student.head
        if source is not None and (note := load_weights(net, source, head=head)):
            self.context.progress.say(f"{self.name}: {source}: {note}")
        return net

    def student(self) -> nn.Module:
        """Return the net to train, with its starting weights, on the device: low-bit and not calibrated."""
        student = prepare_student(self.config, self.float_net(), self.context.splits.image_shape)
        for method in self.methods:
            method.start(self.context.run, student)
        return student.to(self.context.device)

    def calibrate(self, *students: nn.Module) -> None:
        """Set activation scales and batch-norm statistics from training images."""
        many = counted(self._count_of(self.config.student.calibration_batches), "batch", "batches")
        self.context.progress.say(f"{self.name}: calibrating on {many}")
        for student in students:
            batches = self._batches("calibration", self.config.student.calibration_batches)
            calibrate(student, batches, keep_statistics=self.config.student.bn == "frozen_teacher")

    def reestimate(self, student: nn.Module) -> None:
        """Set batch norm's running statistics from training images, with the current weights."""
        count = self.config.student.low_bit.reestimate_batches
        reestimate_batch_norm(student, self._batches("batch norm", count))

    def _count_of(self, count: int) -> int:
        """Return how many batches there are where so many are wanted; made images never run out."""
        if not reads_images(self.config):
            return count
        images = len(self.context.splits.train)
        return min(count, images // min(self.config.data.batch_size, images))

    def _batches(self, purpose: str, count: int) -> Iterator[Tensor]:
        made = (method.synthesis(self.context) for method in self.methods)
        synthesis = next((one for one in made if one is not None), None)
        if synthesis is None:
            batches = self._real_batches(purpose, count)
        else:
            batches = self._made_batches(synthesis, purpose, count)
        for images in batches:
            for method in self.methods:
                images = method.calibration_images(images)
            yield images

    def _made_batches(self, synthesis: Synthesis, purpose: str, count: int) -> Iterator[Tensor]:
        config = self.config
        for index in range(count):
            yield synthesis.draw(config.data.batch_size, stream(config.seed, purpose, index))[0]

    def _real_batches(self, purpose: str, count: int) -> Iterator[Tensor]:
        config, train, splits = self.config, self.context.splits.train, self.context.splits
        size = min(config.data.batch_size, len(train))
        order = epoch_order(len(train), stream(config.seed, purpose))[: size * count]
        for raw, _ in iterate(train, order, size, self.context.device, drop_last=True):
            yield normalize(raw, splits.mean, splits.std)

    # its training

    def make(self) -> Made:
        """Build the student and everything it learns from and with.

        Raises:
            ValueError: If a net, a loss term or a tap cannot be used.
            FileNotFoundError: If what it learns from does not exist yet.
        """
        run, splits = self.context.run, self.context.splits
        teacher, student = load_guide(run).to(self.context.device), self.student()
        made = distillation(
            self.config, phases_of(self.config.student), student, teacher, run_view(run, self.config, splits),
            net=self.net(), splits=splits, methods=self.methods, run=run, weights=self.file(),
        )  # fmt: skip
        low_bit, self._made_from = self.config.student.low_bit, self._user_files()
        if isinstance(student, Student) and (idle := idle_rules(student, low_bit)):
            self.context.progress.warn(
                f"{self.name}: student.low_bit: {' and '.join(idle)} without effect, because no layer has weights of "
                f"at most {MOST_BITS} bits"
            )
        return Made(
            student,
            self._with_reestimation(made.phases, student),
            begin=lambda: self.begin(student, made),
            save=lambda: self.save(student, teacher, made),
            score=lambda fitted: self.score(student, teacher, made, fitted),
            partners=made.partners,
            others={"teacher": teacher, **{partner.name: partner.module for partner in made.partners}},
            scales=lambda: quantizer_scales(student),
            marks=self.marks(),
            settings=training_settings(self.config),
            inputs=self.inputs(),
            source=next((one for method in self.methods if (one := method.source(self.context)) is not None), None),
            rules=lambda optimizer: step_rules(student, low_bit, optimizer) if isinstance(student, Student) else (),
        )

    def _with_reestimation(self, phases: tuple[Phase, ...], student: nn.Module) -> tuple[Phase, ...]:
        """Make the first phase with frozen batch norm begin with re-estimated statistics."""
        first = self._first_frozen()
        if first is None or not self._reestimates(student):
            return phases
        renewed = replace(phases[first], begin=lambda: self.reestimate(student), renews_statistics=True)
        return (*phases[:first], renewed, *phases[first + 1 :])

    def _first_frozen(self) -> int | None:
        phases = phases_of(self.config.student)
        return next((index for index, phase in enumerate(phases) if phase.freeze_batch_norm), None)

    def _reestimates(self, student: nn.Module) -> bool:
        return isinstance(student, Student) and self.config.student.low_bit.reestimate_batches > 0

    def begin(self, student: nn.Module, made: Distillation) -> None:
        """Initialize the student and its partners."""
        self.begin_methods()
        self.calibrate(student, *made.low_bit)

    def begin_methods(self) -> None:
        """Initialize what the methods train along with the student."""
        for method in self.methods:
            method.begin(self.name, self.context)

    def marks(self) -> dict[str, str]:
        """Return the hashes of its sources: what it learns from (by folder), its start, what methods add."""
        run, source = self.context.run, self.file()
        marks = {path.parent.relative_to(run.path).as_posix(): sha256_of(path) for path in guide_of(run).files}
        marks |= {"start": sha256_of(source)} if source is not None else {}
        marks |= {name: sha256_of(path) for method in self.methods for name, path in method.made_from(run).items()}
        return {**marks, **method_mark(self.config)}

    def inputs(self) -> list[Path]:
        """Return the files of the run folder that it depends on, apart from those of its start."""
        run = self.context.run
        return [*guide_of(run).files, *(path for method in self.methods for path in method.made_from(run).values())]

    def start_inputs(self) -> list[Path]:
        """Return the weights it starts from for a manifest: only files in the run folder."""
        source = self.file()
        return [source] if source is not None and source.is_relative_to(self.context.run.path) else []

    # its results

    def save(self, student: nn.Module, teacher: nn.Module, made: Distillation) -> list[Path]:
        """Settle the student's scales; write it, and a teacher that learned along with it; return the files."""
        folder = self.context.run.folder(self.folder)
        if self._reestimates(student) and self._first_frozen() is None:
            self.reestimate(student)
        if isinstance(student, Student):
            settle(student)
        sizes = sizes_of(self.context.splits)
        save_net(folder / WEIGHTS, student, net_facts(self.config.student_net, **sizes))
        if not _is_taught(teacher, made):
            return [folder / WEIGHTS]
        place = self.context.run.folder(TAUGHT)
        save_net(place / WEIGHTS, teacher, net_facts(self.config.teacher_net, **sizes))
        return [place / WEIGHTS, folder / WEIGHTS]

    def _user_files(self) -> dict[str, str]:
        """Return the hashes of the user's files that the training begins with, as its result has them."""
        config = self.config
        return start_mark(config, "student") | schedule_mark(config.student_agent) | method_hash(config)

    def score(self, student: nn.Module, teacher: nn.Module, made: Distillation, fitted: FitResult | None) -> list[Path]:
        """Score the student, and a teacher that learned along with it; return the files."""
        run, config, splits = self.context.run, self.config, self.context.splits
        found: dict[str, Any] = {}
        for method in self.methods:
            found |= method.results(self.context, "student", student)
        files = []
        if _is_taught(teacher, made):
            taught = score("teacher, taught along", config.teacher_net, teacher, splits, config.data, None)
            files.append(write_outcome(run.path / TAUGHT, taught))
        outcome = score(
            self.name,
            config.student_net,
            student,
            splits,
            config.data,
            fitted,
            parameters=sum(parameter.numel() for parameter in self.net().parameters()),
            **self.details(),
            **self._made_from,
            **found,
        )
        if fitted is not None and fitted.rows:
            if fitted.kept_epoch is not None and fitted.kept_epoch < fitted.epochs:
                self.context.progress.say(f"{self.name}: keeps the weights of epoch {fitted.kept_epoch} (keep: best)")
            then, now = fitted.rows[(fitted.kept_epoch or 0) - 1].get("val_accuracy"), outcome.val_accuracy
            if isinstance(student, Student) and None not in (then, now) and then != now:
                self.context.progress.say(f"{self.name}: validation {percent(now)} as saved, with its scales settled")
        return [*files, write_outcome(run.path / self.folder, outcome)]

    def details(self) -> Mapping[str, Any]:
        """Return more keys of its result."""
        student = self.config.student
        return {
            "weight_bits": student.quant.weight_bits,
            "act_bits": student.quant.act_bits,
            "start": self.config.student_start,
            "view": student.view,
        }


def _is_taught(teacher: nn.Module, made: Distillation) -> bool:
    return any(partner.module is teacher for partner in made.partners)
