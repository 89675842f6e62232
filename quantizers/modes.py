"""Modes within a block: training flags, updates of running statistics, exact float32; all are restored after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module after a block, even on failure."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode within a block, in exact float32; restore the mode of every module after it."""
    with training_flags_kept(model), exact_float32():
        model.eval()
        yield


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep TensorFloat-32 off within a block; no effect on a CPU.

    PyTorch lets convolutions on NVIDIA GPUs round their operands to 10 bits of mantissa. That is 1e-4 of a sum: enough
    to move a value of a low-bit net to the next code, so that the scored net would differ from the exported one.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        before = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the flags were set one by one, through new names that PyTorch's old ones cannot express
        parts: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, matmul)  # type: ignore[attr-defined]
        kept = [part.fp32_precision for part in parts]
        try:
            for part in parts:
                part.fp32_precision = "ieee"
            yield
        finally:
            for part, precision in zip(parts, kept, strict=True):
                part.fp32_precision = precision
        return
    try:
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@contextmanager
def statistics_kept(net: nn.Module) -> Iterator[None]:
    """Keep batch norm's running statistics unchanged within a block, in whatever mode a net is."""
    norms = [one for one in net.modules() if isinstance(one, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0  # not restored from a copy: autograd holds the statistics until the backward pass
        yield
    finally:
        with torch.no_grad():
            for norm, momentum, count in zip(norms, momenta, counts, strict=True):
                norm.momentum = momentum
                if count is not None and norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.copy_(count)
