"""Arithmetic that stays finite, values and gradients, where the plain form would divide by zero or take its root.

A 2-bit student's outputs are often degenerate: rows of zeros, equal rows, rows that point in opposite directions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.choices import LEAST_TEMPERATURE, MOST_TEMPERATURE

P = ParamSpec("P")
R = TypeVar("R")

HOT = 20.0  # temperature above which a divergence of softened distributions needs float64
LABELS = ("labels", "other_labels", "generated_labels")  # the integer arguments of losses


def in_full_precision(loss: Callable[P, R]) -> Callable[P, R]:
    """Let a loss compute outside autocast, with its half-precision tensors (also those in lists) in float32.

    Autocast rounds the products of all pairs of images to half precision, which costs some losses all their digits.
    Tensors other than labels must be floating (ValueError): PyTorch accepts integers for some operations and silently
    truncates the results.
    """
    names = tuple(inspect.signature(loss).parameters)

    @functools.wraps(loss)
    def compute(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            _require_floating(name, value)
        with torch.autocast(device_type((*args, *kwargs.values())), enabled=False):
            return loss(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})

    return compute


def _require_floating(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if name not in LABELS and not value.is_floating_point():
            raise ValueError(f"{name} must be floating, got {str(value.dtype).removeprefix('torch.')}")
    elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        for one in value:
            _require_floating(name, one)


def device_type(values: Iterable[Any]) -> str:
    """Return the device type of the first tensor, also one in a list; ``cpu`` if there is none."""
    for value in values:
        if isinstance(value, Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)) and value:
            return device_type(value)
    return "cpu"


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return widened(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a NamedTuple stays one
        return type(value)(*map(_wide, value))
    return [_wide(one) for one in value] if isinstance(value, (list, tuple)) else value


def widened(tensor: Tensor) -> Tensor:
    """Return half-precision tensors in float32 (sums of exponentials and squares need the range), others as is."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def soft_log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return the logarithms of the probabilities at a temperature; in float64 at a high one.

    A divergence falls with the square of the temperature, and is multiplied by it again. In float32, the rounding of
    logarithms near ``ln K`` leaves three digits of it at 100, and none from about 1e4 on: values are even negative.

    Args:
        logits: Shape ``[batch, classes]``, float32 or float64.
        temperature: Positive.

    Raises:
        ValueError: If the temperature is so low that logits overflow, or so high that float64 rounds all of it away.
    """
    if not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        raise ValueError(
            f"temperature must be from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, beyond which rounding is all "
            f"that is left, got {temperature=}"
        )
    if temperature > HOT and logits.device.type != "mps":  # which has no float64
        logits = logits.double()
    return functional.log_softmax(logits / temperature, dim=1)


def undoubled(value: Tensor, like: Tensor, temperature: float) -> Tensor:
    """Return a value computed from :func:`soft_log_probabilities` in the type of the logits again."""
    return value.to(like.dtype) if temperature > HOT else value


def row_norms(rows: Tensor) -> Tensor:
    """Return L2 norms over the last dimension; of a row of zeros it is 0, with gradient 0 (not NaN).

    Args:
        rows: Shape ``[..., features]``, floating.
    """
    squares, size = _scaled_squares(rows)
    return _root(squares) * size


def unit_rows(rows: Tensor) -> Tensor:
    """Return rows of norm 1 along the last dimension; a row of zeros stays zero, with gradient 0.

    Args:
        rows: Shape ``[..., features]``, floating, of any size: rows of 1e30 do not overflow.
    """
    squares, size = _scaled_squares(rows)
    is_zero = squares <= 0
    scale = torch.where(is_zero, torch.ones_like(squares), squares).rsqrt()
    return rows / size.unsqueeze(-1) * torch.where(is_zero, torch.zeros_like(scale), scale).unsqueeze(-1)


def offset_unit_rows(rows: Tensor, epsilon: float) -> Tensor:
    """Return rows divided by their norm plus epsilon, as in some published losses; a row of zeros stays zero.

    Deviation: the gradient of a row of zeros is 0. That of the published form is NaN (the root of zero) or, with a safe
    root, ``1 / epsilon`` times that of any other row: one dead image of a 2-bit student would drown the batch.

    Args:
        rows: Shape ``[..., features]``, floating.
        epsilon: Positive.
    """
    norms = row_norms(rows)
    factor = torch.where(norms > 0, 1 / (norms + epsilon), torch.zeros_like(norms))
    return rows * factor.unsqueeze(-1)


def distances(rows: Tensor) -> Tensor:
    """Return Euclidean distances of all pairs, ``[rows, rows]``; between equal rows exactly 0, with gradient 0.

    Differences are squared: a sum of squares and products would cancel for rows that are close together.

    Args:
        rows: Shape ``[rows, features]``, floating.
    """
    size = rows.detach().abs().amax()
    size = torch.where(size > 0, size, torch.ones_like(size))
    scaled = rows / size  # squares of 1e30 overflow float32
    return torch.cdist(scaled, scaled, compute_mode="donot_use_mm_for_euclid_dist") * size


def log_others(log_probabilities: Tensor, is_target: Tensor) -> Tensor:
    """Return the log of the total probability of all but the marked class of each row, shape ``[batch]``.

    ``log(1 - p)`` itself is minus infinity as soon as p rounds to 1.

    Args:
        log_probabilities: Shape ``[batch, classes]``, at least two classes.
        is_target: Same shape, bool, one class per row.
    """
    others = log_probabilities[~is_target].reshape(len(log_probabilities), -1)
    return torch.logsumexp(others, dim=1)


def target_difference(first: Tensor, second: Tensor, is_target: Tensor) -> Tensor:
    """Return how much larger the marked class's probability is in the first than in the second, shape ``[batch]``.

    Two probabilities that round to 1 cancel, so it is then that of the other classes which is subtracted.

    Args:
        first: Log-probabilities, shape ``[batch, classes]``, at least two classes.
        second: Same shape.
        is_target: Same shape, bool, one class per row.
    """
    p, q = first[is_target].exp(), second[is_target].exp()
    others = log_others(second, is_target).exp() - log_others(first, is_target).exp()
    return torch.where((p > 0.5) & (q > 0.5), others, p - q)


def _scaled_squares(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's sum of squares after division by its largest entry, and that entry (1 for zeros)."""
    size = rows.detach().abs().amax(dim=-1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    return (rows / size.unsqueeze(-1)).square().sum(dim=-1), size


def _root(squares: Tensor) -> Tensor:
    is_zero = squares <= 0
    root = torch.where(is_zero, torch.ones_like(squares), squares).sqrt()
    return torch.where(is_zero, torch.zeros_like(root), root)
