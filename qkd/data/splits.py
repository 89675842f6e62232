"""Loaded data sets: three parts that return uint8 batches, and the facts about them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from qkd.image_size import ImageSize, height_width

if TYPE_CHECKING:
    from qkd.data.domains import Unlabeled
    from qkd.data.loading.facts import DataFacts


class Split(Protocol):
    """One part of a data set.

    Attributes:
        labels: Class numbers, int64, shape ``[n]``, on the CPU.
        decodes: Whether a batch decodes files or resizes images, so that worker processes pay off, or is a lookup.
    """

    labels: Tensor
    decodes: bool

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of its images."""
        ...

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return ``(images, labels)``: uint8 ``[batch, channels, height, width]`` and int64 ``[batch]``."""
        ...

    def subset(self, indices: Tensor) -> Split:
        """Return the part with these images, in this order."""
        ...

    def to(self, device: torch.device | str) -> Split:
        """Move what is in memory to ``device``; return itself, or the moved part."""
        ...


class MemorySplit:
    """A part in memory, as uint8.

    Args:
        images: uint8, shape ``[n, channels, height, width]``.
        labels: int64, shape ``[n]``.

    Raises:
        TypeError: If ``images`` are not uint8 or ``labels`` not int64.
        ValueError: If the shapes do not match.
    """

    decodes = False

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or labels.dtype != torch.int64:
            raise TypeError(f"images must be uint8 and labels int64, got {images.dtype} and {labels.dtype}")
        if images.dim() != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                "needs images [n, channels, height, width] and labels [n], "
                f"got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        self.images = images.contiguous()
        self.labels = labels.cpu()
        self._labels_on_device = labels.to(images.device)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of its images."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return ``(images, labels)`` of these images on ``device``: one index-select if they are already there."""
        indices = indices.to(self.images.device, non_blocking=True)
        images = self.images.index_select(0, indices)
        labels = self._labels_on_device.index_select(0, indices)
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def subset(self, indices: Tensor) -> MemorySplit:
        """Return the part with these images, in this order."""
        return MemorySplit(self.images[indices.to(self.images.device)], self.labels[indices.cpu()])

    def to(self, device: torch.device | str) -> MemorySplit:
        """Move images and labels to ``device`` once and return itself. ``labels`` stays on the CPU."""
        self.images = self.images.to(device)
        self._labels_on_device = self._labels_on_device.to(device)
        return self


class Parts(NamedTuple):
    """A data set as read, before a validation part is held out.

    Attributes:
        train: All its training images.
        test: Its test images.
        classes: Class names; a label is a position in it.
        notes: Remarks for the user, one per line.
        val_rows: Positions in ``train`` of the set's own validation part; None if a share is to be held out.
        test_words: Where the test images come from, in words.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    val_rows: Tensor | None = None
    test_words: str = "the set's own"

    @property
    def learned_rows(self) -> Tensor:
        """Positions in ``train`` outside the set's own validation part, int64."""
        rows = torch.arange(len(self.train))
        return rows if self.val_rows is None else rows[~torch.isin(rows, self.val_rows)]


@dataclasses.dataclass
class Splits:
    """A loaded data set.

    Attributes:
        train: Images to train on.
        val: Images held out of the training set for search and model selection; may be empty.
        test: Images that are scored once, at the end.
        classes: Class names; a label is a position in it.
        channels: 1 (gray) or 3 (color).
        image_size: Side in pixels of square images, or ``(height, width)``.
        mean: Per channel, fraction 0..1: that of ``train``, unless the config gives one.
        std: Per channel, fraction of the full range, likewise.
        fingerprint: Hash of the set as read, before it was split (`qkd.data.loading.facts`), and of the quiz, if there
            is one.
        quiz: Training images that the student is not trained on, because they judge its teacher
            (:func:`qkd.data.take_quiz`); they are not in ``train``.
        facts: Facts of the set when it was read; None if it was generated.
        notes: Remarks for the user, one per line.
        resize: Rule that resizes images of other sizes to ``image_size`` (:class:`qkd.data.sets.Fit`); ``none`` if all
            have that size.
        held_out: What is held out from training, in one line.
        target: Training images of the unseen domain, without labels; None if the set has no domains.
    """

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    channels: int
    image_size: ImageSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    quiz: Split | None = None
    facts: DataFacts | None = None
    notes: tuple[str, ...] = ()
    resize: str = "none"
    held_out: str = ""
    target: Unlabeled | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of the images."""
        return self.channels, *height_width(self.image_size)

    def to(self, device: torch.device | str) -> Splits:
        """Move every part that is in memory to ``device``, in place, and return itself."""
        self.train, self.val, self.test = (part.to(device) for part in (self.train, self.val, self.test))
        self.quiz = None if self.quiz is None else self.quiz.to(device)
        self.target = None if self.target is None else self.target.to(device)
        return self
