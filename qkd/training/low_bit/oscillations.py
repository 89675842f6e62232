"""Iterative freezing: weights that oscillate between two codes are fixed at the one they had most of the time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qkd.training.job import Moment
from quantizers.recipes.codes import LowBitLayer, place, weight_codes

KEYS = ("frequency", "mean_code", "direction", "frozen", "kept_code")


class OscillationFreezing:
    r"""Freezes weights that oscillate, code by code.

    With :math:`q^t` the code after step :math:`t`, a weight oscillates at a step that changes its code in the direction
    opposite to the last change. The frequency is :math:`f^t = m\,o^t + (1 - m) f^{t-1}`; a weight whose frequency
    exceeds the threshold is fixed at the code nearest to the running mean of its codes (with the same :math:`m`): its
    latent weight is reset to code times step size after every step, while the step size continues to learn. The
    threshold follows half a cosine from its first to its last value over the training.

    Args:
        layers: Module path -> layer, at the start of the training.
        thresholds: First and last frequency above which a weight is frozen.
        momentum: :math:`m`.

    References:
        Nagel et al., `Overcoming Oscillations in Quantization-Aware Training <https://arxiv.org/abs/2203.11086>`_,
        2022, section 4.3 and algorithm 1.
    """

    name = "oscillations"

    def __init__(self, layers: Mapping[str, LowBitLayer], thresholds: tuple[float, float], momentum: float) -> None:
        self._layers, self._thresholds, self._momentum = dict(layers), thresholds, momentum
        self._codes = {name: weight_codes(layer) for name, layer in layers.items()}
        self._of = {name: _begin(codes) for name, codes in self._codes.items()}

    def before(self, moment: Moment) -> None:
        """Do nothing."""

    @torch.no_grad()
    def after(self, moment: Moment) -> None:
        """Inspect what a step did to the codes, freeze weights, and reset frozen ones."""
        first, last = self._thresholds
        threshold = last + (first - last) * 0.5 * (1 + math.cos(math.pi * moment.done))
        for name, layer in self._layers.items():
            if layer.weight.grad is None:  # the step updated something else
                continue
            own = self._of[name]
            codes = torch.where(own["frozen"], own["kept_code"], weight_codes(layer))
            self._look(own, codes, self._codes[name])
            newly = (own["frequency"] > threshold) & ~own["frozen"]
            own["kept_code"] = torch.where(newly, torch.round(own["mean_code"]), own["kept_code"])
            own["frozen"] = own["frozen"] | newly
            place(layer, own["kept_code"], own["frozen"])
            self._codes[name] = torch.where(own["frozen"], own["kept_code"], codes)

    def _look(self, own: dict[str, Tensor], codes: Tensor, before: Tensor) -> None:
        direction = torch.sign(codes - before)
        oscillates = (direction != 0) & (direction == -own["direction"])
        own["frequency"] = torch.lerp(own["frequency"], oscillates.to(codes.dtype), self._momentum)
        own["mean_code"] = torch.lerp(own["mean_code"], codes, self._momentum)
        own["direction"] = torch.where(direction != 0, direction, own["direction"])

    def facts(self) -> Mapping[str, float]:
        """Return the share of the weights that is frozen."""
        frozen = sum(float(own["frozen"].sum()) for own in self._of.values())
        return {"frozen_weights": frozen / max(sum(codes.numel() for codes in self._codes.values()), 1)}

    def state(self) -> dict[str, Tensor]:
        """Return what it tracks for each weight, and the codes after the last step."""
        known = {f"{name}/{key}": own[key] for name, own in self._of.items() for key in KEYS}
        return {**known, **{f"{name}/code": codes for name, codes in self._codes.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        for name, codes in self._codes.items():
            self._of[name] = {key: tensors[f"{name}/{key}"].to(codes.device) for key in KEYS}
            self._codes[name] = tensors[f"{name}/code"].to(codes.device)


def _begin(codes: Tensor) -> dict[str, Tensor]:
    zero = torch.zeros_like(codes)
    return {
        "frequency": zero, "mean_code": codes.clone(), "direction": zero.clone(),
        "frozen": torch.zeros_like(codes, dtype=torch.bool), "kept_code": codes.clone(),
    }  # fmt: skip
