"""Training and evaluation mode of a model within a block: every module gets its own flag back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its training flag back after a block, also on failure."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode within a block; every module gets its own mode back after it."""
    with training_flags_kept(model):
        model.eval()
        yield
