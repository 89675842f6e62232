"""FedGen's generator: noise and a class become a latent, the input of a net's last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = 256  # units of the only hidden layer, as in the released code


class LatentGenerator(nn.Module):
    """Noise with a one-hot class appended, a linear layer with batch norm and ReLU, and a linear layer.

    Args:
        classes: Number of classes.
        features: Size of a latent.
        noise: Size of the noise.

    References:
        Zhu, Hong, Zhou, `FedGen <https://arxiv.org/abs/2105.10056>`_, 2021. As in its released code, the noise is
        uniform in [0, 1), although a comment there calls it Gaussian.
    """

    def __init__(self, classes: int, features: int, noise: int) -> None:
        super().__init__()
        self.classes, self.noise = classes, noise
        self.hidden = nn.Linear(noise + classes, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.latent = nn.Linear(HIDDEN, features)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return noise, shape ``[count, noise]``, uniform in [0, 1)."""
        return torch.rand(count, self.noise, generator=generator)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Map noise ``[batch, noise]`` and classes ``[batch]`` to latents ``[batch, features]``."""
        given = torch.cat([noise, functional.one_hot(labels, self.classes).to(noise.dtype)], 1)
        return self.latent(functional.relu(self.norm(self.hidden(given))))  # type: ignore[no-any-return]
