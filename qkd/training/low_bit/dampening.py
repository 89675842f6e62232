"""Oscillation dampening: latent weights are pulled toward the values that they are rounded to."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from qkd.training.job import Moment
from quantizers.recipes.codes import LowBitLayer, distance_to_codes


class Dampening:
    r"""Adds the gradient of :math:`\lambda \sum (\hat w - \mathrm{clip}(w))^2` to that of each latent weight.

    The quantized weights :math:`\hat w` are constants; :math:`\lambda` rises as a half cosine from 0 to its last value.

    Note:
        It is added to the gradients that the optimizer reads, after clipping, like weight decay, so it does not depend
        on loss scaling or on the method that gives the loss. Step sizes get no gradient from it.

    Args:
        layers: Module path -> layer.
        last: The final :math:`\lambda`.

    References:
        Nagel et al., `Overcoming Oscillations in Quantization-Aware Training <https://arxiv.org/abs/2203.11086>`_,
        2022, section 4.2.
    """

    name = "dampening"

    def __init__(self, layers: Mapping[str, LowBitLayer], last: float) -> None:
        self._layers, self._last = tuple(layers.values()), last

    def before(self, moment: Moment) -> None:
        """Add to the gradients."""
        weight = self._last * 0.5 * (1 - math.cos(math.pi * moment.done))
        for layer in self._layers:
            if layer.weight.grad is not None:
                layer.weight.grad.add_(distance_to_codes(layer), alpha=2 * weight)

    def after(self, moment: Moment) -> None:
        """Do nothing."""

    def facts(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return nothing, since it depends only on the weights."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing."""
