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
    """States that are not of one net."""


def average_states(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of the states of one net.

    Floating tensors are averaged in float64, client by client in the order given, and rounded once. Quantizer steps
    are averaged by their size, since their sign is without effect. Ends of an activation's grid are whole numbers and
    stay so: the lower end is rounded, the upper one keeps its distance. What cannot be averaged has its own rule:
    counters of batches take the largest, ``calibrated`` holds where it holds for all, all other integers (records of
    grids) must be equal.

    Args:
        states: Name -> tensor, of the same names, shapes and types, at least one; order does not matter but for
            rounding in float64.
        weights: One a state, not negative, not all 0; they are divided by their sum.

    Returns:
        Name -> tensor, of the states' types. A single state comes back bit for bit (steps without a sign).

    Raises:
        UnlikeStatesError: If names, shapes or types differ, or an integer that has to be equal does.
        ValueError: If there is no state, or the weights are not as above.

    Example:
        >>> average_states([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [3, 1])
        {'w': tensor([1.])}
    """
    total = float(sum(weights))
    if not states or len(states) != len(weights) or min(weights) < 0 or not total > 0:
        raise ValueError(f"needs states and as many weights, none negative, got {len(states)} and {list(weights)}")
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
    """Tell whether a name is of the smallest or largest code of a grid.

    Args:
        name: In the state.
        state: Of a net.
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
            raise UnlikeStatesError(f"states are not of one net: {', '.join(unlike[:4])} differ")
