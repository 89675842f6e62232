"""Try every step of an experiment on two batches, so that errors show up before training rather than after it."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from export import ExportedModel, export_float
from export.lowering.model import INPUT, OUTPUT
from export.parity.quant_session import QuantSession
from export.runtime import open_session
from qkd.config import RunConfig, Section
from qkd.data import load_splits, normalize
from qkd.predicting.feeding import preprocessing_of
from qkd.progress import Progress, Silent
from qkd.roles.float_training import FloatRole
from qkd.roles.learner import StudentRole, stretched_phases, student_images
from qkd.roles.nets import load_student
from qkd.roles.teacher.role import teacher_parts, teacher_role
from qkd.run.folder import RunFolder, kept_nets
from qkd.search.images import search_splits
from qkd.stages.export import export_student, float_nets, student_files
from qkd.training import Batch, Job, Phase, StepResult, cpu_threads
from qkd.training.assembly import Context, Role, Training, assemble
from qkd.training.precision import choose_device
from qkd.training.source import source_of
from quantizers import Student

BATCHES = 2
FEW_IMAGES = 8
WORKS = "works"


@dataclass(frozen=True)
class Check:
    """A step that was tried: its name, its outcome, and how long it took."""

    name: str
    outcome: str
    seconds: float


@dataclass(frozen=True)
class DryRunReport:
    """The steps that were tried; all of them worked."""

    name: str
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def to_text(self) -> str:
        """Return one line per step."""
        lines = [f"{check.name:<18}  {check.outcome}  ({check.seconds:.1f} s)" for check in self.checks]
        return "\n".join([*lines, f"dry run of {self.name}: every step works; nothing was kept"])


def dry_run(config: RunConfig, progress: Progress) -> DryRunReport:
    """Load the data, train both roles for two batches, export the student and load the file; keep nothing.

    Args:
        config: The experiment.
        progress: Reports what is being tried.

    Raises:
        ValueError: If data, nets, agents or loss terms cannot be used.
        quantizers.RewriteError: If the student's net cannot be rewritten.
        export.ExportError: If the student cannot become an ONNX file.
        RuntimeError: If a loss or a gradient is not finite.
    """
    with cpu_threads(config.threads), tempfile.TemporaryDirectory(prefix="qkd-dry-run-") as folder:
        return _Attempt(config, progress, Path(folder)).run()


def check_distillation(config: RunConfig, progress: Progress) -> None:
    """Take two steps of every phase of the student's training on a few images, and write its files, before the stages.

    Errors that need nets and data to be seen (a tap that is not a module, shapes that do not match, too large a quiz, a
    layer that the export target lacks, an output whose name a file cannot have) would otherwise show up only after
    training the teacher and searching both agents. This is the part of :func:`dry_run` that takes seconds.

    Args:
        config: The experiment.
        progress: Where to say that it begins.

    Raises:
        ValueError: If data, nets, agents or loss terms cannot be used.
        quantizers.RewriteError: If the student's net cannot be rewritten.
        export.ExportError: If the student cannot be written, for ``export.target`` for example.
        TypeError: If the student's parameters are not float32.
        RuntimeError: If a loss or a gradient is not finite.
    """
    progress.say("pre-flight check: two training steps per phase of the student, on a few images")
    with cpu_threads(config.threads), tempfile.TemporaryDirectory(prefix="qkd-check-") as folder:
        _Attempt(config, Silent(), Path(folder), is_brief=True).try_student()


class _Attempt:
    """One dry run: every training of the experiment is set up in a temporary folder and takes two batches.

    Weights are written between them as in a run, since one training starts from another's. A brief one has small
    batches.
    """

    def __init__(self, config: RunConfig, progress: Progress, folder: Path, *, is_brief: bool = False) -> None:
        self.config, self.progress, self.folder, self.is_brief = config, progress, folder, is_brief
        self.checks: list[Check] = []

    def run(self) -> DryRunReport:
        context = self.train()
        with self._tried("export") as outcome:
            outcome.append(self._export(context))
        return DryRunReport(self.config.name, tuple(self.checks))

    def try_student(self) -> None:
        """Try all that comes before the export, and to write the student's files."""
        context = self.train()
        self._write_student(context, load_student(context.run), self._few_images(context)[1])

    def train(self) -> Context:
        """Try all that comes before the export."""
        with self._tried("data") as outcome:
            context, of_student = self._contexts(outcome)
        self._train(teacher_role(context))
        for part in teacher_parts(context):
            self._train(part)
        student = StudentRole(of_student)
        for part in student.sub_trainings():
            self._train(part)
        self._train(student)
        return of_student

    def _contexts(self, outcome: list[str]) -> tuple[Context, Context]:
        """Return the contexts of the teacher and the student; the student may lack images that the teacher has."""
        config, device = self.config, choose_device(self.config.device)
        whole = load_splits(config.data, seed=config.seed).to(device)
        splits = student_images(config, whole).to(device)
        outcome.append(f"{len(splits.train)} training images, {len(splits.classes)} classes")
        for note in splits.notes:
            self.progress.warn(f"data: {note}")
        if splits.quiz is not None:
            outcome.append(f"{len(splits.quiz)} more for the quiz")
        if "student" in config.searched_roles:
            stretched_phases(config, config.search.epochs)  # raises if they are too few for its phases
        if config.searched_roles:
            searched = splits if "student" in config.searched_roles else whole
            found = search_splits(searched, config.search, seed=config.seed)
            outcome.append(f"for the search {len(found.train)}, scored by {len(found.val)}")
        size = min(config.data.batch_size, len(splits.train), *([FEW_IMAGES] if self.is_brief else []))
        tried = kept_nets(tried_config(config, size), self.folder)  # with copies of own nets, as a run has them
        own = Context(RunFolder(tried, self.folder), splits, device, self.progress)
        return replace(own, splits=whole), own

    def _train(self, role: Role) -> None:
        """Set up a training, take its batches phase by phase, and write its weights."""
        is_float, is_first = isinstance(role, FloatRole), all(check.name != role.title for check in self.checks)
        with self._tried(role.title) as outcome:
            training = assemble(role)
            training.made.begin()
            if isinstance(role, StudentRole):
                outcome += _facts(role, training.made.model)
            elif not is_float or is_first:  # of nets that differ by seed one stands for all
                prefix = "in float: " if is_float and role.name != role.title else ""
                outcome += [f"{prefix}{losses}" for _, losses in _steps(training)]
        if isinstance(role, StudentRole):
            started = time.monotonic()
            for name, losses in _steps(training):
                self.checks.append(Check(f"phase {name}", losses, time.monotonic() - started))
                started = time.monotonic()
        training.made.save()

    @contextmanager
    def _tried(self, name: str) -> Iterator[list[str]]:
        """Time what is tried; if a role has been tried before (in float), merge the two entries."""
        self.progress.stage("dry run", name)
        before = next((check for check in self.checks if check.name == name), None)
        outcome, seconds = ([], 0.0) if before is None else ([before.outcome], before.seconds)
        start = time.monotonic()
        yield outcome
        if before is not None:
            self.checks.remove(before)
        found = [text for text in outcome if text != WORKS]
        self.checks.append(Check(name, "; ".join(found) or WORKS, seconds + time.monotonic() - start))

    def _export(self, context: Context) -> str:
        """Export the trained nets, as the export stage does, and run the files."""
        config, splits = context.config, context.splits
        student, nets = load_student(context.run), float_nets(context.run)
        raw, images = self._few_images(context)
        exported = self._write_student(context, student, images)
        for model in exported:
            for warning in model.warnings:
                self.progress.warn(f"{model.path.name}: {warning}")
            if model.flavor == "qonnx":
                QuantSession(model.path).run([OUTPUT], {INPUT: images.numpy()})
        for name, net in nets.items():
            export_float(net, images, self.folder / f"{name}.onnx")
        runnable = [model.path.stem for model in exported if model.flavor != "qonnx"]
        for name in (*runnable, *nets):
            session = open_session(self.folder / f"{name}.onnx", optimize=True)
            fed = preprocessing_of(config, splits, name).as_fed(raw.numpy())
            session.run(None, {session.get_inputs()[0].name: fed})
        return f"student.onnx {exported[0].size_bytes:,} bytes; {len(nets) + len(exported)} files load and run"

    def _write_student(self, context: Context, student: Student, images: Tensor) -> list[ExportedModel]:
        config, splits = context.config, context.splits
        return [
            export_student(
                config, student, images, self.folder / f"{name}.onnx", file, preprocessing_of(config, splits, name)
            )
            for name, file in student_files(config).items()
        ]

    def _few_images(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return images as they are stored, and normalized."""
        splits = context.splits
        raw, _ = splits.test.batch(torch.arange(min(2, len(splits.test))), "cpu")
        return raw.cpu(), normalize(raw.cpu(), splits.mean, splits.std)


def tried_config(config: RunConfig, batch_size: int) -> RunConfig:
    """Return a config for a few batches: a built-in schedule replaces one that has not been found yet."""
    roles = {}
    for name, role, changes in (
        ("teacher", config.teacher, {"members": min(config.teacher.members, BATCHES)}),
        ("student", config.student, {"calibration_batches": BATCHES}),
    ):
        agent = role.agent.model_copy(update={"policy": "pba"}) if role.agent.policy == "search" else role.agent
        few = {key: section.tried(batch_size) for key, section in role if isinstance(section, Section)}
        roles[name] = role.model_copy(update={**few, "agent": agent, **changes})
    return config.model_copy(update={**roles, "data": config.data.model_copy(update={"batch_size": batch_size})})


def _facts(role: StudentRole, model: nn.Module) -> list[str]:
    quant = role.config.student.quant
    is_low_bit = isinstance(model, Student)
    return [f"w{quant.weight_bits}a{quant.act_bits} from {role.config.student_start}"] if is_low_bit else []


def _steps(training: Training) -> Iterator[tuple[str, str]]:
    """Take two batches in each phase of a training; yield the phase's name, and what its losses are."""
    model, end = training.made.model, 0
    for phase in training.made.phases:
        end += phase.epochs
        model.train()
        phase.enter()
        with phase.hold():
            # of the phase's last epoch: some steps do more from an epoch on, and none may come before its phase
            yield phase.name, _losses([_backward(phase, batch, model) for batch in _batches(training, end - 1)])


def _batches(training: Training, epoch: int) -> Iterator[Batch]:
    """Yield the first two training batches of an epoch, from 0."""
    job = cast(Job, training.job)
    return islice(source_of(job).batches(epoch, 0, job.data.batch_size), BATCHES)


def _backward(phase: Phase, batch: Batch, model: nn.Module) -> float:
    """Take a phase's step on a batch, back-propagate it as the phase does, and return its loss.

    Raises:
        RuntimeError: If the loss or a gradient is not finite (names it), or the loss has no gradient.
        TypeError: If the step of an own method returns something else than a result.
    """
    model.zero_grad()
    result = phase.step(batch)
    if not isinstance(result, StepResult):
        raise TypeError(f"a step must return a qkd.training.StepResult, got {type(result).__name__}")
    loss = float(result.loss.detach())
    phase.backward(batch, result, lambda value: value)
    wrong = [name for name, parameter in model.named_parameters()
             if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())]  # fmt: skip
    model.zero_grad()
    if not math.isfinite(loss) or wrong:
        terms = {name: float(value.detach()) for name, value in result.terms.items()}
        raise RuntimeError(f"not finite: loss {loss}, terms {terms}, gradients of {', '.join(wrong[:4]) or 'none'}")
    return loss


def _losses(values: list[float]) -> str:
    return f"loss {', '.join(f'{value:.3f}' for value in values)}; gradients are finite"
