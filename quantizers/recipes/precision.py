"""A student with some of its activations temporarily on finer grids, to see its output at higher precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from quantizers.modes import statistics_kept
from quantizers.student import act_quantizers

HIGH_BITS = 8


@contextmanager
def stochastic_precision(
    student: nn.Module, generator: torch.Generator, *, low_share: float = 0.5
) -> Iterator[tuple[str, ...]]:
    """Give random low-bit activation quantizers eight bits within a block; statistics do not change in it.

    The finer grid covers the same range, and its codes include those of the quantizer's own grid.

    Args:
        student: A network from :func:`quantizers.prepare`, calibrated; restored after the block.
        generator: Draws once for each low-bit quantizer, on the CPU.
        low_share: Probability that a quantizer keeps its own grid, in ``[0, 1]``.

    Yields:
        Module paths of those on finer grids.

    Raises:
        ValueError: If ``low_share`` is not in ``[0, 1]``.

    References:
        Boo et al., `Stochastic Precision Ensemble <https://arxiv.org/abs/2009.14502>`_, 2021 (SPEQ).
    """
    if not 0 <= low_share <= 1:
        raise ValueError(f"low_share must be in [0, 1], got {low_share=}")
    low = {name: one.quant for name, one in act_quantizers(student).items() if one.quant.bits < HIGH_BITS}
    draws = torch.rand(len(low), generator=generator).tolist()
    finer = {name: quant for (name, quant), draw in zip(low.items(), draws, strict=True) if draw >= low_share}
    try:
        for quant in finer.values():
            quant.finer = round((2**HIGH_BITS - 1) / (2**quant.bits - 1))
        with statistics_kept(student):
            yield tuple(finer)
    finally:
        for quant in finer.values():
            quant.finer = 1
