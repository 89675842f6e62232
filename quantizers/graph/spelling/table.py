"""The function that spells each operation of ATen, torch.nn.functional or Tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from quantizers.graph.spelling import activations, arithmetic, layers, moves, pools
from quantizers.graph.spelling.call import Call
from quantizers.graph.spelling.pen import Pen, Value

Speller = Callable[[Pen, Call], Any]


def _addmm(pen: Pen, call: Call) -> Value:
    product = layers.matmul(pen, Call("matmul", {"input": call["mat1"], "other": call["mat2"]}, call.shapes))
    return arithmetic.combine(pen, product, call["alpha"], call["self"], call["beta"])


def _mm(pen: Pen, call: Call) -> Value:
    return layers.matmul(pen, Call("matmul", {"input": call["self"], "other": call["mat2"]}, call.shapes))


OPERATORS: dict[str, Speller] = {
    **dict.fromkeys(activations.PLAIN, activations.plain),
    "add": arithmetic.add, "sub": arithmetic.sub, "rsub": arithmetic.rsub, "neg": arithmetic.neg,
    "mul": arithmetic.mul, "div": arithmetic.div, "pow": arithmetic.power, "square": arithmetic.square,
    "addcmul": arithmetic.addcmul, "lerp": arithmetic.lerp, "mm": _mm, "addmm": _addmm,
    "cat": moves.cat, "stack": moves.stack, "clone": moves.copy, "_to_copy": moves.copy,
    "constant_pad_nd": moves.constant_pad, "flip": moves.flip, "roll": moves.roll, "index": moves.index,
    "index_select": moves.index_select, "repeat": moves.repeat, "pixel_shuffle": moves.pixel_shuffle,
    "pixel_unshuffle": moves.pixel_unshuffle, "channel_shuffle": moves.channel_shuffle,
    "native_channel_shuffle": moves.channel_shuffle, "upsample_nearest2d": moves.upsample_nearest,
    "_upsample_nearest_exact2d": moves.upsample_nearest, "convolution": layers.convolution,
    "max_pool2d_with_indices": pools.max_pool, "max_pool2d": pools.max_pool,
    "avg_pool2d": pools.avg_pool, "adaptive_max_pool2d": pools.adaptive_max_pool,
    "mean": pools.mean, "sum": pools.total, "amax": pools.largest, "max": pools.largest,
    "maximum": activations.extremum, "minimum": activations.extremum, "glu": activations.gated,
    "_softmax": activations.softmax, "_log_softmax": activations.softmax,
}  # fmt: skip

# Operations that read only the shape of a tensor, not its values.
SHAPE_ONLY = (
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "new_empty_strided",
)  # fmt: skip

# Operations that turn a tensor into a Python number.
NUMBERS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique2", "_unique2")

# Python functions that are spelled as a whole: name, parameters with defaults, and speller.
_REQUIRED = object()
FUNCTIONS: dict[Any, tuple[str, dict[str, Any], Speller | None]] = {
    F.linear: ("linear", {"input": _REQUIRED, "weight": _REQUIRED, "bias": None}, layers.linear),
    F.adaptive_avg_pool2d: (
        "adaptive_avg_pool2d", {"input": _REQUIRED, "output_size": _REQUIRED}, pools.adaptive_avg_pool,
    ),
    F.adaptive_avg_pool1d: (
        "adaptive_avg_pool1d", {"input": _REQUIRED, "output_size": _REQUIRED}, pools.adaptive_avg_pool,
    ),
    torch.prelu: ("prelu", {"input": _REQUIRED, "weight": _REQUIRED}, layers.prelu),
    F.softsign: ("softsign", {"input": _REQUIRED}, activations.plain),
    F.tanhshrink: ("tanhshrink", {"input": _REQUIRED}, activations.plain),
    torch.conv2d: (
        "conv2d",
        {"input": _REQUIRED, "weight": _REQUIRED, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
        layers.padded_convolution,
    ),
    **dict.fromkeys(
        (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm),
        ("matmul", {"input": _REQUIRED, "other": _REQUIRED}, layers.matmul),
    ),
    **{
        function: (name, {"input": _REQUIRED}, None)
        for name in (
            "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", "rrelu",
            "scaled_dot_product_attention", "multi_head_attention_forward", "normalize", "lp_pool2d", "embedding",
            "fractional_max_pool2d_with_indices",
        )
        if (function := getattr(F, name, None)) is not None
    },
    **{
        function: (function.__name__, {"input": _REQUIRED}, None)
        for function in (torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.einsum)
    },
    F.pad: ("_pad_circular", {"input": _REQUIRED, "pad": _REQUIRED, "mode": "constant", "value": None}, None),
    torch.rrelu: ("rrelu", {"input": _REQUIRED}, None),
}  # fmt: skip

BATCH_NORMS = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}
DROPOUT_MODULES: dict[Any, type[torch.nn.Module]] = {
    F.dropout: torch.nn.Dropout, F.dropout1d: torch.nn.Dropout1d, F.dropout2d: torch.nn.Dropout2d,
    F.dropout3d: torch.nn.Dropout3d, F.alpha_dropout: torch.nn.AlphaDropout,
    F.feature_alpha_dropout: torch.nn.FeatureAlphaDropout, torch.dropout: torch.nn.Dropout,
    torch.dropout_: torch.nn.Dropout, torch.alpha_dropout: torch.nn.AlphaDropout,
    torch.alpha_dropout_: torch.nn.AlphaDropout, torch.feature_dropout: torch.nn.Dropout2d,
    torch.feature_dropout_: torch.nn.Dropout2d, torch.feature_alpha_dropout: torch.nn.FeatureAlphaDropout,
    torch.feature_alpha_dropout_: torch.nn.FeatureAlphaDropout,
}  # fmt: skip


def named(parameters: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by name, defaults filled in."""
    return {**{k: v for k, v in parameters.items() if v is not _REQUIRED},
            **dict(zip(parameters, args, strict=False)), **kwargs}  # fmt: skip
