"""The training of a teacher's branches on the finished teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qkd.config import AgentConfig, TrainConfig
from qkd.files import sha256_of
from qkd.methods.rotations.branched import BranchClassifier
from qkd.methods.rotations.branches import STAGE, branched_teacher, fresh_branches, own_training, save_branches
from qkd.methods.rotations.step import BranchStep
from qkd.roles.agents import agent_inputs, role_agent, training_settings
from qkd.roles.nets import load_teacher
from qkd.roles.outcome import score, write_outcome
from qkd.training import FitResult, Phase
from qkd.training.assembly import WEIGHTS, Context, Made


@dataclass(frozen=True)
class BranchRole:
    """The branches of a run's teacher, which is finished and does not change.

    Args:
        context: The run.
    """

    context: Context
    name = STAGE
    folder = f"student/{STAGE}"
    title = "teacher branches"

    @property
    def train(self) -> TrainConfig:
        """Return optimizer and length."""
        return cast(TrainConfig, own_training(self.context.config))

    def agent(self) -> AgentConfig:
        """Return the teacher's agent."""
        return role_agent(self.context.run, "teacher")

    def make(self) -> Made:
        """Build the branches on the finished teacher.

        Raises:
            ValueError: If a tap cannot be used.
        """
        run, config, splits = self.context.run, self.context.config, self.context.splits
        teacher = load_teacher(run).to(self.context.device).requires_grad_(False)
        branches = fresh_branches(config, teacher, splits, "teacher")
        model = BranchClassifier(branched_teacher(config, teacher, branches))
        step = BranchStep(model.branched, joint=False, label_smoothing=self.train.label_smoothing)

        def enter() -> None:
            teacher.eval()

        phase = Phase("branches", self.train.epochs, step, enter, step.tapped)
        return Made(
            model,
            (phase,),
            begin=lambda: None,
            save=lambda: [save_branches(run.folder(self.folder) / WEIGHTS, branches, config, splits)],
            score=lambda fitted: [self._score(model, fitted)],
            others={"teacher": teacher},
            marks={"teacher": sha256_of(run.path / "teacher" / WEIGHTS)},
            settings=training_settings(config),
            inputs=[run.path / "teacher" / WEIGHTS, *agent_inputs(run, "teacher")],
        )

    def _score(self, model: BranchClassifier, fitted: FitResult | None) -> Path:
        config, splits, taps = self.context.config, self.context.splits, model.branched.paths
        found = score("teacher branches", config.teacher_net, model, splits, config.data, fitted, taps=taps)
        return write_outcome(self.context.run.path / self.folder, found)
