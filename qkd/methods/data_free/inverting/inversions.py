"""Images optimized directly until a frozen teacher gives the desired outputs: DeepInversion, ZSKD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qkd.config.data_free import DataFreeConfig
from qkd.data import Splits
from qkd.losses import class_similarity, data_impression_loss, deep_inversion_loss, dirichlet_concentrations
from qkd.methods.data_free.inverting.views import rolled
from qkd.methods.data_free.making.kinds import weights_of
from qkd.methods.data_free.making.rival import Answer, Rival
from qkd.methods.data_free.making.sources import balanced_labels
from qkd.methods.data_free.making.watching import Seen, Watched
from qkd.seeding import derive, stream

JITTER = 2  # pixels, of DeepInversion's rolls


@dataclass(frozen=True)
class Inverted:
    """A batch of a pool.

    Args:
        images: Normalized, float32, shape ``[batch, channels, height, width]``.
        state: Arrays for making the next batch, by name.
        loss: The loss at its best step.
        low_bit_loss: The same against the low-bit student, if the images were made against its float weights.
    """

    images: Tensor
    state: dict[str, np.ndarray]
    loss: float
    low_bit_loss: float | None = None


class Inversion(Protocol):
    """How a batch of a pool is made."""

    def __call__(self, index: int, count: int, state: dict[str, np.ndarray]) -> Inverted:
        """Return batch ``index`` of ``count`` images, from the state that the previous one left."""
        ...


class Best:
    """A copy of the images of the best step: the optimizer changes its own in place."""

    def __init__(self) -> None:
        self.loss, self.images = float("inf"), torch.empty(0)
        self.low_bit: float | None = None

    def offer(self, loss: Tensor, images: Tensor, *, low_bit: float | None = None) -> bool:
        """Keep the images if their loss is the lowest so far; return whether it is.

        Args:
            loss: Shape ``[]``.
            images: Images of this step.
            low_bit: The loss against the low-bit student, if a different one was minimized.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        value = float(loss.detach())
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the loss of inverted images is {value}; lower student.data_free.lr or its weights"
            )
        is_better = value < self.loss
        if is_better:
            self.loss, self.images, self.low_bit = value, images.detach().clone(), low_bit
        return is_better


@torch.no_grad()
def low_bit_loss(total: Callable[[Tensor | None], Tensor], answer: Answer | None) -> float | None:
    """Return a loss against the low-bit student; None if there is none, or the loss is against it already."""
    if answer is None or answer.low_bit is answer.logits:
        return None
    return float(total(answer.low_bit))


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """Take one step of the optimizers along the gradient of a loss."""
    parameters = [one for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]]
    # not `backward`: a student that the images are made against would get gradients, too
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for optimizer in optimizers:
        optimizer.step()


@dataclass(frozen=True)
class Inverter:
    """Base class of inversions.

    Args:
        teacher: Frozen, with everything that the method reads.
        settings: Rate, steps, weights, and whatever else the method reads.
        splits: Shape of the images, classes, mean and standard deviation.
        seed: Seed of the run.
        device: Device of the teacher.
        rival: The student that images are made against; None if they are made for any student, or
            before its first step.
    """

    teacher: Watched
    settings: DataFreeConfig
    splits: Splits
    seed: int
    device: torch.device
    rival: Rival | None = None

    def weights(self) -> dict[str, Any]:
        """Return the weights of the method's loss."""
        return weights_of(self.settings.method, self.settings.weights)


class DeepInversion(Inverter):
    """Images from noise: a class, smoothness, the teacher's statistics; adaptive: also disagreement with a student."""

    def __call__(self, index: int, count: int, state: dict[str, np.ndarray]) -> Inverted:  # noqa: ARG002
        """Return a batch; it does not depend on any other."""
        generator, shape = stream(self.seed, "inversion", index), (count, *self.splits.image_shape)
        images = torch.randn(shape, generator=generator).to(self.device).requires_grad_()
        labels = balanced_labels(count, len(self.splits.classes), generator, shuffled=False).to(self.device)
        optimizer, best = torch.optim.Adam([images], lr=self.settings.lr), Best()
        weights = self.weights()
        if self.rival is None:
            weights.pop("competition_weight", None)
        for _ in range(self.settings.pool_steps):
            view = rolled(images, min(JITTER, min(shape[2:]) // 4), generator)
            seen, answer = self.teacher(view), None if self.rival is None else self.rival(view)

            def total(logits: Tensor | None, view: Tensor = view, seen: Seen = seen) -> Tensor:
                return deep_inversion_loss(view, seen.logits, labels, seen.statistics(), logits, **weights)

            loss = total(None if answer is None else answer.logits)
            best.offer(loss, images, low_bit=low_bit_loss(total, answer))
            descend(loss, optimizer)
        return Inverted(best.images, {}, best.loss, best.low_bit)


class DataImpressions(Inverter):
    """ZSKD's images: pixels in 0 to 1 whose softened outputs match sampled targets."""

    def __call__(self, index: int, count: int, state: dict[str, np.ndarray]) -> Inverted:  # noqa: ARG002
        """Return a batch; it does not depend on any other."""
        generator = stream(self.seed, "inversion", index)
        pixels = torch.rand((count, *self.splits.image_shape), generator=generator).to(self.device)
        pixels.requires_grad_()
        targets = self.targets(index, count).to(self.device)
        optimizer, best = torch.optim.Adam([pixels], lr=self.settings.lr), Best()
        for _ in range(self.settings.pool_steps):
            images = self._normalized(pixels)
            loss = data_impression_loss(self.teacher(images).logits, targets)
            best.offer(loss, images)
            descend(loss, optimizer)
            with torch.no_grad():
                pixels.copy_(_full_range(pixels))
        return Inverted(best.images, {}, best.loss)

    def targets(self, index: int, count: int) -> Tensor:
        """Return a batch's target outputs: rows of probabilities, cycling through classes and scales."""
        similarity = class_similarity(self.teacher.last(self.splits.image_shape).weight.detach().double().cpu())
        beta = self.settings.beta[index % len(self.settings.beta)]
        rows = dirichlet_concentrations(similarity, beta=beta, compat=self.settings.compat).numpy()
        drawn = np.random.default_rng(derive(self.seed, "targets", index))
        labels = balanced_labels(count, len(rows), stream(self.seed, "target classes", index), shuffled=False)
        return torch.from_numpy(np.stack([drawn.dirichlet(rows[label]) for label in labels.tolist()])).float()

    def _normalized(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(one, device=pixels.device).view(1, -1, 1, 1) for one in (
            self.splits.mean, self.splits.std,
        ))  # fmt: skip
        return (pixels - mean) / std


def _full_range(pixels: Tensor) -> Tensor:
    """Return each image stretched to 0 to 1; constant images are unchanged."""
    flat = pixels.flatten(1)
    least, most = (one[:, None, None, None] for one in (flat.amin(1), flat.amax(1)))
    return torch.where(most > least, (pixels - least) / (most - least).clamp_min(1e-12), pixels)
