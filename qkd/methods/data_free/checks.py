"""What a data-free method cannot be used with: weights that it does not have, nets that lack what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from qkd.config import RunConfig
from qkd.config.data_free import DataFreeConfig
from qkd.methods.data_free.making.kinds import KINDS
from qkd.methods.data_free.making.watching import last_layer_of, norms_of


def config_faults(config: RunConfig) -> Iterator[str]:
    """Yield what of a config does not fit its data-free method, one line each with the key it is about."""
    settings = cast(DataFreeConfig, config.student.data_free)
    known = KINDS[settings.method].weights
    for name in settings.weights:
        if name not in known:
            names = ", ".join(known) or "it has no weights"
            yield f"student.data_free.weights: unknown weight `{name}` of method `{settings.method}`; known: {names}"
    if config.teacher.members > 1 and (
        KINDS[settings.method].needs_statistics or KINDS[settings.method].needs_last_layer
    ):
        yield (
            f"teacher.members: must be 1 with data_free method `{settings.method}`, got {config.teacher.members}: it "
            f"reads the inside of one net"
        )


def require_teacher_fits(method: str, name: str, net: nn.Module, classes: int) -> None:
    """Raise unless a teacher has what a method reads of it.

    Args:
        method: Of ``student.data_free``.
        name: Of the net.
        net: With any weights.
        classes: Of the data set.

    Raises:
        ValueError: If it has no batch norm with running statistics, does not end in a linear layer of its classes, or
            has fewer than two of them.
    """
    kind = KINDS[method]
    require_classes(classes)
    if kind.needs_statistics and not norms_of(net):
        others = ", ".join(other for other, row in KINDS.items() if not row.needs_statistics)
        raise ValueError(
            f"student.data_free.method: `{method}` reads running statistics of the teacher's batch norms, but {name} "
            f"has none; use another net, or a method that does without: {others}"
        )
    last = last_layer_of(net)
    if kind.needs_last_layer and (last is None or last.out_features != classes):
        others = ", ".join(other for other, row in KINDS.items() if not row.needs_last_layer)
        found = "has none" if last is None else f"has none of {classes} outputs (its last one has {last.out_features})"
        raise ValueError(
            f"student.data_free.method: `{method}` reads the teacher's last linear layer, but {name} {found}; use "
            f"another net, or a method that does without: {others}"
        )


def require_classes(classes: int) -> None:
    """Raise unless there are two classes at least: with one, no image is more of its class than any other.

    Args:
        classes: Of the data set.

    Raises:
        ValueError: If there are fewer.
    """
    if classes < 2:
        raise ValueError(f"student.data_free: needs two classes at least, got {classes}: add images of another class")
