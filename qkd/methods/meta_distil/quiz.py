"""Batches of the quiz that judges a student's teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from qkd.data import Split, normalize
from qkd.seeding import stream


class Quiz:
    """Batches of the quiz, one per step: the same one if the step is repeated.

    Args:
        split: The quiz.
        batch_size: Images per batch; all of them if there are fewer.
        mean: Per channel, fraction 0..1.
        std: Per channel, fraction.
        seed: The run's.
        device: The device of the batches.

    Raises:
        ValueError: If the quiz is empty, or ``batch_size`` not positive.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        device: torch.device,
    ) -> None:
        if not len(split) or batch_size < 1:
            raise ValueError(f"needs images and a positive batch size, got {len(split)} images and {batch_size=}")
        self._split, self._size = split, min(batch_size, len(split))
        self._mean, self._std, self._seed, self._device = mean, std, seed, device

    def __call__(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return images, normalized and not augmented, and labels; each image at most once."""
        order = torch.randperm(len(self._split), generator=stream(self._seed, "quiz", epoch, step))
        images, labels = self._split.batch(order[: self._size], self._device)
        return normalize(images, self._mean, self._std), labels
