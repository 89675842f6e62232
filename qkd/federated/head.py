"""The last linear layer of a net, as FedGen feeds it latents in place of features."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from qkd.terms.last_layer import logits_layer
from quantizers.layers import QuantLinearBn


class NoHeadError(ValueError):
    """A net whose logits do not come from a linear layer, so that latents cannot be fed to it."""


def head_path(net: nn.Module, images: Tensor) -> str:
    """Return the path of the linear layer that gives the logits of a float net.

    Args:
        net: The float net.
        images: Images of its input size, shape ``[batch, channels, height, width]``.

    Raises:
        NoHeadError: If there is none: the net ends with something else, or the input of its last layer is not
            ``[batch, features]``.
    """
    found = logits_layer(net, images)
    if found is not None and found[1].dim() == 2:
        return found[0]
    raise NoHeadError(
        "federated.strategy fedgen feeds latents to the linear layer that gives the logits, but this net has none (or "
        "something follows it); use a net that ends with one, or fedavg, fedprox or feddistill"
    )


class Head(nn.Module):
    """The last layer of a net, with the quantizer that its input goes through in a low-bit student.

    Args:
        layer: The net's own module, shared with it.
    """

    def __init__(self, layer: nn.Linear | QuantLinearBn) -> None:
        super().__init__()
        self.quantizer = layer.source if isinstance(layer, QuantLinearBn) else nn.Identity()
        self.layer = layer

    @classmethod
    def of(cls, net: nn.Module, path: str) -> Head:
        """Return the head of a net, float or low-bit, that has its last layer at a path.

        Raises:
            NoHeadError: If there is no linear layer.
        """
        layer = dict(net.named_modules()).get(path)
        if not isinstance(layer, (nn.Linear, QuantLinearBn)):
            raise NoHeadError(f"{path}: is not a linear layer, but {type(layer).__name__}")
        return cls(layer)

    @property
    def features(self) -> int:
        """Return the size of a latent."""
        return int(self.layer.in_features)

    def frozen_copy(self) -> Head:
        """Return an independent head whose parameters get no gradient; latents do."""
        return copy.deepcopy(self).requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents ``[batch, features]`` to logits ``[batch, classes]``."""
        return self.layer(self.quantizer(latents))  # type: ignore[no-any-return]
