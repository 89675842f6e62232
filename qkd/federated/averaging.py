"""Average the states of clients' nets: shadow weights, batch-norm buffers, quantizer scales and integer buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from quantizers import is_grid_record

State: TypeAlias = Mapping[str, Tensor]

STEPS = ("scale", "alpha")  # parameters whose size is a quantizer's step: the sign has no meaning
COUNTER = "num_batches_tracked"
CALIBRATED = "calibrated"


class UnlikeStatesError(ValueError):
    """States that do not belong to the same net."""


def average_states(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of the states of one net.

    Floating-point tensors are averaged in float64, client by client in the given order, and rounded once. Quantizer
    steps are averaged by absolute value, since their sign has no effect. The ends of an activation grid remain whole
    numbers: the lower end is rounded, and the upper one keeps its distance. Other integers have their own rules: batch
    counters take the maximum, ``calibrated`` is set if it is set for all, and the rest (grid records) must be equal.

    Args:
        states: Name -> tensor, at least one state, all with the same names, shapes and types. Their order affects only
            the rounding in float64.
        weights: One per state, not negative, not all 0; they are divided by their sum.

    Returns:
        Name -> tensor, with the types of the states. A single state is returned bit-identical (steps without sign).

    Raises:
        UnlikeStatesError: If names, shapes or types differ, or integers that must be equal.
        ValueError: If there is no state, or the weights are invalid.

    Example:
        >>> average_states([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [3, 1])
        {'w': tensor([1.])}
    """
    total = float(sum(weights))
    if not states or len(states) != len(weights) or min(weights) < 0 or not total > 0:
        raise ValueError(
            f"needs one non-negative weight per state, not all zero, got {len(states)} states and {list(weights)}"
        )
    _require_alike(states)
    shares = [weight / total for weight in weights]
    return {name: _averaged(name, states, shares) for name in states[0]}


def _averaged(name: str, states: Sequence[State], shares: Sequence[float]) -> Tensor:
    tensors = [state[name] for state in states]
    last = name.rpartition(".")[2]
    if is_grid_end(name, states[0]):
        return _averaged_end(name, states, shares)
    if tensors[0].is_floating_point():
        is_step = last in STEPS and "tensor_quant" in name
        return _mean([one.abs() for one in tensors] if is_step else tensors, shares)
    if last == COUNTER:
        return torch.stack(tensors).amax(0)
    if last == CALIBRATED:
        return torch.stack(tensors).all(0)
    if any(not torch.equal(one, tensors[0]) for one in tensors):
        what = "records of grids" if is_grid_record(name) else "integers that no rule averages"
        raise UnlikeStatesError(f"{name}: {what} differ between clients; give all clients the same student")
    return tensors[0].clone()


def is_grid_end(name: str, state: State) -> bool:
    """Return whether a name is that of the smallest or largest code of a grid.

    Args:
        name: A name in the state.
        state: The state of a net.
    """
    place, _, last = name.rpartition(".")
    return last in ("low", "high") and place.endswith("tensor_quant") and {f"{place}.low", f"{place}.high"} <= {*state}


def _averaged_end(name: str, states: Sequence[State], shares: Sequence[float]) -> Tensor:
    place, _, last = name.rpartition(".")
    low = _mean([state[f"{place}.low"] for state in states], shares).round()
    spans = [state[f"{place}.high"] - state[f"{place}.low"] for state in states]
    if any(not torch.equal(one, spans[0]) for one in spans):
        raise UnlikeStatesError(f"{place}: grids of {[int(one) + 1 for one in spans]} codes differ between clients")
    return low if last == "low" else low + spans[0]


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].clone()
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total += tensor.double() * share
    return total.to(tensors[0].dtype)


def _require_alike(states: Sequence[State]) -> None:
    first = {name: (tensor.shape, tensor.dtype) for name, tensor in states[0].items()}
    for state in states[1:]:
        other = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        if other != first:
            unlike = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
            raise UnlikeStatesError(f"the states are not of the same net: {', '.join(unlike[:4])} differ")
