"""An ensemble teacher as a method: members that differ by seed, and the student learns from their average."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qkd.config import RunConfig
from qkd.methods.ensemble.average import EnsembleTeacher
from qkd.methods.method import Guide, Method
from qkd.report.records import read_record
from qkd.roles.agents import agent_inputs, agent_to_train_with
from qkd.roles.float_training import FloatRole
from qkd.roles.nets import load_float
from qkd.run.folder import RunFolder
from qkd.training import accuracy
from qkd.training.assembly import WEIGHTS, Context


class Ensemble(Method):
    """Method that trains the teacher's other members, each in its own folder."""

    @property
    def why_one_device(self) -> str:
        """Return an empty string: its members are trained like any net."""
        return ""

    def sub_trainings(self, context: Context, before: str) -> Iterator[FloatRole]:
        """Yield the other members: their weights, image order and augmentation differ from the first's."""
        teacher, run = self.config.teacher, context.run
        if before != "teacher":
            return
        for number in range(1, teacher.members):
            yield FloatRole(
                context, f"teacher_member_{number}", f"teacher/member_{number}", "teacher", self.config.teacher_net,
                teacher.train,
                lambda: agent_to_train_with(run, "teacher"), ("teacher", number),
                inputs=tuple(agent_inputs(run, "teacher")),
            )  # fmt: skip

    def guide(self, run: RunFolder, below: Guide) -> Guide:
        """Return the average of the members."""
        files = tuple(member_folder(run, number) / WEIGHTS for number in range(run.config.teacher.members))
        return Guide(lambda: load_ensemble(run), files, below.net, f"{below.words}, an ensemble of {len(files)}")

    def results(self, context: Context, role: str, model: nn.Module) -> Mapping[str, Any]:
        """Return the ensemble's part of a teacher's result.

        Keys: ``members`` (accuracies, the first member first), ``members_mean`` and ``members_spread`` (sample
        standard deviation) of the test accuracies, ``ensemble`` (accuracies of the average). Accuracies are fractions.
        """
        if role != "teacher":
            return {}
        teacher, run = self.config.teacher, context.run
        numbers = range(1, teacher.members)
        members = [_accuracies(context, model)]
        stored = (read_record(member_folder(run, number) / "result.json") for number in numbers)
        members += [{key: one[key] for key in members[0]} for one in stored]
        average = average_of(self.config, [model, *(load_member(run, number).to(context.device) for number in numbers)])
        tests = [member["test_accuracy"] for member in members]
        return {
            "members": members,
            "members_mean": statistics.fmean(tests),
            "members_spread": statistics.stdev(tests),
            "ensemble": {"space": teacher.ensemble, **_accuracies(context, average)},
        }


def average_of(config: RunConfig, nets: list[nn.Module]) -> EnsembleTeacher:
    """Return the average of members as set in a config."""
    return EnsembleTeacher(nets, config.teacher.ensemble, temperature=config.teacher.ensemble_temperature)


def load_ensemble(run: RunFolder) -> nn.Module:
    """Return the run's teacher as a student learns from it: the average of its members, or its only one.

    In eval mode, on the CPU.

    Raises:
        FileNotFoundError: If one does not exist yet.
        ValueError: If a file is damaged or of a different net.
    """
    members = [load_member(run, number) for number in range(run.config.teacher.members)]
    if len(members) == 1:
        return members[0]
    return average_of(run.config, members).eval()


def load_member(run: RunFolder, number: int) -> nn.Module:
    """Return a member of the run's teacher, from 0, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If it does not exist yet.
        ValueError: If its file is damaged or of a different net.
    """
    return load_float(member_folder(run, number) / WEIGHTS)


def member_folder(run: RunFolder, number: int) -> Path:
    """Return the folder of a member of the teacher, from 0; it may not exist yet."""
    return run.path / "teacher" / f"member_{number}" if number else run.path / "teacher"


def _accuracies(context: Context, model: nn.Module) -> dict[str, Any]:
    splits, data = context.splits, context.config.data
    parts = {"test_accuracy": splits.test, "val_accuracy": splits.val}
    return {name: accuracy(model, part, splits, data, context.device) for name, part in parts.items()}
