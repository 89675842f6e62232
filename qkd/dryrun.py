"""Try every step of an experiment on two batches, so that faults show before training and not after it."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from export import export_float
from export.lowering import INPUT, OUTPUT
from export.quant_session import QuantSession
from export.runtime import open_session
from qkd.agents import Agent, build_agent
from qkd.config import AgentConfig, RunConfig, TrainConfig
from qkd.data import Splits, iterate, load_splits, normalise
from qkd.methods.auxiliary.training import auxiliary_config
from qkd.methods.ensemble.average import EnsembleTeacher
from qkd.methods.peers.nets import Peer, build_peers
from qkd.methods.rotations.branches import branched_teacher, fresh_branches
from qkd.methods.rotations.step import BranchStep
from qkd.nets import build_net, load_weights
from qkd.progress import Progress, Silent
from qkd.roles.agents import Role, named_agent
from qkd.roles.nets import prepare_student
from qkd.roles.phases import distillation
from qkd.roles.start import phases_of, student_images
from qkd.roles.views import teacher_view
from qkd.search import search_splits
from qkd.seeding import global_stream, stream
from qkd.stages.export import export_student, student_files
from qkd.training import Batch, Phase, cpu_threads, supervised_step
from qkd.training.precision import choose_device
from quantizers import Student, calibrate, settle

BATCHES = 2
FEW_IMAGES = 8


@dataclass(frozen=True)
class Check:
    """A step that was tried: its name, what came of it, and how long it took."""

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
        """Return a line a step."""
        lines = [f"{check.name:<18}  {check.outcome}  ({check.seconds:.1f} s)" for check in self.checks]
        return "\n".join([*lines, f"dry run of {self.name}: every step works; nothing was kept"])


def dry_run(config: RunConfig, progress: Progress) -> DryRunReport:
    """Load the data, train both roles for two batches, export the student and load the file; keep nothing.

    Args:
        config: The experiment.
        progress: Where to say what is being tried.

    Raises:
        ValueError: If data, nets, agents or loss terms cannot be used.
        quantizers.RewriteError: If the student's net cannot be rewritten.
        export.ExportError: If the student cannot become an ONNX file.
        RuntimeError: If a loss or a gradient is not finite.
    """
    with cpu_threads(config.threads), tempfile.TemporaryDirectory(prefix="qkd-dry-run-") as folder:
        return _Trial(config, progress, Path(folder)).run()


def check_distillation(config: RunConfig, progress: Progress) -> None:
    """Take two steps of every phase of the student's training on a few images, as a run does before its first stage.

    What needs nets and data to be seen (a tap that is no module, shapes that do not fit, too large a quiz) would
    otherwise show when the teacher is trained and both agents are found. Of :func:`dry_run` this is the part that takes
    seconds.

    Args:
        config: The experiment.
        progress: Where to say that it begins.

    Raises:
        ValueError: If data, nets, agents or loss terms cannot be used.
        quantizers.RewriteError: If the student's net cannot be rewritten.
        RuntimeError: If a loss or a gradient is not finite.
    """
    progress.say("before the first stage: every phase of the student's training takes two steps on a few images")
    with cpu_threads(config.threads), tempfile.TemporaryDirectory(prefix="qkd-check-") as folder:
        _Trial(config, Silent(), Path(folder), is_brief=True).train()


class _Trial:
    """One dry run; its steps share nets, data and device. A brief one has small batches, and trains no float net."""

    def __init__(self, config: RunConfig, progress: Progress, folder: Path, *, is_brief: bool = False) -> None:
        self.config, self.progress, self.folder, self.is_brief = config, progress, folder, is_brief
        self.device = choose_device(config.device)
        self.checks: list[Check] = []
        self.float_nets: dict[str, nn.Module] = {}  # those that are exported, by the name of the file

    def run(self) -> DryRunReport:
        student = self.train()
        with self._tried("export") as outcome:
            outcome.append(self._export(student.cpu()))
        return DryRunReport(self.config.name, tuple(self.checks))

    def train(self) -> fx.GraphModule:
        """Try all that comes before the export; return the student."""
        with self._tried("data") as outcome:
            images = load_splits(self.config.data, seed=self.config.seed)
            self.splits: Splits = student_images(self.config, images).to(self.device)
            outcome.append(f"{len(self.splits.train)} training images, {len(self.splits.classes)} classes")
            for note in self.splits.notes:
                self.progress.warn(f"data: {note}")
            if self.splits.quiz is not None:
                outcome.append(f"{len(self.splits.quiz)} more for the quiz")
            if self.config.searched_roles:
                found = search_splits(self.splits, self.config.search, seed=self.config.seed)
                outcome.append(f"for the search {len(found.train)}, scored by {len(found.val)}")
        with self._tried("teacher") as outcome:
            teacher = self._teacher(outcome)
        guide = teacher
        if self.config.teacher.members > 1:  # members differ by seed only, so one stands for all
            settings, copies = self.config.teacher, [teacher] * self.config.teacher.members
            guide = EnsembleTeacher(copies, settings.ensemble, temperature=settings.ensemble_temperature)
        if self.config.student.auxiliary is not None:
            with self._tried("auxiliary") as outcome:
                auxiliary = self._auxiliary(outcome)
            self._phases(auxiliary_config(self.config), auxiliary, guide)
            guide = auxiliary.eval().requires_grad_(False)
        with self._tried("student") as outcome:
            student = self._student(teacher, outcome)
        peers = build_peers(self.config, self.splits, None, self.device)
        self._phases(self.config, student, guide, peers, self._teacher_branches(teacher))
        return student

    def _phases(
        self,
        config: RunConfig,
        student: nn.Module,
        teacher: nn.Module,
        peers: tuple[Peer, ...] = (),
        branches: nn.ModuleList | None = None,
    ) -> None:
        """Try every phase of a distillation."""
        view = teacher_view(config, self.splits, self._tried_agent("teacher"))
        net = self._net(config.student_net, "student")
        made = distillation(
            config, phases_of(config.student), student, teacher, view,
            net=net, splits=self.splits, peers=peers, branches=branches,
        )  # fmt: skip
        for other in made.low_bit:
            calibrate(other, [batch.images for batch in self._batches(None)])
        ends = accumulate(phase.epochs for phase in made.phases)
        for phase, end in zip(made.phases, ends, strict=True):
            with self._tried(f"phase {phase.name}") as outcome:
                student.train()
                phase.enter()
                with phase.hold():
                    # of the phase's last epoch: some steps do more from an epoch on, and none may come before its phase
                    batches = (replace(batch, epoch=end - 1) for batch in self._batches(self._agent()))
                    outcome.append(_losses([_backward(phase, batch, student) for batch in batches]))

    def _auxiliary(self, outcome: list[str]) -> nn.Module:
        config = auxiliary_config(self.config)
        net = self._net(config.student_net, "auxiliary").to(self.device)
        own = config.student.float_train
        if own is not None:
            outcome.append(f"in float: {self._supervised(net, own, self._tried_agent('student'))}")
        is_float = self.config.student.auxiliary is None or self.config.student.auxiliary.quant is None
        return net if is_float else self._low_bit(config, net)

    def _low_bit(self, config: RunConfig, net: nn.Module) -> Student:
        """Return the calibrated low-bit form of a net in the student's place of a config."""
        splits = self.splits
        low_bit = prepare_student(config, net.cpu(), channels=splits.channels, size=splits.image_size).to(self.device)
        calibrate(low_bit, [batch.images for batch in self._batches(None)])
        return low_bit

    @contextmanager
    def _tried(self, name: str) -> Iterator[list[str]]:
        self.progress.stage("dry run", name)
        outcome: list[str] = []
        start = time.monotonic()
        yield outcome
        self.checks.append(Check(name, "; ".join(outcome) or "works", time.monotonic() - start))

    def _teacher(self, outcome: list[str]) -> nn.Module:
        settings = self.config.teacher
        net = self._net(settings.net, "teacher")
        if settings.weights is not None:
            outcome += [note] if (note := load_weights(net, settings.weights)) else []
        net.to(self.device)
        if settings.train is not None:
            outcome.append(self._supervised(net, settings.train, self._tried_agent("teacher")))
        self.float_nets["teacher"] = net
        return net.eval().requires_grad_(False)

    def _student(self, teacher: nn.Module, outcome: list[str]) -> fx.GraphModule:
        net = self._net(self.config.student_net, "student")
        own = self.config.student
        if self.config.student_start == "teacher":
            net.load_state_dict(teacher.state_dict())
        elif self.config.student_start == "float" and own.float_train is not None:
            outcome.append(
                f"in float: {self._supervised(net.to(self.device), own.float_train, self._tried_agent('student'))}"
            )
            self.float_nets["float"] = net.cpu()
        elif own.weights is not None:
            outcome += [note] if (note := load_weights(net, own.weights)) else []
        student = self._low_bit(self.config, net)
        quant = self.config.student.quant
        outcome.append(f"w{quant.weight_bits}a{quant.act_bits} from {self.config.student_start}")
        return student

    def _teacher_branches(self, teacher: nn.Module) -> nn.ModuleList | None:
        """Return the branches that offline rotations learn from, after two batches of their training."""
        own = self.config.student.rotations
        if own is None or own.teacher_branches is None:
            return None
        with self._tried("teacher branches") as outcome:
            branches = fresh_branches(self.config, teacher, self.splits, "teacher")
            step = BranchStep(branched_teacher(self.config, teacher, branches), joint=False)
            agent = build_agent(self._tried_agent("teacher"), epochs=1, mean=self.splits.mean)
            phase = Phase("branches", 1, step)
            with step.tapped():
                outcome.append(_losses([_backward(phase, batch, branches) for batch in self._batches(agent)]))
        return branches

    def _supervised(self, net: nn.Module, train: TrainConfig, agent_config: AgentConfig) -> str:
        if self.is_brief:
            return ""
        step = supervised_step(net, label_smoothing=train.label_smoothing)
        agent = build_agent(agent_config, epochs=train.epochs, mean=self.splits.mean)
        phase = Phase("supervised", 1, step)
        return _losses([_backward(phase, batch, net) for batch in self._batches(agent)])

    def _net(self, name: str, role: str) -> nn.Module:
        splits = self.splits
        with global_stream(self.config.seed, "init", role):
            return build_net(name, classes=len(splits.classes), channels=splits.channels, image_size=splits.image_size)

    def _agent(self) -> Agent:
        epochs = self.config.student.train.epochs
        return build_agent(self._tried_agent("student"), epochs=epochs, mean=self.splits.mean)

    def _tried_agent(self, role: Role) -> AgentConfig:
        """Return a role's agent; in place of one that is still to be searched the schedule that comes with us."""
        agent = named_agent(self.config, role)
        return agent.model_copy(update={"policy": "pba"}) if agent.policy == "search" else agent

    def _batches(self, agent: Agent | None) -> Iterator[Batch]:
        """Yield the first two training batches, augmented where there is an agent."""
        train, data = self.splits.train, self.config.data
        size = min(data.batch_size, len(train), *([FEW_IMAGES] if self.is_brief else []))
        indices = torch.arange(min(BATCHES * size, len(train)))
        for step, (raw, labels) in enumerate(iterate(train, indices, size, self.device, drop_last=True)):
            generator = stream(self.config.seed, "dry run", step)
            images, mixed = raw, None
            if agent is not None:
                images, mixed = agent.with_labels(raw, labels, generator=generator, epoch=0)
            yield Batch(self._normal(images), labels, raw, 0, step, mixed=mixed)

    def _normal(self, images: Tensor) -> Tensor:
        return normalise(images, self.splits.mean, self.splits.std)

    def _export(self, student: fx.GraphModule) -> str:
        settle(student)
        student.eval()
        images = self._normal(self.splits.test.batch(torch.arange(min(2, len(self.splits.test))), "cpu")[0].cpu())
        exported = [
            export_student(self.config, student, images, self.folder / f"{name}.onnx", flavour)
            for name, flavour in student_files(self.config).items()
        ]
        for model in exported:
            for warning in model.warnings:
                self.progress.warn(f"{model.path.name}: {warning}")
            if model.flavour == "qonnx":
                QuantSession(model.path).run([OUTPUT], {INPUT: images.numpy()})
        for name, net in self.float_nets.items():
            export_float(net.cpu(), images, self.folder / f"{name}.onnx")
        runnable = [model.path.stem for model in exported if model.flavour != "qonnx"]
        for name in (*runnable, *self.float_nets):
            session = open_session(self.folder / f"{name}.onnx", optimise=True)
            session.run(None, {session.get_inputs()[0].name: images.numpy()})
        count = len(self.float_nets) + len(exported)
        return f"student.onnx {exported[0].size_bytes:,} bytes; {count} files load and run"


def _backward(phase: Phase, batch: Batch, model: nn.Module) -> float:
    """Take a phase's step on a batch, back-propagate it as the phase does, and return its loss.

    Raises:
        RuntimeError: If the loss or a gradient is not finite; names it.
    """
    model.zero_grad()
    result = phase.step(batch)
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
