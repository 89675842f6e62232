"""Hold out a quiz from the training images: it judges how well a teacher teaches, and no student is distilled on it."""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from qkd.data.sampling import stratified_quotas, take_quotas
from qkd.data.splits import Splits
from qkd.seeding import stream


def take_quiz(splits: Splits, images: int, *, seed: int) -> Splits:
    """Return the same images with a quiz split off the training part: stratified, seeded.

    The mean and standard deviation stay the same; the fingerprint changes.

    Args:
        splits: The run's images, without a quiz.
        images: Size of the quiz, at least one image per class.
        seed: The run's seed.

    Returns:
        The images with ``quiz``, and ``train`` without it.

    Raises:
        ValueError: If there is already a quiz, or a class of the training images would be missing from the quiz or
            from the rest.
    """
    if splits.quiz is not None:
        raise ValueError(f"a quiz of {len(splits.quiz)} images has already been held out")
    counts = torch.bincount(splits.train.labels, minlength=len(splits.classes))
    quotas = stratified_quotas(counts, max(0, min(images, len(splits.train))))
    lacking = int(((counts > 0) & ((quotas == 0) | (quotas == counts))).sum())
    if lacking:
        raise ValueError(
            f"quiz_images: {images} of {len(splits.train)} training images leave {lacking} of {int((counts > 0).sum())}"
            f" classes without an image in the quiz or in the rest; choose another number"
        )
    taken, rest = take_quotas(splits.train.labels, quotas, stream(seed, "quiz", "split"))
    mark = hashlib.sha256(f"{splits.fingerprint} without the quiz ".encode() + taken.numpy().tobytes()).hexdigest()
    return dataclasses.replace(
        splits, train=splits.train.subset(rest), quiz=splits.train.subset(taken), fingerprint=mark
    )  # fmt: skip
