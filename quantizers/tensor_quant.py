"""The arithmetic modules that Brevitas injects as ``tensor_quant``: learned or fixed step sizes on integer ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.fused.batch_norm import Grid
from quantizers.kernels import TINY, fake_quantize, fake_quantize_per_channel, positive
from quantizers.native.fake_quant import NativeQuant
from quantizers.records import KINDS, METHODS, Recorded


def code_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Return the smallest and largest code of a full-range grid of ``bits`` bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class NotCalibratedError(RuntimeError):
    """An activation quantizer has no scale yet."""

    def __init__(self, name: str = "a quantizer") -> None:
        super().__init__(
            f"{name}: scales are not calibrated; call quantizers.calibrate(student, batches) before training or export"
        )


class WeightQuant(Recorded):
    """Base of weight quantizers: ``forward`` returns (dequantized, scale, zero point, bit width) as Brevitas expects.

    Args:
        bit_width: Bits of a code.
        low: Smallest code.
        high: Largest code.
        per_channel: Whether each output channel has its own step.
    """

    method = "lsq"

    low: Tensor
    high: Tensor
    bit_width_value: Tensor
    zero_point_value: Tensor

    def __init__(self, bit_width: int, low: int, high: int, *, per_channel: bool) -> None:
        super().__init__()
        self.bits, self.low_code, self.high_code = bit_width, low, high
        self.per_channel = per_channel
        self.bypass = False
        self.record((bit_width, low, high, int(per_channel), METHODS.index(self.method)))
        self.register_buffer("low", torch.tensor(float(low)), persistent=False)
        self.register_buffer("high", torch.tensor(float(high)), persistent=False)
        self.register_buffer("bit_width_value", torch.tensor(float(bit_width)), persistent=False)
        self.register_buffer("zero_point_value", torch.tensor(0.0), persistent=False)

    def describe(self, values: Sequence[int]) -> str:
        bits, low, high, per_channel, method = values
        grain = "channel" if per_channel else "tensor"
        return f"{bits}-bit weights ({low} to {high}, {METHODS[method]}, one step per {grain})"

    @property
    def step(self) -> Tensor:
        """Return the positive step size, shape ``[out_channels, 1, ...]`` or ``[]``."""
        raise NotImplementedError

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the dequantized weight, differentiable."""
        raise NotImplementedError

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes of ``weight`` as a floating tensor."""
        return torch.clamp(torch.round(self.quantize(weight) / self.step), self.low, self.high)

    def rescale(self, weight: Tensor, factor: Tensor) -> None:
        """Multiply the dequantized weights by ``factor`` (shape of ``step``) in place; the codes do not change."""
        raise NotImplementedError

    def in_float(self, weight: Tensor) -> Tensor:
        """Return the values that the grid rounds, without rounding or clipping."""
        return weight

    def follow(self, layer: nn.Module) -> None:
        """Set the layer whose ``weight`` it quantizes; called once, by that layer."""

    def restart(self, weight: Tensor) -> None:
        """Reset the step size to its initial value for ``weight``, in place."""

    @property
    def count(self) -> int:
        """Return the number of values a weight can have."""
        return self.high_code - self.low_code + 1

    def _on_grid(self, weight: Tensor, step: Tensor, *, grad_scale: float) -> Tensor:
        if self.per_channel:
            return fake_quantize_per_channel(weight, step, self.low, self.high, grad_scale=grad_scale)
        return fake_quantize(weight, step, self.low, self.high, grad_scale=grad_scale)

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.values(weight), self.step, self.zero_point_value, self.bit_width_value

    def values(self, weight: Tensor) -> Tensor:
        """Return ``weight`` on its grid, differentiable: the first result of :meth:`forward`."""
        return self.in_float(weight) if self.bypass else self.quantize(weight)


class LsqWeightQuant(WeightQuant):
    r"""Weights on a learned step size: :math:`\hat w = \mathrm{round}(\mathrm{clip}(w/s, -Q_N, Q_P)) \cdot s`.

    The gradient of ``s`` is scaled by :math:`1/\sqrt{N Q_P}`, ``N`` the number of weights that share it;
    ``s`` starts at :math:`2\,\mathrm{mean}|w| / \sqrt{Q_P}`.

    Note:
        At eight bits ``s`` starts at :math:`\max|w| / Q_P`: the published initial value suits few codes, and would
        leave an 8-bit layer about five bits until training has moved it.

    References:
        Esser et al., `Learned Step Size Quantization <https://arxiv.org/abs/1902.08153>`_, 2020, section 2.
    """

    def __init__(self, bit_width: int, low: int, high: int, weight: Tensor, per_channel: bool) -> None:  # noqa: FBT001
        super().__init__(bit_width, low, high, per_channel=per_channel)
        self.scale = nn.Parameter(self._start(weight))
        self.grad_scale = 1.0 / math.sqrt((weight[0] if per_channel else weight).numel() * high)

    def _start(self, weight: Tensor) -> Tensor:
        rows = weight.detach().reshape(weight.size(0) if self.per_channel else 1, -1)
        published = 2 * rows.abs().mean(dim=1) / math.sqrt(self.high_code)
        # Eight bits hold the whole range; the published initial value would use an eighth of it.
        start = rows.abs().amax(dim=1) / self.high_code if self.bits >= 8 else published
        # Any positive step represents a channel of zeros exactly.
        start = torch.where(start > TINY, start, start.mean().clamp_min(1e-3))
        return start.reshape((-1,) + (1,) * (weight.dim() - 1) if self.per_channel else ()).clone()

    @torch.no_grad()
    def restart(self, weight: Tensor) -> None:
        self.scale.copy_(self._start(weight))

    @property
    def step(self) -> Tensor:
        return self.scale.abs().clamp_min(TINY)

    def quantize(self, weight: Tensor) -> Tensor:
        return self._on_grid(weight, positive(self.scale), grad_scale=self.grad_scale)

    @torch.no_grad()
    def rescale(self, weight: Tensor, factor: Tensor) -> None:
        self.scale.copy_(self.step * factor.reshape(self.scale.shape))
        weight.mul_(factor.reshape(self.scale.shape))


class ActQuant(Recorded):
    """An activation quantizer with one step size; it can borrow the step size of another (shared scales).

    Args:
        bit_width: Bits of a code.
        kind: ``unsigned`` (0 ... 2**bits - 1; absorbs a preceding ReLU), ``signed`` or ``shifted`` (the zero point is
            set by calibration).
        largest: Upper end of the real range where the float net bounds it (6 for ReLU6), else None.
    """

    low: Tensor
    high: Tensor
    bit_width_value: Tensor
    no_zero_point: Tensor
    calibrated: Tensor

    residual = True
    method = "lsq"

    def __init__(self, bit_width: int, kind: str, largest: float | None = None) -> None:
        super().__init__()
        self.bits, self.kind, self.largest = bit_width, kind, largest
        self.record((bit_width, KINDS.index(kind), METHODS.index(self.method)))
        low, high = code_range(bit_width, signed=kind != "unsigned")
        self.register_buffer("low", torch.tensor(float(low)))
        self.register_buffer("high", torch.tensor(float(high)))
        self.register_buffer("bit_width_value", torch.tensor(float(bit_width)), persistent=False)
        self.register_buffer("no_zero_point", torch.tensor(0.0), persistent=False)
        self.register_buffer("calibrated", torch.tensor(False))
        self._ready = False
        self._lender: tuple[ActQuant, ...] = ()  # a tuple hides it from Module: its step is not registered twice
        self.observer: RangeObserver | None = None
        self.bypass = False
        self.finer = 1  # how many steps of a finer grid on the same range each step is temporarily split into
        self.make_scale()

    def describe(self, values: Sequence[int]) -> str:
        bits, kind, method = values
        return f"{bits}-bit {KINDS[kind]} activations ({METHODS[method]})"

    def stored_record(self, state: Mapping[str, Tensor], prefix: str) -> list[int] | None:
        """Return the record in a state; for an older one, what its range of codes implies."""
        stored = super().stored_record(state, prefix)
        if stored is not None or prefix + "low" not in state or prefix + "high" not in state:
            return stored
        low, high = float(state[prefix + "low"]), float(state[prefix + "high"])
        bits = int(high - low).bit_length()
        is_shifted = self.kind == "shifted"  # whose range calibration sets
        kind = self.kind if is_shifted or (low, high) == code_range(bits, signed=self.kind == "signed") else None
        guess = kind or ("unsigned" if low == 0 else "signed" if low == -high - 1 else "shifted")
        return [bits, KINDS.index(guess), METHODS.index(self.method)]

    def make_scale(self) -> None:
        """Create the parameter or buffer that holds the step size."""
        self.scale = nn.Parameter(torch.tensor(1.0))

    @property
    def owner(self) -> ActQuant:
        """Return the quantizer whose step size this one uses: itself, unless :meth:`share` was called."""
        return self._lender[0].owner if self._lender else self

    def share(self, lender: ActQuant) -> None:
        """Use the step size of ``lender`` from now on."""
        if lender.owner is self.owner:
            return
        mine = self.owner
        mine._lender = (lender.owner,)
        mine.drop_scale()

    def drop_scale(self) -> None:
        """Remove this quantizer's own step size."""
        del self.scale

    @property
    def step(self) -> Tensor:
        """Return the positive step size, shape ``[]``."""
        return self.owner.own_step()

    def own_step(self) -> Tensor:
        """Return the positive step size held by this quantizer itself."""
        return self.scale.abs().clamp_min(TINY)

    def training_step(self) -> Tensor:
        """Return the same as :meth:`own_step`, possibly the parameter itself, for callers that do not keep it."""
        return positive(self.scale)

    @torch.no_grad()
    def set_step(self, value: float) -> None:
        """Set the step size of the owner."""
        self.owner.scale.fill_(value)

    def start_step(self, observed: RangeObserver) -> float:
        """Return the step size to start from, given what calibration saw."""
        high = max(float(self.high), 1.0)
        if self.bits >= 8 or self.kind == "shifted":
            # Eight bits hold the whole range; the published initial value would leave part of it unused.
            start = max(observed.maximum / high, observed.minimum / float(self.low) if float(self.low) < 0 else 0.0)
        else:
            start = 2 * observed.mean_abs / math.sqrt(high)
        if self.largest is not None:
            start = min(start, self.largest / high)
        return start if start > TINY else 1e-3

    def set_range(self, observed: RangeObserver) -> None:
        """Place the zero point of a shifted grid so that it covers what calibration saw."""
        if self.kind != "shifted":
            return
        span = 2**self.bits - 1
        low, high = min(observed.minimum, 0.0), max(observed.maximum, 0.0)
        width = max(high - low, TINY)
        zero_point = min(max(round(-low / width * span), 0), span - 1)
        self.low.fill_(float(-zero_point))
        self.high.fill_(float(span - zero_point))

    def mark_calibrated(self) -> None:
        """Mark the step size as valid."""
        self.calibrated.fill_(True)

    @property
    def is_calibrated(self) -> bool:
        """Return whether calibration (or a loaded state) has set the step size."""
        if not self._ready:
            self._ready = bool(self.calibrated)
        return self._ready

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._ready = False  # the state may be that of a student without calibration

    def grad_scale(self, x: Tensor) -> float:
        r"""Return the factor of the step size's gradient, :math:`1/\sqrt{N Q_P}` with ``N`` values per image."""
        largest = 2 ** (self.bits - 1) - 1 if self.kind == "signed" else 2**self.bits - 1
        return 1.0 / math.sqrt(max(x.numel() // max(x.size(0), 1), 1) * largest)

    @property
    def zero_point(self) -> Tensor:
        """Return the zero point in Brevitas' sense: 0 except for shifted grids."""
        return -self.low if self.kind == "shifted" else self.no_zero_point

    def in_float(self, x: Tensor) -> Tensor:
        """Return the float net's value here: the ReLU or ReLU6 that the clips of the grid absorb, without rounding."""
        if self.kind == "unsigned":
            return torch.relu(x) if self.largest is None else x.clamp(0.0, self.largest)
        return x if self.largest is None else x.clamp(max=self.largest)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.values(x), self.step / self.finer, self.zero_point, self.bit_width_value

    def values(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid, differentiable: the first result of :meth:`forward`."""
        if self.observer is not None:
            self.observer.see(self.in_float(x))  # what the layer reads, after the activation that the grid absorbs
        if self.bypass:
            return self.in_float(x)
        if not self.is_calibrated:
            raise NotCalibratedError()
        step, low, high = self.owner.training_step(), self.low, self.high
        if self.finer > 1:
            step, low, high = step / self.finer, low * self.finer, high * self.finer
        return fake_quantize(x, step, low, high, grad_scale=self.grad_scale(x), residual=self.residual)

    @property
    def is_plain(self) -> bool:
        """Return whether values are only put on the grid of its bits."""
        return type(self).values is ActQuant.values and not self.bypass and self.finer == 1

    def grid_for(self, x: Tensor) -> Grid | None:
        """Return the grid :meth:`values` would round ``x`` to; None if it does something else, or observes ``x``."""
        if not self.is_plain or self.observer is not None or not self.is_calibrated:
            return None
        step = self.owner.training_step()
        is_taken = NativeQuant.takes(x, step, self.low, self.high)
        settings = (step, self.low, self.high, self.grad_scale(x), self.residual)
        return Grid(*settings, fake_quantize) if is_taken else None


class LsqActQuant(ActQuant):
    """Activations on a learned step size (LSQ), the default.

    References:
        Esser et al., `Learned Step Size Quantization <https://arxiv.org/abs/1902.08153>`_, 2020, section 2.
    """


class PactActQuant(ActQuant):
    r"""PACT: the clipping level :math:`\alpha` is learned, the step is :math:`\alpha / Q_P`.

    The gradient of :math:`\alpha` comes only from the clipped values. Values on signed edges are clipped on both sides.
    The published L2 penalty on :math:`\alpha` is left to the optimizer: give scales a weight decay.

    References:
        Choi et al., `PACT <https://arxiv.org/abs/1805.06085>`_, 2018, equations 1 to 3.
    """

    residual = False
    method = "pact"

    def make_scale(self) -> None:
        self.alpha = nn.Parameter(torch.tensor(1.0))

    def drop_scale(self) -> None:
        del self.alpha

    def own_step(self) -> Tensor:
        return self.alpha.abs().clamp_min(TINY) / self.high

    def training_step(self) -> Tensor:
        return positive(self.alpha) / self.high

    @torch.no_grad()
    def set_step(self, value: float) -> None:
        owner = self.owner
        target = owner.alpha if isinstance(owner, PactActQuant) else owner.scale
        target.fill_(value * float(owner.high) if isinstance(owner, PactActQuant) else value)

    def grad_scale(self, x: Tensor) -> float:
        return 1.0


class DorefaActQuant(ActQuant):
    r"""DoReFa activations: :math:`Q_k(\mathrm{clip}(x, 0, 1))`, with the range fixed at 1 ([-1, 1] on signed edges).

    References:
        Zhou et al., `DoReFa-Net <https://arxiv.org/abs/1606.06160>`_, 2016, section 2.5 (equation 11).
    """

    residual = False
    method = "dorefa"

    def make_scale(self) -> None:
        self.register_buffer("scale", torch.tensor(1.0))

    def start_step(self, observed: RangeObserver) -> float:
        return 1.0 / float(self.high)


class RangeObserver:
    """What calibration sees of one tensor: smallest, largest, and mean absolute value."""

    def __init__(self) -> None:
        self.minimum, self.maximum, self._sum, self._count = math.inf, -math.inf, 0.0, 0

    def see(self, x: Tensor) -> None:
        """Add one batch to the statistics."""
        low, high = torch.aminmax(x.detach())
        self.minimum, self.maximum = min(self.minimum, float(low)), max(self.maximum, float(high))
        self._sum += float(x.detach().abs().double().sum())
        self._count += x.numel()

    @property
    def mean_abs(self) -> float:
        """Return the mean absolute value of everything seen."""
        return self._sum / max(self._count, 1)

    @property
    def is_empty(self) -> bool:
        """Return whether nothing has been seen."""
        return self._count == 0
