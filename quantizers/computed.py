"""Weights whose step size is computed, not learned: from their statistics at every pass, or as in DoReFa."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantizers.kernels import TINY, round_straight_through
from quantizers.tensor_quant import WeightQuant

# Bits -> (c1, c2) of step = c1 * rms - c2 * mean|w|: the least-squares line through the steps with the least squared
# error on our grid (-2**(b-1) ... 2**(b-1) - 1) for five densities: normal, uniform, Laplace, logistic, triangular.
# A test repeats the fit.
COEFFICIENTS = {
    2: (2.4042, 1.6962), 3: (2.0934, 1.8754), 4: (1.5928, 1.5799), 5: (1.0918, 1.1371), 6: (0.7013, 0.7511),
    7: (0.4313, 0.4704),
}  # fmt: skip
# rms / mean|w| of the uniform and of the Laplace density: the range that the line was fitted on.
FITTED = (1.1547, 1.4142)
LEAST = 1e-3  # step of an all-zero tensor


class StatsWeightQuant(WeightQuant):
    r"""Weights whose step size follows from their statistics: :math:`s = c_1\sqrt{E[w^2]} - c_2 E[|w|]`.

    The step is recomputed at every pass; no gradient flows into it, and it is neither trained nor stored. The
    coefficients depend only on the bits. The form is SAWB's, but its coefficients are for a symmetric grid, so ours
    are refitted on a grid that reaches one code further down than up.

    Note:
        Where :math:`\sqrt{E[w^2]} / E[|w|]` is outside the range that the line was fitted on, it is clamped to
        the range: weights that training has gathered on two codes would otherwise get a step that is too small, and at
        5 bits or more a negative one. Sums are float64, so that their order does not affect the step.

    References:
        Choi et al., `Bridging the Accuracy Gap for 2-bit Quantized Neural Networks
        <https://arxiv.org/abs/1807.06964>`_, 2018 (SAWB).
    """

    method = "stats"

    def __init__(self, bit_width: int, low: int, high: int, weight: Tensor, per_channel: bool) -> None:  # noqa: FBT001
        super().__init__(bit_width, low, high, per_channel=per_channel)
        self._weight: tuple[Tensor, ...] = (weight,)  # a tuple keeps it out of this module's state
        self._layer: tuple[nn.Module, ...] = ()

    def follow(self, layer: nn.Module) -> None:
        self._layer = (layer,)

    @property
    def step(self) -> Tensor:
        return self.step_of(self._layer[0].weight if self._layer else self._weight[0])  # type: ignore[arg-type]

    @torch.no_grad()
    def step_of(self, weight: Tensor) -> Tensor:
        """Return the step size for a weight tensor, shape ``[out_channels, 1, ...]`` or ``[]``; a constant."""
        rows = weight.detach().double()
        rows = rows.reshape(weight.size(0), -1) if self.per_channel else rows.reshape(1, -1)
        size = rows.abs().mean(dim=1)
        if self.bits not in COEFFICIENTS:  # eight bits hold the whole range
            step = rows.abs().amax(dim=1) / self.high_code
        else:
            slope, offset = COEFFICIENTS[self.bits]
            shape = rows.square().mean(dim=1).sqrt() / size.clamp_min(TINY)
            step = size * (slope * shape.clamp(*FITTED) - offset)
        # any positive step represents a channel of zeros exactly
        step = torch.where(step > TINY, step, step.mean().clamp_min(LEAST))
        return step.to(weight.dtype).reshape((-1,) + (1,) * (weight.dim() - 1) if self.per_channel else ())

    def quantize(self, weight: Tensor) -> Tensor:
        return self._on_grid(weight, self.step_of(weight), grad_scale=1.0)  # the step has no gradient to scale

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        step = self.step_of(weight)  # once, for both
        values = self.in_float(weight) if self.bypass else self._on_grid(weight, step, grad_scale=1.0)
        return values, step, self.zero_point_value, self.bit_width_value

    @torch.no_grad()
    def rescale(self, weight: Tensor, factor: Tensor) -> None:
        # the step is proportional to the weights
        weight.mul_(factor.reshape((-1,) + (1,) * (weight.dim() - 1) if self.per_channel else ()))


class DorefaWeightQuant(WeightQuant):
    r"""DoReFa weights: :math:`\hat w = 2 Q_k(\tanh w / (2 \max|\tanh w|) + 1/2) - 1`, times a fixed gain.

    The levels are the odd multiples of :math:`1/(2^k - 1)`. Zero is not among them, and a code needs ``k + 1`` signed
    bits.

    Note:
        The published formula scales every layer's weights to [-1, 1], which batch norm undoes. Without batch norm, a
        layer's output would change a hundredfold in magnitude, so a constant gain ``mean|w| / mean|w_q|``, computed
        once from the float weights, restores it. With batch norm the gain is 1.

    References:
        Zhou et al., `DoReFa-Net <https://arxiv.org/abs/1606.06160>`_, 2016, section 2.3 (equation 9).
    """

    gain: Tensor
    method = "dorefa"

    def __init__(self, bit_width: int, low: int, high: int, weight: Tensor, has_norm: bool) -> None:  # noqa: FBT001
        levels = 2**bit_width - 1
        super().__init__(bit_width + 1, -levels, levels, per_channel=False)
        self.levels = levels
        self.register_buffer("gain", torch.tensor(1.0))
        self._has_norm = has_norm
        self.restart(weight)

    @torch.no_grad()
    def restart(self, weight: Tensor) -> None:
        self.gain.fill_(1.0)
        if not self._has_norm:
            quantized = self.quantize(weight).abs().mean()
            self.gain.copy_(weight.abs().mean().clamp_min(TINY) / quantized)

    @property
    def count(self) -> int:
        return int(self.levels) + 1  # codes are odd numbers

    @property
    def step(self) -> Tensor:
        step: Tensor = self.gain / self.levels
        return step

    def quantize(self, weight: Tensor) -> Tensor:
        codes: Tensor = 2 * round_straight_through(_in_unit_interval(weight) * self.levels) - self.levels
        return codes * self.step

    def in_float(self, weight: Tensor) -> Tensor:
        """Return the values that the grid rounds: the bounded weights, in [-1, 1] times the gain."""
        return (2 * _in_unit_interval(weight) - 1) * self.gain

    @torch.no_grad()
    def rescale(self, weight: Tensor, factor: Tensor) -> None:
        self.gain.mul_(factor.reshape(()))


def _in_unit_interval(weight: Tensor) -> Tensor:
    bounded = torch.tanh(weight)
    return bounded / (2 * bounded.abs().max().clamp_min(TINY)) + 0.5
