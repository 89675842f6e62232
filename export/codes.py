"""Read the integer codes that a student's quantizers give, by forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Codes = npt.NDArray[np.int64]


@contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its training flag back, whatever happens."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode and without gradients; restore its training flags."""
    with training_flags_kept(model), torch.no_grad():
        model.eval()
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter (the CPU where it has none)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def recorded_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the output of each named submodule at each of its calls, in order.

    Yields:
        Submodule name -> its outputs since the block was entered; a name the model lacks stays empty. Clear the lists
        between forward passes.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(_keep(outputs[name])) for name in outputs if name in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _keep(outputs: list[Tensor]) -> Any:
    def hook(module: nn.Module, inputs: object, output: Any) -> None:
        # Brevitas gives a QuantTensor, whose `value` is the dequantised tensor
        outputs.append(getattr(output, "value", output).detach())

    return hook


def as_codes(values: Tensor, scale: float) -> Codes:
    """Return ``values / scale`` as integers; exact for values that lie on the grid of that scale."""
    return np.rint(values.double().cpu().numpy() / scale).astype(np.int64)


def codes_in_order(outputs: Mapping[str, list[Tensor]], quantizers: Sequence[tuple[str, float]]) -> list[Codes | None]:
    """Return the codes of each ``(name, scale)``; the n-th mention of a name takes its n-th call (or None)."""
    calls = {name: iter(tensors) for name, tensors in outputs.items()}
    found: list[Codes | None] = []
    for name, scale in quantizers:
        tensor = next(calls[name], None)
        found.append(None if tensor is None else as_codes(tensor, scale))
    return found
