"""The elementwise real functions that a student may keep: their modules, their names in the view, their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class RealFunction:
    """A function of one value that has no integer form, by name.

    Args:
        name: Its name in the integer view and the export.
        parameters: Attributes of the module that it depends on; they keep their names.
    """

    name: str
    parameters: tuple[str, ...] = ()


# The exact type decides: a subclass may compute something else.
FUNCTIONS: dict[type[nn.Module], RealFunction] = {
    nn.CELU: RealFunction("celu", ("alpha",)),
    nn.ELU: RealFunction("elu", ("alpha",)),
    nn.GELU: RealFunction("gelu", ("approximate",)),
    nn.Hardshrink: RealFunction("hardshrink", ("lambd",)),
    nn.Hardsigmoid: RealFunction("hardsigmoid"),
    nn.Hardswish: RealFunction("hardswish"),
    nn.Hardtanh: RealFunction("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: RealFunction("leaky_relu", ("negative_slope",)),
    nn.LogSigmoid: RealFunction("log_sigmoid"),
    nn.Mish: RealFunction("mish"),
    nn.PReLU: RealFunction("prelu"),  # its slopes are parameters, see `view_function`
    nn.ReLU: RealFunction("relu"),
    nn.ReLU6: RealFunction("relu6"),
    nn.SELU: RealFunction("selu"),
    nn.SiLU: RealFunction("silu"),
    nn.Sigmoid: RealFunction("sigmoid"),
    nn.Softplus: RealFunction("softplus", ("beta", "threshold")),
    nn.Softshrink: RealFunction("softshrink", ("lambd",)),
    nn.Softsign: RealFunction("softsign"),
    nn.Tanh: RealFunction("tanh"),
    nn.Tanhshrink: RealFunction("tanhshrink"),
    nn.Threshold: RealFunction("threshold", ("threshold", "value")),
}


def view_function(module: nn.Module, rank: int) -> tuple[str, dict[str, object]]:
    """Return (name, attributes) of a module of :data:`FUNCTIONS` for a tensor with ``rank`` axes.

    A PReLU with one slope is a leaky ReLU, which some runtimes compute on codes. One with a slope per channel has the
    attribute ``slope``, float32 ``[channels, 1, ...]``, which broadcasts over the non-batch axes of the tensor.
    """
    if isinstance(module, nn.PReLU):
        return _view_prelu(module, rank)
    known = FUNCTIONS[type(module)]
    return known.name, {name: getattr(module, name) for name in known.parameters}


def _view_prelu(module: nn.PReLU, rank: int) -> tuple[str, dict[str, object]]:
    slopes = module.weight.detach().to(torch.float32).cpu()
    if slopes.numel() == 1:
        return "leaky_relu", {"negative_slope": float(slopes)}
    return "prelu", {"slope": slopes.reshape(-1, *[1] * (rank - 2)).numpy().copy()}
