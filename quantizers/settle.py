"""Nudges scales so that no integer sum is on a rounding tie: simulation and integer kernels then agree.

A quantized layer computes ``round(accumulator * unit / step)`` with an integer accumulator. Floating-point order of
summation, fused multiplies or another rounding rule change the result only where ``accumulator * unit / step`` is
within rounding error of k + 1/2. The ties are at the accumulators ``t_k = (k + 1/2) * step / unit``, one for each pair
of neighboring codes of the output grid: 3 at 2 bits, 15 at 4 bits. If every ``t_k`` keeps its distance from the
integers, no accumulator is near a tie, and simulation in floating point and integer kernels agree bit for bit;
other processors should, too. A relative change of the unit of at most 0.2% is enough.

An elementwise function of a value on a grid has as many values as its grid has codes, at most 256. Runtimes compute it
in float32, each in its own way. If every value keeps its distance from the ties of the grid it is quantized to, they
all give the same codes.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.layers import ActQuantizer, QuantConvBn2d, QuantLinearBn
from quantizers.student import act_quantizers, quant_layers, require_student
from quantizers.tensor_quant import ActQuant

LARGEST_CHANGE = 2e-3  # far below the resolution of the grids, to which training has made the student robust
CANDIDATES = 201
MARGIN = 0.125  # in accumulator units; margins that reach it are kept
ROUNDING = 2.0**-22  # two roundings to float32, of a sum times a factor; beyond MARGIN for sums of 524,288 and more
FUNCTION_MARGIN = 2e-3  # in steps; float32 approximations of exp, erf and tanh should err by less
NEARLY = 0.75  # of the best margin in reach: no change to gain less than a third more, so that repeated calls converge
CHUNK_ELEMENTS = 4_000_000


@torch.no_grad()
def settle(student: nn.Module) -> None:
    """Move scales in place by at most 0.2% so that no reachable integer sum is on a rounding tie.

    Call it at the end of training, before the final evaluation and export (:func:`calibrate` calls it, too). It
    first moves the steps of quantizers that read sums, products, means and other grids, in network order, each once;
    then, with those fixed, the folded weight scale of each output channel, through batch norm's factor if there is one.

    Args:
        student: A network from :func:`prepare`, calibrated; changed in place.

    Raises:
        TypeError: If it is not a student.

    Example:
        >>> from quantizers import QuantSpec, calibrate, prepare, quantizer_scales
        >>> net, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(16, 1, 8, 8)
        >>> student = prepare(net, QuantSpec(), images)
        >>> calibrate(student, images)
        >>> before = [scale.clone() for scale in quantizer_scales(student)]
        >>> settle(student)
        >>> all(torch.allclose(new, old, rtol=0.002) for new, old in zip(quantizer_scales(student), before))
        True
    """
    require_student(student, "settle")
    quantizers = list(act_quantizers(student).values())
    owners = list(dict.fromkeys(quantizer.quant.owner for quantizer in quantizers))
    place = {owner: number for number, owner in enumerate(owners)}
    readings: dict[ActQuant, list[_Reading | _FunctionReading]] = {owner: [] for owner in owners}
    for reading in (reading for quantizer in quantizers for reading in _readings(quantizer)):
        # the last step that its ties depend on clears them: no later one moves them again
        if reading.owners:
            readings[max(reading.owners, key=place.__getitem__)].append(reading)
    for owner in owners:
        _settle_step(owner, readings[owner])
    for layer in quant_layers(student).values():
        if layer.consumers:
            _settle_layer(layer)


def _factors(like: Tensor) -> Tensor:
    return 1 + torch.linspace(-LARGEST_CHANGE, LARGEST_CHANGE, CANDIDATES, device=like.device, dtype=torch.float64)


def _ties(quantizer: ActQuantizer) -> Tensor:
    """Return the ties of a grid in units of its step, shape ``[codes - 1]``."""
    quant = quantizer.quant
    return torch.arange(int(quant.low), int(quant.high), device=quant.low.device, dtype=torch.float64) + 0.5


def _distance(ties: Tensor, reach: float | Tensor) -> Tensor:
    """Return the smallest distance of ties from a reachable integer over the last dimension, at most 0.5.

    A tie just beyond the largest integer is as close to it as one just below. Where sums are so large that float32's
    rounding exceeds ``MARGIN``, distances count for less in proportion, so that ``MARGIN`` is enough everywhere.
    """
    off = (ties - torch.round(ties)).abs() * (MARGIN / (ties.abs() * ROUNDING)).clamp(max=1)
    return torch.where(ties.abs() <= reach + 0.5, off, torch.full_like(off, 0.5)).amin(dim=-1)


def _choose(distances: Tensor) -> Tensor:
    """Return the candidate to take: the middle one (no change) if its margin suffices or is nearly the best.

    Args:
        distances: Margins, shape ``[..., candidates]``.
    """
    middle = distances.size(-1) // 2
    enough = torch.clamp(distances.amax(dim=-1) * NEARLY, max=MARGIN)
    keep = distances[..., middle] >= enough
    return torch.where(keep, torch.full_like(keep, middle, dtype=torch.long), distances.argmax(dim=-1))


@dataclass(frozen=True)
class _Reading:
    """An integer accumulator that a quantizer reads.

    Args:
        quantizer: The quantizer that reads it.
        sources: The quantizers whose steps multiply to the accumulator's unit.
        count: Divisor of that product.
        largest: Largest accumulator.
        powers: Step size -> its exponent in the quantizer's step over the unit, if not 0.
    """

    quantizer: ActQuantizer
    sources: tuple[ActQuantizer, ...]
    count: int
    largest: float
    powers: dict[ActQuant, int]

    def ties(self) -> Tensor:
        """Return the ties in accumulator units."""
        unit = math.prod(float(source.quant.step) for source in self.sources) / self.count
        return _ties(self.quantizer) * (float(self.quantizer.quant.step) / unit)

    @property
    def owners(self) -> tuple[ActQuant, ...]:
        """Return the steps that the ties depend on."""
        return tuple(self.powers)

    def margins(self, owner: ActQuant, factors: Tensor) -> Tensor:
        """Return the margin in accumulator units for each factor on the step of ``owner``."""
        return _distance(self.ties()[None, :] * factors[:, None] ** self.powers[owner], self.largest)


@dataclass(frozen=True)
class _FunctionReading:
    """An elementwise function of codes that a quantizer reads.

    Args:
        quantizer: The quantizer that reads it.
        source: The quantizer of the function's operand.
        function: The function.
    """

    quantizer: ActQuantizer
    source: ActQuantizer
    function: nn.Module

    @property
    def owners(self) -> tuple[ActQuant, ...]:
        """Return the steps that the values depend on."""
        return tuple({self.quantizer.quant.owner: None, self.source.quant.owner: None})

    def margins(self, owner: ActQuant, factors: Tensor) -> Tensor:
        """Return the margin for each factor on the step of ``owner``, scaled so that ``MARGIN`` is enough."""
        source, grid = self.source.quant, self.quantizer.quant
        codes = torch.arange(int(source.low), int(source.high) + 1, device=factors.device, dtype=torch.float64)
        one = torch.ones_like(factors)
        x = codes[None, :] * (float(source.step) * (factors if owner is source.owner else one))[:, None]
        step = float(grid.step) * (factors if owner is grid.owner else one)
        values = self._values(x) / step.reshape(-1, *(1,) * (x.dim() - 1), 1)
        off = (values - torch.floor(values) - 0.5).abs()
        is_clipped = (values < float(grid.low)) | (values > float(grid.high))
        least = torch.where(is_clipped, torch.full_like(off, 0.5), off).flatten(1).amin(dim=1)
        return least * (MARGIN / FUNCTION_MARGIN)

    def _values(self, x: Tensor) -> Tensor:
        """Return the function of ``[candidates, codes]`` in float64, ``[candidates, codes, channels or 1]``."""
        function = copy.deepcopy(self.function).double()
        channels = max((parameter.numel() for parameter in function.parameters()), default=1)
        rows = x.reshape(-1, 1).expand(-1, channels)
        return function(rows).reshape(*x.shape, channels)  # type: ignore[no-any-return]


def _readings(quantizer: ActQuantizer) -> list[_Reading] | list[_FunctionReading]:
    """Return what a quantizer reads, which can be several or none.

    A mean over windows has one unit for each number of values in its windows.
    """
    origin = quantizer.origin
    if origin is None:
        return []
    if origin.kind == "function" and origin.function is not None:
        return [_FunctionReading(quantizer, origin.sources[0], origin.function)]
    sizes = [max(abs(float(s.quant.low)), float(s.quant.high)) for s in origin.sources]
    sources = origin.sources if origin.kind == "mul" else origin.sources[:1]  # the operands of a sum share their step
    powers = Counter([quantizer.quant.owner])
    powers.subtract(source.quant.owner for source in sources)
    moving = {owner: power for owner, power in powers.items() if power}
    if origin.kind == "add":
        return [_Reading(quantizer, sources, 1, sum(sizes), moving)]
    if origin.kind == "mul":
        return [_Reading(quantizer, sources, 1, math.prod(sizes), moving)]
    return [_Reading(quantizer, sources, count, sizes[0] * count, moving) for count in origin.counts]


def _settle_step(owner: ActQuant, readings: list[_Reading | _FunctionReading]) -> None:
    if not readings:
        return
    factors = _factors(owner.low)
    margins = torch.stack([reading.margins(owner, factors) for reading in readings])
    best = factors[_choose(margins.amin(dim=0))]
    owner.set_step(float(owner.step) * float(best))


def _settle_layer(layer: QuantConvBn2d | QuantLinearBn) -> None:
    _, scale, _ = layer.folded()
    unit = scale.double() * float(layer.source.quant.step)
    ties = torch.cat([_ties(c) * float(c.quant.step) for c in layer.consumers])
    reach = _reach(layer)
    factors = _factors(unit)
    chunk = max(1, CHUNK_ELEMENTS // (len(ties) * CANDIDATES))
    # The unit is multiplied by the factor, so the ties in accumulator units are divided by it.
    distances = torch.cat(
        [
            _distance(ties[None, None, :] / (part[:, None, None] * factors[None, :, None]), most[:, None, None])
            for part, most in zip(torch.split(unit, chunk), torch.split(reach, chunk), strict=True)
        ]
    )
    if not _has_factors(layer) and layer.quant.step.numel() == 1:
        distances = distances.amin(dim=0, keepdim=True)  # one step for all channels
    _rescale(layer, factors[_choose(distances)].to(scale.dtype))


def _has_factors(layer: QuantConvBn2d | QuantLinearBn) -> bool:
    """Return whether batch norm gives each channel a factor that can be moved."""
    bn = layer.bn
    return bn is not None and bn.weight is not None and bn.running_mean is not None and bn.running_var is not None


def _reach(layer: QuantConvBn2d | QuantLinearBn) -> Tensor:
    """Return a bound on each channel's accumulator: all products at their largest, and the bias, which moves a bit."""
    source = layer.source.quant
    fan_in = layer.weight[0].numel()
    largest = max(abs(float(source.low)), float(source.high))
    products = float(fan_in * largest * max(abs(layer.quant.low_code), layer.quant.high_code))
    scale, bias = layer.folded()[1:]
    unit = scale.double() * float(source.step)
    codes = torch.zeros_like(unit) if bias is None else (bias.double() / unit).abs() * (1 + LARGEST_CHANGE) + 1
    return products + (codes.amax().reshape(1) if unit.numel() == 1 else codes)  # one unit for all channels


def _rescale(layer: QuantConvBn2d | QuantLinearBn, factor: Tensor) -> None:
    """Multiply the folded weight scale of each channel by ``factor``, without changing the codes."""
    bn: Any = layer.bn
    if _has_factors(layer):
        # The real bias is beta - mean * factor: keep it, or a channel with a large mean would shift by many codes.
        before = bn.weight.clone()
        bn.weight.mul_(factor)
        if bn.bias is not None:
            change = (bn.weight - before) * torch.rsqrt(bn.running_var + bn.eps)
            mean = bn.running_mean if layer.bias is None else bn.running_mean - layer.bias
            bn.bias.add_(change * mean)
    else:
        layer.quant.rescale(layer.weight, factor)
