"""The generator of data-free distillation: latents, and a class where one is asked for, become normalized images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.image_size import ImageSize, height_width

# "0.8" is written where a momentum could be in the code that DAFL, RDSKD and GDFQ share; at that place it is the
# epsilon of the two inner batch norms. Kept, because published figures have it.
PUBLISHED_EPSILON = 0.8
SLOPE = 0.2  # of LeakyReLU
STEPS = 4  # the first plane is a fourth of the image
CONDITIONS = ("none", "product", "one_hot")


class Generator(nn.Module):
    """A linear layer, two doublings of the image plane with convolutions, tanh, and batch norm without weights.

    Its images are in the space that the teacher sees (normalized), and in no range.

    Args:
        latent: Size of a latent.
        classes: Of the teacher; read by a condition only.
        channels: Of the images.
        image_size: Side in pixels of square images, or height and width.
        width: Channels of the planes; the last inner one has half of them.
        condition: ``none``; ``product``: the latent times an embedding of the class (GDFQ); ``one_hot``: the class is
            put behind the latent.
        epsilon: Of the two inner batch norms.

    Raises:
        ValueError: If a size is not positive, ``width`` is odd, or ``condition`` is unknown.

    References:
        Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_, 2019.
    """

    def __init__(
        self,
        *,
        latent: int,
        classes: int,
        channels: int,
        image_size: ImageSize,
        width: int = 128,
        condition: str = "none",
        epsilon: float = PUBLISHED_EPSILON,
    ) -> None:
        super().__init__()
        self.size = height_width(image_size)
        if min(latent, classes, channels, *self.size, width) < 1 or width % 2 or condition not in CONDITIONS:
            raise ValueError(
                f"sizes must be positive, width even and condition one of {', '.join(CONDITIONS)}, got {latent=}, "
                f"{classes=}, {channels=}, {image_size=}, {width=}, {condition=}"
            )
        self.latent, self.classes, self.condition = latent, classes, condition
        self.start = tuple(-(-side // STEPS) for side in self.size)
        self.embedding = nn.Embedding(classes, latent) if condition == "product" else None
        entering = latent + (classes if condition == "one_hot" else 0)
        self.expand = nn.Linear(entering, width * self.start[0] * self.start[1])
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width, eps=epsilon)
        self.conv2 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(width // 2, eps=epsilon)
        self.conv3 = nn.Conv2d(width // 2, channels, 3, padding=1)
        self.norm4 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Return images, ``[batch, channels, height, width]``.

        Args:
            latents: Shape ``[batch, latent]``.
            labels: Classes, int64, shape ``[batch]``; a generator without condition does not read them.
        """
        x = self.expand(self._entering(latents, labels))
        x = self.norm1(x.view(len(x), -1, *self.start))
        x = functional.leaky_relu(self.norm2(self.conv1(_doubled(x))), SLOPE)
        x = functional.leaky_relu(self.norm3(self.conv2(_doubled(x))), SLOPE)
        x = torch.tanh(self.conv3(x))[..., : self.size[0], : self.size[1]]
        images: Tensor = self.norm4(x)
        return images

    def _entering(self, latents: Tensor, labels: Tensor) -> Tensor:
        if self.embedding is not None:
            scales: Tensor = self.embedding(labels)
            return latents * scales
        if self.condition == "one_hot":
            return torch.cat([latents, functional.one_hot(labels, self.classes).to(latents)], 1)
        return latents


class GeneratorGroup(nn.Module):
    """Several generators, one a group of classes: class ``c`` is made by generator ``c % groups``.

    Args:
        generators: At least one, of one kind.
    """

    def __init__(self, generators: list[Generator]) -> None:
        super().__init__()
        self.generators = nn.ModuleList(generators)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Return images in the order of the labels; arguments as of :class:`Generator`."""
        groups = labels % len(self.generators)
        order = groups.argsort(stable=True)
        parts = []
        for index, generator in enumerate(self.generators):
            chosen = order[groups[order] == index]
            if len(chosen):
                parts.append(generator(latents[chosen], labels[chosen]))
        return torch.cat(parts)[order.argsort()]


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")
