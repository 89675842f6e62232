"""Hears of what a network does outside of torch, where it cannot be recorded: decisions on values, other dice."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantizers.graph.form.refusal import RewriteError
from quantizers.graph.spelling.sites import user_site
from quantizers.graph.spelling.table import NUMBERS

# Results of operators that are plain numbers of values; those of shapes and strides are known without the values.
_PLAIN = (torch.BoolType, torch.FloatType, torch.NumberType)
_OF_SHAPES = ("is_same_size", "is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "is_pinned")
_TO_NUMPY = ("numpy", "__array__", "__dlpack__")


def is_number(func: Any, name: str) -> bool:
    """Tell whether an operation of ATen makes a Python number, or sizes, of a tensor's values."""
    plain = any(isinstance(result.type, _PLAIN) for result in func._schema.returns)
    return name in NUMBERS or (plain and name not in _OF_SHAPES)


def number_message(where: str, *, of_chance: bool = False) -> str:
    """Return why a number or a condition that is taken from tensors is refused."""
    site = user_site() or "an unknown line"
    if of_chance:
        return (
            f"{where}: a number or a condition is drawn at random at {site}, so each pass may be another function; use "
            "a dropout or stochastic depth layer, or draw outside of the network"
        )
    return (
        f"{where}: a number or a condition is taken from tensor values at {site}; "
        "take it from shapes, which are known, or move it out of the network"
    )


def leaving(func: Any, where: str) -> str | None:
    """Return why a function of Python is refused that hands a tensor's values out unseen, or None for any other."""
    if func is Tensor.tolist:
        return number_message(where)
    if getattr(func, "__name__", "") in _TO_NUMPY and getattr(Tensor, func.__name__, None) is func:
        return (
            f"{where}: values leave torch at {user_site() or 'an unknown line'}, and what is computed from them does "
            "not depend on the images, as torch sees it; use torch operations for that (not numpy)"
        )
    return None


class OtherDice:
    """Notices a network that draws random numbers from Python or NumPy, which decide what it computes.

    Two runs that happened to draw alike would look like one function.
    """

    def __init__(self) -> None:
        self._before = _states()

    def require_unmoved(self, where: str) -> None:
        """Raise if numbers were drawn.

        Args:
            where: The module that has just run.

        Raises:
            RewriteError: If so.
        """
        if _states() != self._before:
            raise RewriteError(
                f"{where}: forward draws from Python's or NumPy's random numbers, so each pass may be another "
                "function; use a dropout or stochastic depth layer, or draw outside of the network"
            )


def _states() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["pos"], state["key"].tobytes()
