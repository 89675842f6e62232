"""The auxiliary teacher: a net that learns from the teacher first, so that the student can learn from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from qkd.agents import build_agent
from qkd.config import AuxiliaryConfig, PhaseConfig, RunConfig
from qkd.data import Splits
from qkd.files import sha256_of
from qkd.progress import Progress
from qkd.roles.agents import (
    agent_inputs,
    agent_mark,
    named_agent,
    role_agent,
    training_settings,
    unsearched_agent,
)
from qkd.roles.float_training import keep_last_checkpoint
from qkd.roles.nets import AUXILIARY, WEIGHTS, load_ensemble, member_files, save_net
from qkd.roles.outcome import score, write_outcome
from qkd.roles.phases import distillation
from qkd.roles.start import StudentStart, phases_of
from qkd.roles.views import run_view
from qkd.rundir import RunFolder
from qkd.training import Job, fit
from quantizers import Student, quantizer_scales, settle

STAGE = "auxiliary"  # its manifest: a part of the stage that needs it first


def train_auxiliary(run: RunFolder, splits: Splits, device: torch.device, progress: Progress) -> list[Path]:
    """Train the auxiliary teacher if the config has one (resuming), score it once, and return its files.

    Args:
        run: The run. Its teacher is complete, and so is the student's own float training.
        splits: The images, on ``device``.
        device: Where to train.
        progress: Where to talk.

    Raises:
        ValueError: If a net, a loss term or a tap cannot be used.
        qkd.training.TrainingError: If the training diverges.
        OSError: If a file cannot be written.
    """
    auxiliary = run.config.student.auxiliary
    if auxiliary is None:
        return []
    as_student = RunFolder(auxiliary_config(run.config), run.path)
    start = StudentStart(as_student, splits, device, progress, role=STAGE, folder=AUXILIARY, borrowed=_borrowed(run))
    own = start.float_files()
    folder = run.folder(AUXILIARY)
    files = [folder / name for name in (WEIGHTS, "metrics.jsonl", "result.json")]
    if not run.is_complete(STAGE):
        _Training(as_student, start, folder, is_float=auxiliary.quant is None).run()
        run.complete(STAGE, files, dict.fromkeys([*member_files(run), *start.inputs(), *_agent_files(run)]))
        keep_last_checkpoint(folder)
    return [*own, *files]


def auxiliary_config(config: RunConfig) -> RunConfig:
    """Return the config with the auxiliary in the student's place.

    Raises:
        ValueError: If there is none.
    """
    auxiliary = config.student.auxiliary
    if auxiliary is None:
        raise ValueError("student.auxiliary: missing")
    student = config.student.model_copy(
        update={
            "net": auxiliary.net or config.student_net,
            "init": _init(config, auxiliary),
            "weights": None,  # the student's; _borrowed gives them to an auxiliary of the same net
            "float_train": auxiliary.float_train,
            "quant": auxiliary.quant or config.student.quant,
            "train": auxiliary.train,
            "terms": auxiliary.terms,
            "phases": auxiliary_phases(auxiliary),
            "peers": None,
            "auxiliary": None,
        }
    )
    return config.model_copy(update={"student": student})


def auxiliary_phases(auxiliary: AuxiliaryConfig) -> tuple[PhaseConfig, ...]:
    """Return the phases of an auxiliary's training; without any in the config: one in full precision, or a student's.

    A net in full precision has no deployed arithmetic to settle into.
    """
    is_float = auxiliary.quant is None and not auxiliary.phases
    return (PhaseConfig(name="auxiliary", epochs=auxiliary.train.epochs),) if is_float else auxiliary.phases


def _init(config: RunConfig, auxiliary: AuxiliaryConfig) -> str:
    """Return what an auxiliary starts from by itself; weights that it borrows come first."""
    if auxiliary.init == "random":
        return "random"
    if auxiliary.float_train is not None:
        return "float"
    return "teacher" if (auxiliary.net or config.student_net) == config.teacher.net else "random"


def _borrowed(run: RunFolder) -> Path | None:
    """Return what the student starts from (its float training, or a file), where the auxiliary starts from it, too."""
    config, auxiliary = run.config, run.config.student.auxiliary
    if auxiliary is None or auxiliary.init == "random" or auxiliary.float_train is not None:
        return None
    if (auxiliary.net or config.student_net) != config.student_net:
        return None
    return run.path / "student" / "float" / WEIGHTS if config.student_start == "float" else config.student.weights


def _agent_files(run: RunFolder) -> list[Path]:
    """Return the schedules that the auxiliary's training is made with: the teacher's, never the student's own."""
    is_shared = run.config.student.agent.policy == "teacher"
    return agent_inputs(run, "teacher") if is_shared or run.config.student.view == "own" else []


class _Training:
    """The training of an auxiliary that has the student's place in ``run.config``."""

    def __init__(self, run: RunFolder, start: StudentStart, folder: Path, *, is_float: bool) -> None:
        self.folder, self.start, self.path, self.is_float = run, start, folder, is_float
        self.config, self.splits, self.device = run.config, start.splits, start.device

    def run(self) -> None:
        start = self.start
        net = start.float_net().to(self.device) if self.is_float else start.student()
        fitted = fit(self._job(net), start.progress, begin=lambda: self._begin(net))
        if isinstance(net, Student):
            settle(net)
        save_net(self.path / WEIGHTS, net, start.facts())
        quant = self.config.student.quant
        outcome = score(
            STAGE,
            self.config.student_net,
            net,
            self.splits,
            self.config.data,
            fitted,
            parameters=sum(parameter.numel() for parameter in start.net().parameters()),
            weight_bits=None if self.is_float else quant.weight_bits,
            act_bits=None if self.is_float else quant.act_bits,
        )
        write_outcome(self.path, outcome)

    def _begin(self, net: nn.Module) -> None:
        if isinstance(net, Student):
            self.start.calibrate(net)

    def _job(self, net: nn.Module) -> Job:
        config, run, splits, train = self.config, self.folder, self.splits, self.config.student.train
        source, teacher = self.start.file(), load_ensemble(run).to(self.device)
        # a schedule that the student's search finds is found with this net as the teacher, so it does without it
        is_own = config.student.agent.policy == "search"
        agent = unsearched_agent(named_agent(config, "student")) if is_own else role_agent(run, "student")
        view, phases = run_view(run, config, splits), phases_of(config.student)
        made = distillation(config, phases, net, teacher, view, net=self.start.net(), splits=splits)
        marks = {path.relative_to(run.path).as_posix(): sha256_of(path) for path in member_files(run)}
        return Job(
            role=STAGE,
            model=net,
            config=train,
            data=config.data,
            splits=splits,
            agent=build_agent(agent, epochs=train.epochs, mean=splits.mean),
            phases=made.phases,
            seed=config.seed,
            device=self.device,
            folder=self.path,
            fingerprint={
                "data": splits.fingerprint,
                **marks,
                **({"start": sha256_of(source)} if source is not None else {}),
                **agent_mark(agent),
            },
            settings=training_settings(run.config),
            scales=lambda: quantizer_scales(net),
            others={"teacher": teacher},
            partners=made.partners,
        )
