"""Compares one step of a recording with what torch computed there."""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.graph.form.refusal import RewriteError
from quantizers.graph.spelling.pen import Pen, Value

# A module of the closed set computes the same as torch, except perhaps for the order of summation.
STEP_TOLERANCE = 1e-4


def require_same_step(pen: Pen, real: Tensor, made: Value) -> None:
    """Raise if a spelling computes something other than torch, which is a bug in this toolkit, not the network.

    Args:
        pen: What wrote it; knows the place.
        real: What torch computed, any shape.
        made: What the modules of the spelling compute.

    Raises:
        RewriteError: If shapes differ, or values by more than :data:`STEP_TOLERANCE` of the largest.
    """
    got = made.tensor
    if got.shape != real.shape:
        raise RewriteError(_fault(pen, f"shape {tuple(got.shape)} instead of {tuple(real.shape)}"))
    if not real.is_floating_point() or not bool(torch.isfinite(real).all()):
        return
    error = float((got - real).abs().max()) if real.numel() else 0.0
    if error > STEP_TOLERANCE * max(float(real.abs().max()), 1e-3):
        raise RewriteError(_fault(pen, f"a difference of {error:.3g}"))


def _fault(pen: Pen, found: str) -> str:
    return (
        f"{pen.place()}: the spelling of {pen.what()} is another function ({found}). Please report it; "
        "prepare(..., verify=False) skips this check"
    )
