"""The kind of every module of the closed set, which planning and rewriting ask for."""

from __future__ import annotations

from torch import nn

from quantizers.functions import FUNCTIONS
from quantizers.graph.form.canonical import Affine, Move, StopGradient
from quantizers.layers import Concat, GlobalAveragePool, Product, Sum

CONV, LINEAR, NORM, AFFINE, RELU, ADD, MUL, CAT = "conv", "linear", "norm", "affine", "relu", "add", "mul", "cat"
MAXPOOL, AVGPOOL, ADAPTIVE, MEAN, PASS, SHAPE, FUNCTION, FINAL = (
    "maxpool", "avgpool", "adaptive", "mean", "pass", "shape", "function", "final",
)  # fmt: skip
PLACEHOLDER, OUTPUT = "placeholder", "output"

PRESERVING = (MAXPOOL, PASS, SHAPE)  # move or select values: the result is on the grid of the operand
COMPUTE = (CONV, LINEAR)

# Names of the real functions in the integer view.
FUNCTION_NAMES: dict[type[nn.Module], str] = {
    known: function.name for known, function in FUNCTIONS.items() if known not in (nn.ReLU, nn.ReLU6)
}
UNSIGNED_FUNCTIONS = ("sigmoid", "hardsigmoid", "softplus")

# Identity in eval mode.
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: CONV, nn.Linear: LINEAR, nn.BatchNorm2d: NORM, nn.BatchNorm1d: NORM, Affine: AFFINE, nn.ReLU: RELU,
    nn.ReLU6: RELU, Sum: ADD, Product: MUL, Concat: CAT, nn.MaxPool2d: MAXPOOL, nn.AvgPool2d: AVGPOOL,
    nn.AdaptiveAvgPool2d: ADAPTIVE, GlobalAveragePool: MEAN, nn.Flatten: SHAPE, nn.Softmax: FINAL,
    nn.LogSoftmax: FINAL,
}  # fmt: skip


def is_stochastic_depth(module: nn.Module) -> bool:
    """Return whether a module is torchvision's StochasticDepth, by name, because it need not be installed.

    Other modules of that name may be other functions: the published form scales its branch in eval mode.
    """
    kind = type(module)
    return kind.__name__ == "StochasticDepth" and kind.__module__.partition(".")[0] == "torchvision"


def is_pass(module: nn.Module) -> bool:
    """Return whether a module is the identity in eval mode."""
    return isinstance(module, (*DROPOUTS, StopGradient)) or is_stochastic_depth(module)


def kind_of(module: nn.Module) -> str:
    """Return the kind of a module of the closed set.

    Raises:
        TypeError: If it is not in the set.
    """
    if isinstance(module, nn.Hardtanh) and module.min_val == 0:  # ReLU6 is one
        return RELU
    if isinstance(module, Move):
        return SHAPE
    if is_pass(module):
        return PASS
    if type(module) in FUNCTION_NAMES:
        return FUNCTION
    if type(module) not in _KINDS:
        raise TypeError(f"{type(module).__name__} is not in the closed set of quantizers.graph.form.canonical")
    return _KINDS[type(module)]
