"""The error for a network that cannot become a low-bit student, and a workaround for each unsupported operation."""

from __future__ import annotations

import torch
from torch import nn

KNOWN = (
    "supported operations are convolutions, linear layers, batch norm, activations, pooling, sums, products, "
    "concatenations, constant factors and offsets, and moves of values"
)
REPLACE = (
    "Replace it in the float network (layer norm with batch norm, a custom block with supported layers), or pass the "
    "part of the network without it"
)

# Operation (by its name in ATen or torch.nn.functional) -> what to do instead, if more specific than REPLACE.
WAYS_OUT: dict[str, str] = {
    "LayerNorm": "Use batch norm instead of layer norm in the float network",
    "GroupNorm": "Use batch norm instead of group norm in the float network",
    **{f"InstanceNorm{rank}d": "Use batch norm instead of instance norm in the float network" for rank in (1, 2, 3)},
    "layer_norm": "Use batch norm instead of layer norm in the float network",
    "group_norm": "Use batch norm instead of group norm in the float network",
    "instance_norm": "Use batch norm instead of instance norm in the float network",
    "scaled_dot_product_attention": "Attention multiplies activations by activations; pass the convolutional part",
    "multi_head_attention_forward": "Attention multiplies activations by activations; pass the convolutional part",
    "MultiheadAttention": "Attention multiplies activations by activations; pass the convolutional part",
    "LSTM": "Recurrence has no low-bit form; pass the part of the network without it",
    "GRU": "Recurrence has no low-bit form; pass the part of the network without it",
    "RNN": "Recurrence has no low-bit form; pass the part of the network without it",
    "einsum": "It has no low-bit kernel here: use Linear or Conv2d for a product with weights; there is none for a "
    "product of activations",
    "bmm": "A product of activations has no low-bit kernel here; use layers with weights",
    "matmul": "A product of activations has no low-bit kernel here; use layers with weights",
    "RReLU": "It draws random slopes in training; use LeakyReLU or PReLU",
    "rrelu": "It draws random slopes in training; use LeakyReLU or PReLU",
    "Upsample": "Replace it with mode='nearest' or a ConvTranspose2d",
    "UpsamplingBilinear2d": "Replace it with mode='nearest' or a ConvTranspose2d",
    "upsample_bilinear2d": "Replace it with mode='nearest' or a ConvTranspose2d",
    "upsample_bicubic2d": "Replace it with mode='nearest' or a ConvTranspose2d",
    "_convolution": "It runs in TorchScript; pass the Python modules it was traced from",
    "div": "Replace the quotient of activations with a product (x * torch.sigmoid(y))",
    "_softmax": "A softmax inside the network has no low-bit kernel; replace it unless it is the last layer",
    "_log_softmax": "A log softmax inside the network has no low-bit kernel; replace it unless it is the last layer",
}


# What to say in place of operation names that are not descriptive.
PADDING = "padding mode {mode!r} has no integer kernel; use zeros"
PADDING_MODES = {
    "_pad_circular": "circular",
    **{
        name: mode
        for prefix, mode in (("Reflection", "reflect"), ("Replication", "replicate"), ("Circular", "circular"))
        for rank in (1, 2, 3)
        for name in (f"{prefix}Pad{rank}d", f"{prefix.lower()}_pad{rank}d")
    },
}


class RewriteError(ValueError):
    """A network that cannot become a low-bit student; the message names the layer and a workaround."""


class NoSpelling(Exception):  # noqa: N818 - a signal between modules of this package; users see RewriteError
    """An operation that the closed set of modules cannot express.

    Args:
        reason: What the operation is and what to do, without the location; empty if unknown.
        bare: Whether the reason names the operation itself.
    """

    def __init__(self, reason: str = "", *, bare: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.bare = reason, bare


def unknown(what: str, operation: str) -> str:
    """Return the message for an operation that has no low-bit form."""
    if operation in PADDING_MODES:
        return PADDING.format(mode=PADDING_MODES[operation])
    return f"{what} has no low-bit form; {KNOWN}. {WAYS_OUT.get(operation, REPLACE)}"


def failure(where: str, error: Exception, root: nn.Module, rank: int = 4) -> str:
    """Return the message for a network that fails on the images it is recorded with."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if "TorchScript" in reason:
        scripts = (path for path, module in root.named_modules() if isinstance(module, torch.jit.ScriptModule))
        where = next(scripts, "") or where
        return f"{where}: runs in TorchScript, which cannot be recorded; pass the Python modules it was created from"
    if "doesn't have storage" in reason:
        return (
            f"{where}: runs under a transform of torch.func (grad, jvp), which cannot be recorded; compute without it"
        )
    mode, hint = " in train()" if root.training else "", ""
    if root.training:
        hint = "; it runs in eval(): give images of the size it trains on, or switch auxiliary heads off"
    elif rank == 3:
        hint = "; example_inputs has 3 axes: give a single image a batch axis, example_inputs[None]"
    return f"{where}: the float network fails on example_inputs{mode}: {reason}{hint}"
