"""The teacher's role in a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from qkd.methods.method import Beside
from qkd.methods.table import methods_of
from qkd.roles.agents import agent_inputs, agent_to_train_with
from qkd.roles.float_training import FloatRole
from qkd.roles.stored import schedule_mark
from qkd.training.assembly import Context, Role


def teacher_role(context: Context, *, alone: bool = False) -> FloatRole:
    """Return the teacher of a run: trained, or taken from a file unchanged.

    Args:
        context: The run.
        alone: Whether nothing learns with it, whatever the methods in the config, as in a search.
    """
    own, run, methods = context.config.teacher, context.run, methods_of(context.config)

    def beside(net: nn.Module) -> Beside | None:
        found = [] if alone else [method.beside_teacher(net, context.splits) for method in methods]
        return next((one for one in found if one is not None), None)

    trained_by = {} if own.train is None else schedule_mark(own.agent)  # now: the file may change meanwhile

    def details(net: nn.Module) -> dict[str, Any]:
        found = {key: value for method in methods for key, value in method.results(context, "teacher", net).items()}
        return {**found, **trained_by}

    return FloatRole(
        context, "teacher", "teacher", "teacher", context.config.teacher_net, own.train,
        lambda: agent_to_train_with(run, "teacher"), ("teacher",),
        weights=own.weights, head=own.head, inputs=tuple(agent_inputs(run, "teacher")), beside=beside, details=details,
    )  # fmt: skip


def teacher_parts(context: Context) -> Iterator[Role]:
    """Yield the trainings that belong to the teacher, apart from its own."""
    for method in methods_of(context.config):
        yield from method.sub_trainings(context, "teacher")
