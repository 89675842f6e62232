"""Checks of a data-free method: reject nets that lack what it reads, and images of a single class."""

from __future__ import annotations

from torch import nn

from qkd.methods.data_free.making.kinds import KINDS
from qkd.methods.data_free.making.watching import last_layer_of, norms_of


def require_teacher_fits(
    method: str, name: str, net: nn.Module, classes: int, image_shape: tuple[int, int, int], groups: int = 1
) -> None:
    """Raise unless a teacher has everything that a method reads.

    Args:
        method: The value of ``student.data_free.method``.
        name: Name of the net.
        net: The net, with any weights.
        classes: Number of classes of the data set.
        image_shape: Channels, height and width.
        groups: Number of generators.

    Raises:
        ValueError: If there are more generators than classes, or fewer than two classes, or it has no batch norm with
            running statistics, or does not end in a linear layer of these classes.
    """
    kind = KINDS[method]
    require_classes(classes)
    if groups > classes:
        raise ValueError(f"student.data_free.groups: {groups} generators for {classes} classes; give at most {classes}")
    if kind.needs_statistics and not norms_of(net):
        others = ", ".join(other for other, row in KINDS.items() if not row.needs_statistics)
        raise ValueError(
            f"student.data_free.method: `{method}` reads running statistics of the teacher's batch norms, but {name} "
            f"has none; use another net, or a method that does not need them: {others}"
        )
    last = last_layer_of(net, image_shape) if kind.needs_last_layer else None
    if kind.needs_last_layer and (last is None or last.out_features != classes):
        others = ", ".join(other for other, row in KINDS.items() if not row.needs_last_layer)
        found = "of none" if last is None else f"of one with {last.out_features} outputs, not {classes}"
        raise ValueError(
            f"student.data_free.method: `{method}` reads the linear layer whose output is the teacher's logits, but "
            f"those of {name} are the output {found}; use another net, or a method that does not need it: {others}"
        )


def require_classes(classes: int) -> None:
    """Raise unless there are at least two classes: with one, no image is more typical of its class than another.

    Args:
        classes: Number of classes of the data set.

    Raises:
        ValueError: If there are fewer.
    """
    if classes < 2:
        raise ValueError(f"student.data_free: needs at least two classes, got {classes}: add images of another class")
