"""The current codes of a student's weights, and functions that move latent weights toward or onto them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantizers.computed import DorefaWeightQuant, StatsWeightQuant
from quantizers.layers import QuantConvBn2d, QuantLinearBn
from quantizers.student import quant_layers

MOST_VALUES = 16  # of 4 bits: with more, a weight changes its code too often for changes to be meaningful

LowBitLayer = QuantConvBn2d | QuantLinearBn


def low_bit_layers(student: nn.Module) -> dict[str, LowBitLayer]:
    """Return the layers whose weights have at most four bits and are trained, in network order.

    Args:
        student: A network from :func:`quantizers.prepare`.

    Returns:
        Module path -> layer.
    """
    layers = quant_layers(student).items()
    return {name: one for name, one in layers if one.quant.count <= MOST_VALUES and one.weight.requires_grad}


@torch.no_grad()
def weight_codes(layer: LowBitLayer) -> Tensor:
    """Return the code of each latent weight, as integers in float, in the orientation of the latent weight.

    Args:
        layer: Of a student.

    Returns:
        The shape of its weight. A channel with a negative batch-norm factor is quantized with flipped sign, so its
        codes reach one further up than down.
    """
    return layer.turned(layer.weight_codes())


def can_be_placed(layer: LowBitLayer) -> bool:
    """Return whether the latent weight for a code is that code times the step, as :func:`place` assumes."""
    return not isinstance(layer.quant, DorefaWeightQuant)


def has_steady_step(layer: LowBitLayer) -> bool:
    """Return whether the step size stays while latent weights move; with statistics it follows them."""
    return not isinstance(layer.quant, StatsWeightQuant)


@torch.no_grad()
def place(layer: LowBitLayer, codes: Tensor, where: Tensor) -> None:
    """Set latent weights to the values of codes, in place.

    Args:
        layer: Of a student.
        codes: The shape of its weight.
        where: Which weights, bool, the same shape.
    """
    layer.weight.copy_(torch.where(where, codes * layer.quant.step, layer.weight))


@torch.no_grad()
def distance_to_codes(layer: LowBitLayer) -> Tensor:
    r"""Return how far each latent weight is from its quantized value, :math:`w - \hat w`; 0 where it is clipped.

    Args:
        layer: Of a student.

    Returns:
        The shape of its weight.
    """
    turned = layer.turned(layer.weight)
    units = turned / layer.quant.step
    inside = (units > layer.quant.low) & (units < layer.quant.high)
    return layer.turned(torch.where(inside, turned - layer.quant.quantize(turned), torch.zeros_like(turned)))
