"""The training of an auxiliary teacher, which takes the student's place in its own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from qkd.config import AgentConfig, AuxiliaryConfig, LowBitConfig, PhaseConfig, RunConfig
from qkd.files import sha256_of
from qkd.roles.agents import agent_inputs
from qkd.roles.guide import guide_of
from qkd.roles.learner import StudentRole
from qkd.roles.phases import Distillation
from qkd.run.folder import RunFolder
from qkd.training.assembly import WEIGHTS, Context
from quantizers import Student

NAME = "auxiliary"
FOLDER = "student/auxiliary"


class AuxiliaryRole(StudentRole):
    """The auxiliary teacher of a run, low-bit or float.

    Args:
        context: The run whose student learns from it. The teacher is complete, and so is the student's own float
            training.
    """

    def __init__(self, context: Context) -> None:
        self._run = context.run  # whose student learns from it
        as_student = RunFolder(auxiliary_config(context.config), context.run.path)
        inner = replace(context, run=as_student)
        super().__init__(inner, name=NAME, folder=FOLDER, borrowed=_borrowed(context.run))
        self._is_float = auxiliary_of(context.config).quant is None

    def agent(self) -> AgentConfig:
        """Return the student's agent.

        The student's search uses this net as its teacher, so this training cannot use the schedule that it finds.
        """
        return self.agent_without_search()

    def student(self) -> nn.Module:
        """Return the net to train, on the device."""
        return self.float_net().to(self.context.device) if self._is_float else super().student()

    def begin(self, student: nn.Module, made: Distillation) -> None:
        """Calibrate the net if it is low-bit."""
        if isinstance(student, Student):
            super().begin(student, made)

    def marks(self) -> dict[str, str]:
        """Return the hashes of its teachers, by file, and of its start."""
        run, source = self.context.run, self.file()
        marks = {path.relative_to(run.path).as_posix(): sha256_of(path) for path in guide_of(run).files}
        return marks | ({"start": sha256_of(source)} if source is not None else {})

    def inputs(self) -> list[Path]:
        """Return its teachers, its start, and the teacher's schedules; never the student's own."""
        is_shared = self._run.config.student.agent.policy == "teacher"
        reads_agent = is_shared or self._run.config.student.view == "own"
        agents = agent_inputs(self._run, "teacher") if reads_agent else []
        return [*guide_of(self.context.run).files, *self.start_inputs(), *agents]

    def details(self) -> Mapping[str, Any]:
        """Return its bits; None if full precision."""
        quant = self.config.student.quant
        bits = (None, None) if self._is_float else (quant.weight_bits, quant.act_bits)
        return dict(zip(("weight_bits", "act_bits"), bits, strict=True))


def auxiliary_of(config: RunConfig) -> AuxiliaryConfig:
    """Return the section of a config that has an auxiliary teacher."""
    return cast(AuxiliaryConfig, config.student.auxiliary)


def auxiliary_config(config: RunConfig) -> RunConfig:
    """Return the config with the auxiliary in place of the student."""
    auxiliary = auxiliary_of(config)
    student = config.student.model_copy(
        update={
            "net": auxiliary.net or config.student_net,
            "net_options": {},  # part of the name
            "init": _init(config, auxiliary),
            "weights": None,  # the student's; _borrowed gives them to an auxiliary of the same net
            "float_train": auxiliary.float_train,
            "float_agent": None,  # it uses the student's agent throughout
            "quant": auxiliary.quant or config.student.quant,
            "train": auxiliary.train,
            "terms": auxiliary.terms,
            "phases": auxiliary_phases(auxiliary),
            "low_bit": LowBitConfig(),  # the student's own, as are the next two
            "widths": (),
            "self_distillation": None,
            "peers": None,
            "auxiliary": None,
            "method": None,
            "method_options": {},
        }
    )
    return config.model_copy(update={"student": student})


def auxiliary_phases(auxiliary: AuxiliaryConfig) -> tuple[PhaseConfig, ...]:
    """Return the phases of an auxiliary's training; by default one in full precision, or a student's.

    A full-precision net has no deployed arithmetic to settle into.
    """
    is_float = auxiliary.quant is None and not auxiliary.phases
    return (PhaseConfig(name="auxiliary", epochs=auxiliary.train.epochs),) if is_float else auxiliary.phases


def _init(config: RunConfig, auxiliary: AuxiliaryConfig) -> str:
    """Return what an auxiliary starts from if it borrows no weights."""
    if auxiliary.init == "random":
        return "random"
    if auxiliary.float_train is not None:
        return "float"
    return "teacher" if (auxiliary.net or config.student_net) == config.teacher_net else "random"


def _borrowed(run: RunFolder) -> Path | None:
    """Return what the student starts from (its float training, or a file), if the auxiliary starts from it, too."""
    config, auxiliary = run.config, auxiliary_of(run.config)
    if auxiliary.init == "random" or auxiliary.float_train is not None:
        return None
    if (auxiliary.net or config.student_net) != config.student_net:
        return None
    return run.path / "student" / "float" / WEIGHTS if config.student_start == "float" else config.student.weights
