"""A training's state as named tensors and back: weights, buffers, optimizer, averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qkd.training.averaging import WeightAverage

MODEL, OPTIMIZER, AVERAGE = "model/", "optimizer/", "average/"  # prefixes of tensor names in a checkpoint


def collect(model: nn.Module, optimizer: Optimizer, average: WeightAverage | None) -> dict[str, Tensor]:
    """Return every tensor that a training needs to go on, by name.

    Names are ``model/<state name>``, ``optimizer/<parameter name>/<key>`` and ``average/<parameter name>``.
    """
    tensors = {MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{name}/{key}"] = value
    if average is not None:
        tensors.update({AVERAGE + name: tensor for name, tensor in average.tensors.items()})
    return tensors


def restore(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer, average: WeightAverage | None
) -> None:
    """Put the tensors of :func:`collect` back, bit for bit.

    Raises:
        ValueError: If they belong to another model.
    """
    fill(model, _below(tensors, MODEL))
    _restore_optimizer(_below(tensors, OPTIMIZER), model, optimizer)
    if average is not None:
        average.load(_below(tensors, AVERAGE))


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a whole state into a model, in place.

    Every parameter stays the object it is (an optimizer holds it), and no load hook runs: Brevitas' own would build the
    quantizers anew.

    Args:
        model: Receives the tensors.
        tensors: Exactly the names and shapes of its ``state_dict()``.

    Raises:
        ValueError: If names or shapes differ; the model is untouched then.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or unexpected or shapes:
        found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        faults = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in found.items() if names]
        raise ValueError(f"these tensors are not for this net: {'; '.join(faults)}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _restore_optimizer(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[str, dict[str, Any]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        states.setdefault(name, {})[key] = tensor
    by_index = {index: states[names[p]] for index, p in enumerate(parameters) if names[p] in states}
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter.detach()).copy_(value)  # the parameter's memory format


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
