"""Finds the running line of the network's own code, and other information in the call stack."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
_STANDARD = os.path.dirname(os.__file__) + os.sep  # the standard library, which may hold site-packages, too


def _is_own(name: str) -> bool:
    is_standard = name.startswith(_STANDARD) and not name.startswith((_STANDARD + "site-", _STANDARD + "dist-"))
    return not name.startswith((*_SKIPPED, "<")) and not is_standard


def user_site() -> str:
    """Return ``file.py:line`` of the innermost frame of the network's own code, or an empty string."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if _is_own(name):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def is_normalizing() -> bool:
    """Return whether weight or spectral norm of torch is computing a weight, as a hook or as a parametrization."""
    frame = sys._getframe(1)
    while frame is not None:
        module, own = str(frame.f_globals.get("__name__", "")), type(frame.f_locals.get("self")).__name__
        if module in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"):
            return True
        if module == "torch.nn.utils.parametrizations" and own in ("_WeightNorm", "_SpectralNorm"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def stochastic_depth_of() -> nn.Module | None:
    """Return the module for the running call of ``torchvision.ops.stochastic_depth``, or None outside such a call.

    It is a plain Python function that no hook observes; it is detected at its product with the noise.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code, own = frame.f_code, frame.f_globals.get("stochastic_depth")
        is_torchvision = str(frame.f_globals.get("__name__", "")).startswith("torchvision.")
        if code.co_name == "stochastic_depth" and is_torchvision and getattr(own, "__code__", None) is code:
            made: nn.Module = frame.f_globals["StochasticDepth"](frame.f_locals["p"], frame.f_locals["mode"])
            return made
        frame = frame.f_back  # type: ignore[assignment]
    return None
