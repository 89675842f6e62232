"""The quiz of a teacher that learns to teach: training images that the student never learns from."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from qkd.data import Split, Splits, normalise
from qkd.data.sampling import stratified_quotas, take_quotas
from qkd.seeding import stream


@dataclasses.dataclass(frozen=True)
class QuizSplits:
    """The images of a run whose student is quizzed.

    Args:
        splits: ``train`` lacks the quiz; mean and standard deviation stay; the fingerprint tells of the quiz.
        quiz: Images of the training set, as many of each class in proportion.
    """

    splits: Splits
    quiz: Split


def take_quiz(splits: Splits, images: int, *, seed: int) -> QuizSplits:
    """Divide the training images into those that the student learns from and the quiz: stratified, seeded.

    Args:
        splits: The run's images.
        images: Size of the quiz.
        seed: The run's.

    Raises:
        ValueError: If the quiz, or what it leaves, lacks a class that the training images have.
    """
    counts = torch.bincount(splits.train.labels, minlength=len(splits.classes))
    quotas = stratified_quotas(counts, min(images, len(splits.train)))
    lacking = int(((counts > 0) & ((quotas == 0) | (quotas == counts))).sum())
    if lacking:
        raise ValueError(
            f"quiz_images: {images} of {len(splits.train)} training images leave {lacking} of {int((counts > 0).sum())}"
            f" classes without an image on one side; each class needs one in the quiz and one to learn from"
        )
    taken, rest = take_quotas(splits.train.labels, quotas, stream(seed, "quiz", "split"))
    mark = hashlib.sha256(f"{splits.fingerprint} without quiz ".encode() + taken.numpy().tobytes()).hexdigest()
    learnt = dataclasses.replace(splits, train=splits.train.subset(rest), fingerprint=mark)
    return QuizSplits(learnt, splits.train.subset(taken))


class Quiz:
    """Draws a batch of the quiz for each step: the same one whenever the step is repeated.

    Args:
        split: The quiz.
        batch_size: Images a batch; all of them where there are not as many.
        mean: Per channel, fraction 0..1.
        std: Per channel, fraction.
        seed: The run's.
        device: Where the batches are wanted.

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
        """Return images, normalised and not augmented, and labels; each image at most once."""
        order = torch.randperm(len(self._split), generator=stream(self._seed, "quiz", epoch, step))
        images, labels = self._split.batch(order[: self._size], self._device)
        return normalise(images, self._mean, self._std), labels
