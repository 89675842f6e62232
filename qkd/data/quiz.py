"""Keep a quiz back from the training images: what judges how a teacher teaches, and no student is distilled on."""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from qkd.data.sampling import stratified_quotas, take_quotas
from qkd.data.splits import Splits
from qkd.seeding import stream


def take_quiz(splits: Splits, images: int, *, seed: int) -> Splits:
    """Return the same images with a quiz out of the training part: stratified, seeded.

    Mean and standard deviation stay; the fingerprint becomes another one.

    Args:
        splits: The run's images, without a quiz.
        images: How many the quiz is to have, at least one a class.
        seed: The run's seed.

    Returns:
        The images with ``quiz``, and ``train`` without it.

    Raises:
        ValueError: If there is a quiz already, or a class that the training images have would be lacking in the quiz
            or in what it leaves.
    """
    if splits.quiz is not None:
        raise ValueError(f"a quiz of {len(splits.quiz)} images has been kept back already")
    counts = torch.bincount(splits.train.labels, minlength=len(splits.classes))
    quotas = stratified_quotas(counts, max(0, min(images, len(splits.train))))
    lacking = int(((counts > 0) & ((quotas == 0) | (quotas == counts))).sum())
    if lacking:
        raise ValueError(
            f"quiz_images: {images} of {len(splits.train)} training images leave {lacking} of {int((counts > 0).sum())}"
            f" classes without an image in the quiz or to learn from; choose another number"
        )
    taken, rest = take_quotas(splits.train.labels, quotas, stream(seed, "quiz", "split"))
    mark = hashlib.sha256(f"{splits.fingerprint} without the quiz ".encode() + taken.numpy().tobytes()).hexdigest()
    return dataclasses.replace(
        splits, train=splits.train.subset(rest), quiz=splits.train.subset(taken), fingerprint=mark
    )  # fmt: skip
