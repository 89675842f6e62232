"""Config checks of the data-free methods. Does not import PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from qkd.config import RunConfig
from qkd.config.data_free import DataFreeConfig
from qkd.methods.data_free.making.kinds import KINDS


def config_faults(config: RunConfig) -> Iterator[str]:
    """Yield config faults for its data-free method, one per line with its key."""
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
