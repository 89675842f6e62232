"""The training of a student in other widths than its own, which takes the student's place in its own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from qkd.config import AgentConfig, PhaseConfig, RunConfig
from qkd.files import read_safetensors, sha256_of
from qkd.roles.agents import agent_inputs
from qkd.roles.guide import guide_of
from qkd.roles.learner import StudentRole, stretched_train
from qkd.run.folder import RunFolder
from qkd.training.assembly import WEIGHTS, Context
from quantizers.recipes.carrying import carry_over

FOLDER = "student/widths"


class WidthRole(StudentRole):
    """The student of a run in one of the widths before its own.

    Args:
        context: The run; its teacher is complete, and so are the student's float training and the widths before.
        index: Which of ``student.widths``, from 0.
    """

    def __init__(self, context: Context, index: int) -> None:
        self._run, self._index = context.run, index  # whose student goes through it
        inner = replace(context, run=RunFolder(width_config(context.config, index), context.run.path))
        is_float = context.config.student_start == "float"
        borrowed = context.run.path / "student" / "float" / WEIGHTS if is_float else None
        super().__init__(inner, name=f"widths-{index}", folder=f"{FOLDER}/{index}", borrowed=borrowed)

    @staticmethod
    def weights_file(run: RunFolder, index: int) -> Path:
        """Return where the weights of one of the widths are written."""
        return run.path / FOLDER / str(index) / WEIGHTS

    def agent(self) -> AgentConfig:
        """Return the student's agent; the schedule that its search finds does not exist yet."""
        return self.agent_without_search()

    def student(self) -> nn.Module:
        """Return the net to train, on the device, with the weights of the previous widths."""
        student = super().student()
        if self._index:
            carry_over(student, weights_of(self._run, self._index - 1))
        return student

    def marks(self) -> dict[str, str]:
        """Return the hashes of what it learns from and of its start."""
        return {**super().marks(), **{name: sha256_of(path) for name, path in self._before().items()}}

    def inputs(self) -> list[Path]:
        """Return its teacher, its start, and the teacher's schedules; never the student's own."""
        is_shared = self._run.config.student.agent.policy == "teacher"
        reads_agent = is_shared or self._run.config.student.view == "own"
        agents = agent_inputs(self._run, "teacher") if reads_agent else []
        return [*guide_of(self.context.run).files, *self.start_inputs(), *self._before().values(), *agents]

    def _before(self) -> Mapping[str, Path]:
        return {"widths before": self.weights_file(self._run, self._index - 1)} if self._index else {}


def weights_of(run: RunFolder, index: int) -> dict[str, Tensor]:
    """Return the final state of a training in one of the widths.

    Args:
        run: The run folder.
        index: Which of ``student.widths``.

    Raises:
        FileNotFoundError: If it is not trained yet.
    """
    file = WidthRole.weights_file(run, index)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the student is trained in these widths first (qkd distill)")
    return read_safetensors(file)


def width_config(config: RunConfig, index: int) -> RunConfig:
    """Return the config with the student in one of the widths before its own.

    It learns from the student's terms in one phase, at the student's rate.
    """
    width = config.student.widths[index]
    quant = {"weight_bits": width.weight_bits, "act_bits": width.act_bits}
    student = config.student.model_copy(
        update={
            "quant": config.student.quant.model_copy(update=quant),
            "train": stretched_train(config.student.train, width.epochs),
            "phases": (PhaseConfig(name=f"w{width.weight_bits}a{width.act_bits}", epochs=width.epochs),),
            "widths": (),
            "self_distillation": None if width.act_bits >= 8 else config.student.self_distillation,
        }
    )
    return config.model_copy(update={"student": student})
