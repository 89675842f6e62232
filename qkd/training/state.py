"""Convert a training's state to named tensors and back: weights, buffers, optimizer, averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qkd.training.averaging import WeightAverage
from qkd.training.job import Partner
from quantizers import is_grid_record, require_same_grids
from quantizers.student import with_masks

# prefixes of tensor names in a checkpoint
MODEL, OPTIMIZER, AVERAGE, PARTNER, RULE = "model/", "optimizer/", "average/", "partner/", "rule/"


def collect(
    model: nn.Module, optimizer: Optimizer, average: WeightAverage | None, partners: Sequence[Partner] = ()
) -> dict[str, Tensor]:
    """Return every tensor that a training needs to resume, by name.

    Names are ``model/<state name>``, ``optimizer/<parameter name>/<key>``, ``average/<parameter name>``, and the first
    two again after ``partner/<name>/``.
    """
    tensors = {MODEL + name: tensor for name, tensor in model.state_dict().items()}
    tensors.update({OPTIMIZER + name: tensor for name, tensor in _moments(model, optimizer).items()})
    for partner in partners:
        prefix = f"{PARTNER}{partner.name}/"
        tensors.update({f"{prefix}{MODEL}{name}": tensor for name, tensor in partner.module.state_dict().items()})
        own = _moments(partner.module, partner.optimizer or optimizer)
        tensors.update({f"{prefix}{OPTIMIZER}{name}": tensor for name, tensor in own.items()})
    if average is not None:
        tensors.update({AVERAGE + name: tensor for name, tensor in average.tensors.items()})
    return tensors


def restore(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: Optimizer,
    average: WeightAverage | None,
    partners: Sequence[Partner] = (),
) -> None:
    """Restore the tensors of :func:`collect`, bit for bit.

    Raises:
        ValueError: If they belong to another model.
    """
    fill(model, below(tensors, MODEL))
    moments = [(model, below(tensors, OPTIMIZER))]
    for partner in partners:
        own = below(tensors, f"{PARTNER}{partner.name}/")
        fill(partner.module, below(own, MODEL))
        if partner.optimizer is None:
            moments.append((partner.module, below(own, OPTIMIZER)))
        else:
            _restore_optimizer([(partner.module, below(own, OPTIMIZER))], partner.optimizer)
    _restore_optimizer(moments, optimizer)
    if average is not None:
        average.load(below(tensors, AVERAGE))


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a complete state into a model, in place.

    Every parameter remains the same object (an optimizer holds it), and no load hook runs: those of Brevitas would
    rebuild the quantizers.

    Args:
        model: Receives the tensors.
        tensors: Exactly the names and shapes of its ``state_dict()`` (except grid records, which old ones lack).

    Raises:
        ValueError: If names, shapes or a student's grids differ; the model is then untouched.
    """
    own, tensors = model.state_dict(), with_masks(model, tensors)
    try:
        require_same_grids(model, tensors)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    missing = [name for name in own if name not in tensors and not is_grid_record(name)]
    unexpected = [name for name in tensors if name not in own]
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or unexpected or shapes:
        found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        faults = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in found.items() if names]
        raise ValueError(f"these tensors are not for this net: {'; '.join(faults)}")
    again = model.state_dict()
    if copied := [name for name, one in own.items() if one.numel() and one.data_ptr() != again[name].data_ptr()]:
        raise ValueError(f"the net's state_dict returns copies ({', '.join(copied[:3])}), so it cannot be restored")
    for name, tensor in own.items():
        if name in tensors:
            tensor.copy_(tensors[name])


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return ``<parameter name>/<key>`` -> tensor of the optimizer's state for a model's parameters."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(moments: Iterable[tuple[nn.Module, Mapping[str, Tensor]]], optimizer: Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[nn.Parameter, dict[str, Any]] = {}
    trained = {id(parameter) for parameter in parameters}
    for model, tensors in moments:
        named = dict(model.named_parameters())
        for full_name, tensor in tensors.items():
            name, key = full_name.rsplit("/", 1)
            if id(named[name]) not in trained:
                raise ValueError(f"{name} was trained then, and is frozen now (which an earlier version ignored)")
            states.setdefault(named[name], {})[key] = tensor
    by_index = {index: states[parameter] for index, parameter in enumerate(parameters) if parameter in states}
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter.detach()).copy_(value)  # the parameter's memory format


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, keyed without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
