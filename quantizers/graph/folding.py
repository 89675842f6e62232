"""Folds batch norm and affine maps into the layer before them, without changing what it computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantizers.graph.form.canonical import Affine

Layer = nn.Conv2d | nn.Linear


def folded(layer: Layer, extras: Sequence[nn.Module | None]) -> tuple[Layer, _BatchNorm | None]:
    """Return a layer and its batch norm that compute what ``layer`` and then all of ``extras`` compute.

    ``(w x + b) s + t`` is ``(s w) x + (s b + t)``; after batch norm, factor and offset are merged into batch norm
    itself, which also holds for batch statistics. Either differs from the plain order only by float rounding.

    Args:
        layer: A convolution or linear layer.
        extras: Affine maps and at most one batch norm, in order.
    """
    norm: _BatchNorm | None = None
    for extra in extras:
        if isinstance(extra, _BatchNorm):
            norm = extra
        elif isinstance(extra, Affine) and norm is not None:
            norm = _scaled_norm(norm, extra)
        elif isinstance(extra, Affine):
            layer = _scaled_layer(layer, extra)
    return layer, norm


def may_fold(affine: Affine, layer: nn.Module, norm: nn.Module | None = None) -> bool:
    """Return whether an affine map may be folded: what is frozen then stays frozen, and what trains still trains.

    A constant factor other than zero only rescales the learning rate of the weights it is folded into. A frozen zero
    closes a channel (a mask); merged into something that trains, it would open again.

    Args:
        affine: The affine map.
        layer: The convolution or linear layer before it.
        norm: The batch norm between them, if there is one.
    """
    if any(affine.learned) and not all(parameter.requires_grad for parameter in layer.parameters()):
        return False  # trainable parameters must not disappear into a frozen layer
    if closes(affine):
        return not any(affine.learned) and not any(_trains(*part.parameters()) for part in (layer, norm) if part)
    factor = getattr(norm, "weight", None)
    return not (affine.learned[0] and factor is not None and not factor.requires_grad and _has_zeros(factor))


def closes(affine: Affine) -> bool:
    """Return whether an affine map has constant factors of zero, such as those of a mask."""
    return not affine.learned[0] and _has_zeros(affine.scale)


def _has_zeros(factor: Tensor) -> bool:
    return bool((factor.detach() == 0).any())


def _trains(*parts: Tensor | None) -> bool:
    return any(part is not None and part.requires_grad for part in parts)


def _trains_after(offset: Tensor | None, affine: Affine) -> bool:
    """Return whether an offset trains once an affine map is merged into it."""
    is_moved = affine.learned[0] and offset is not None and bool((offset != 0).any())
    return _trains(offset) or affine.learned[1] or is_moved


def _scaled_layer(layer: Layer, affine: Affine) -> Layer:
    made = copy.deepcopy(layer)
    scale, shift = affine.scale.detach(), affine.shift.detach()
    rows = scale.reshape((-1,) + (1,) * (layer.weight.dim() - 1))
    made.weight = nn.Parameter(layer.weight.detach() * rows, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None or affine.learned[1] or bool((shift != 0).any()):
        channels = layer.weight.shape[0]
        bias = torch.zeros(channels).to(scale) if layer.bias is None else layer.bias.detach()
        trains = _trains_after(layer.bias, affine)
        made.bias = nn.Parameter((bias * scale + shift).expand(channels).clone(), requires_grad=trains)
    return made


def _scaled_norm(norm: _BatchNorm, affine: Affine) -> _BatchNorm:
    made = copy.deepcopy(norm)
    scale, shift = affine.scale.detach(), affine.shift.detach()
    like = torch.ones(norm.num_features).to(scale)
    weight = like if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(like) if norm.bias is None else norm.bias.detach()
    trains = (_trains(norm.weight) or affine.learned[0], _trains_after(norm.bias, affine))
    made.affine = True
    made.weight = nn.Parameter(weight * scale, requires_grad=trains[0])
    made.bias = nn.Parameter(bias * scale + shift, requires_grad=trains[1])
    return made


def affine_layer(affine: Affine, channels: int) -> nn.Conv2d:
    """Return an affine map as a depthwise 1x1 convolution that trains the same parameters."""
    has_bias = affine.learned[1] or bool((affine.shift != 0).any())
    conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=has_bias, device="meta")
    scale = affine.scale.detach().expand(channels).clone().reshape(channels, 1, 1, 1)
    conv.weight = nn.Parameter(scale, requires_grad=affine.learned[0])
    if has_bias:
        conv.bias = nn.Parameter(affine.shift.detach().expand(channels).clone(), requires_grad=affine.learned[1])
    return conv


def image_norm(norm: _BatchNorm) -> nn.BatchNorm2d:
    """Return a batch norm for images with the parameters and statistics of any other."""
    if isinstance(norm, nn.BatchNorm2d):
        return norm
    made = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made._parameters, made._buffers = dict(norm._parameters), dict(norm._buffers)
    return made
