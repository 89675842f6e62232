"""Moves scales by a hair so that no integer sum lies on a rounding tie: simulation and integer kernels then agree.

A quantised layer computes ``round(accumulator * unit / step)`` with an integer accumulator. Floating-point order of
summation, fused multiplies or another rounding rule change the result only where ``accumulator * unit / step`` lies
within rounding error of k + 1/2. The ties are at the accumulators ``t_k = (k + 1/2) * step / unit``, one for each pair
of neighbouring codes of the output grid: 3 at 2 bits, 15 at 4 bits. If every ``t_k`` keeps a distance from the
integers, no accumulator lies near a tie at all, and simulation in floating point and integer kernels agree bit for bit;
other processors should, too. A relative change of the unit of at most 0.2 % is enough to get there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantizers.layers import ActQuantizer, QuantConvBn2d, QuantLinearBn

LARGEST_CHANGE = 2e-3  # far below the resolution of the grids, which training has made robust against
CANDIDATES = 201
MARGIN = 0.125  # in accumulator units; reached margins are kept as they are
NEARLY = 0.75  # of the best margin in reach: no further change for less than a third more, so that calls come to rest
CHUNK_ELEMENTS = 4_000_000


@torch.no_grad()
def settle(student: nn.Module) -> None:
    """Move scales by at most 0.2 % so that no reachable integer sum lies on a rounding tie; in place.

    Call it at the end of training, before the final evaluation and export (:func:`calibrate` calls it, too). First
    the steps of quantizers that read sums, products, means and other grids, in the order of the network; then, with
    those fixed, the folded weight scale of each output channel, by way of batch norm's factor where there is one.
    """
    from quantizers.calibrate import act_quantizers, quant_layers

    groups: dict[nn.Module, list[ActQuantizer]] = {}
    for quantizer in act_quantizers(student).values():
        groups.setdefault(quantizer.quant.owner, []).append(quantizer)
    done: set[nn.Module] = set()
    for quantizer in act_quantizers(student).values():
        owner = quantizer.quant.owner
        if owner not in done:
            done.add(owner)
            _settle_step(groups[owner])
    for layer in quant_layers(student).values():
        if layer.consumers:
            _settle_layer(layer)


def _factors(like: Tensor) -> Tensor:
    return 1 + torch.linspace(-LARGEST_CHANGE, LARGEST_CHANGE, CANDIDATES, device=like.device, dtype=torch.float64)


def _ties(quantizer: ActQuantizer) -> Tensor:
    """Return the ties of a grid in units of its step, shape ``[codes - 1]``."""
    quant = quantizer.quant
    return torch.arange(int(quant.low), int(quant.high), device=quant.low.device, dtype=torch.float64) + 0.5


def _distance(ties: Tensor, reach: float) -> Tensor:
    """Return the least distance of reachable ties from an integer, over the last dimension."""
    off = (ties - torch.round(ties)).abs()
    return torch.where(ties.abs() <= reach, off, torch.full_like(off, 0.5)).amin(dim=-1)


def _choose(distances: Tensor) -> Tensor:
    """Return the candidate to take: the middle one (no change) if its margin suffices or nearly is the best.

    Args:
        distances: Margins, shape ``[..., candidates]``.
    """
    middle = distances.size(-1) // 2
    enough = torch.clamp(distances.amax(dim=-1) * NEARLY, max=MARGIN)
    keep = distances[..., middle] >= enough
    return torch.where(keep, torch.full_like(keep, middle, dtype=torch.long), distances.argmax(dim=-1))


def _origin_units(quantizer: ActQuantizer) -> list[tuple[float, float]]:
    """Return (real value of one accumulator unit, largest accumulator) of what a quantizer reads; several or none.

    A mean over windows has a unit for every number of values that its windows hold.
    """
    origin = quantizer.origin
    if origin is None:
        return []
    steps = [float(source.quant.step) for source in origin.sources]
    sizes = [max(abs(float(s.quant.low)), float(s.quant.high)) for s in origin.sources]
    if origin.kind == "add":
        return [(steps[0], sizes[0] + sizes[1])]
    if origin.kind == "mul":
        return [(steps[0] * steps[1], sizes[0] * sizes[1])]
    return [(steps[0] / count, sizes[0] * count) for count in origin.counts]


def _settle_step(members: list[ActQuantizer]) -> None:
    readers = [(member, unit) for member in members for unit in _origin_units(member)]
    if not readers:
        return
    owner = members[0].quant.owner
    step = float(members[0].quant.step)
    factors = _factors(owner.low)
    margins = torch.stack(
        [_distance(_ties(m)[None, :] * step * factors[:, None] / unit, reach) for m, (unit, reach) in readers]
    )
    best = factors[_choose(margins.amin(dim=0))]
    owner.set_step(step * float(best))


def _settle_layer(layer: QuantConvBn2d | QuantLinearBn) -> None:
    _, scale, _ = layer.folded()
    unit = scale.double() * float(layer.source.quant.step)
    ties = torch.cat([_ties(c) * float(c.quant.step) for c in layer.consumers])
    reach = _reach(layer)
    factors = _factors(unit)
    chunk = max(1, CHUNK_ELEMENTS // (len(ties) * CANDIDATES))
    # The unit is multiplied by the factor, so the ties in accumulator units are divided by it.
    best = torch.cat(
        [
            factors[_choose(_distance(ties[None, None, :] / (part[:, None, None] * factors[None, :, None]), reach))]
            for part in torch.split(unit, chunk)
        ]
    )
    _rescale(layer, best.to(scale.dtype))


def _reach(layer: QuantConvBn2d | QuantLinearBn) -> float:
    """Return a bound of the accumulator: every product at its largest."""
    source = layer.source.quant
    fan_in = layer.weight[0].numel()
    largest = max(abs(float(source.low)), float(source.high))
    return float(fan_in * largest * max(abs(layer.quant.low_code), layer.quant.high_code))


def _rescale(layer: QuantConvBn2d | QuantLinearBn, factor: Tensor) -> None:
    """Multiply the folded weight scale of each channel by ``factor``, the codes unchanged."""
    bn = layer.bn
    if bn is not None and bn.weight is not None and bn.running_mean is not None and bn.running_var is not None:
        # The real bias is beta - mean * factor: keep it, or a channel with a large mean would shift by many codes.
        before = bn.weight.clone()
        bn.weight.mul_(factor)
        if bn.bias is not None:
            change = (bn.weight - before) * torch.rsqrt(bn.running_var + bn.eps)
            mean = bn.running_mean if layer.bias is None else bn.running_mean - layer.bias
            bn.bias.add_(change * mean)
    elif factor.numel() == layer.quant.step.numel():
        layer.quant.rescale(layer.weight, factor)
