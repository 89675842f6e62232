"""Read the integer codes that a student's quantizers give, by forward hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Codes = npt.NDArray[np.int64]
Found = Codes | str  # codes, or why there are none


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter (the CPU if it has none)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def recorded_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the output of each named submodule at each of its calls, in order.

    Yields:
        Submodule name -> its outputs since the block was entered; names that the model lacks keep empty lists. Clear
        the lists between forward passes.
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
        # Brevitas gives a QuantTensor, whose `value` is the dequantized tensor
        outputs.append(getattr(output, "value", output).detach())

    return hook


def as_codes(values: npt.NDArray[Any], scale: float) -> Found:
    """Return ``values / scale`` as integers; exact for values that are on the grid of that scale.

    If a value is not finite, it has no code, and the reason is returned instead.
    """
    if not np.isfinite(values).all():
        return "a value is not finite"  # cast to int64, NaN would equal NaN
    return np.asarray(np.rint(values.astype(np.float64) / scale), np.int64)


def codes_in_order(outputs: Mapping[str, list[Tensor]], quantizers: Sequence[tuple[str, float]]) -> list[Found]:
    """Return the codes of each ``(name, scale)``; the n-th mention of a name takes its n-th call.

    If there are fewer or more calls than mentions, or a value is not finite, the reason is given instead of the codes.
    """
    mentions = Counter(name for name, _ in quantizers)
    calls = {name: iter(tensors) for name, tensors in outputs.items()}
    found: list[Found] = []
    for name, scale in quantizers:
        tensor = next(calls[name], None)
        if len(outputs[name]) != mentions[name]:
            found.append(f"the student calls it {len(outputs[name])} times, the file {mentions[name]} times")
        else:
            found.append(as_codes(cast(Tensor, tensor).double().cpu().numpy(), scale))
    return found
