"""Modes of a model within a block: training flags, and whether running statistics move; all come back after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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


@contextmanager
def statistics_kept(net: nn.Module) -> Iterator[None]:
    """Let batch norm's running statistics stay within a block, in whatever mode a net is."""
    norms = [one for one in net.modules() if isinstance(one, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0  # not a copy put back: autograd holds the statistics until the backward pass
        yield
    finally:
        with torch.no_grad():
            for norm, momentum, count in zip(norms, momenta, counts, strict=True):
                norm.momentum = momentum
                if count is not None and norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.copy_(count)
