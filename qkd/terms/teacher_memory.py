"""The logits of a fixed teacher, computed once for images that it sees unchanged in every epoch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkd.data import Splits, normalize
from qkd.data.splits import MemorySplit
from qkd.training.job import Batch

MOST_BYTES = 256 * 2**20  # of stored logits: 67,000 images with 1,000 classes
LEAST_EPOCHS = 3  # of a training, since the logits of all images cost one epoch of forward passes


class TeacherMemory:
    """Looks up a batch's logits among those of all training images, computed at first use in data-set order.

    Each image is computed in the same batch whenever a training is resumed, and on any number of devices. So its logits
    have the same bits, even if an image's position in a batch would change the last one.

    Args:
        splits: The images, and how they are normalized.
        batch_size: Images per forward pass.
    """

    def __init__(self, splits: Splits, batch_size: int) -> None:
        self._splits, self._batch_size = splits, batch_size
        self._kept: dict[torch.dtype | None, Tensor] = {}
        self._versions: list[int] = []  # of the teacher's tensors: each write to one increments its version
        self._is_off = False

    def logits(self, teacher: nn.Module, batch: Batch) -> Tensor | None:
        """Return the teacher's logits for a batch, shape ``[batch, classes]``; None if the teacher must be run.

        Args:
            teacher: In eval mode; once one of its weights or buffers is written to, it must be run.
            batch: Its ``samples`` are positions in the training set.
        """
        if self._is_off or batch.samples is None:
            return None
        versions = [tensor._version for tensor in (*teacher.parameters(), *teacher.buffers())]
        if self._kept and versions != self._versions:  # an external method changes the teacher
            self._kept, self._is_off = {}, True
            return None
        device = batch.images.device.type
        arithmetic = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if arithmetic not in self._kept:
            made = self._all(teacher, batch.images) if self._are_these(batch) else None
            if made is None:
                self._is_off = True
                return None
            self._kept[arithmetic], self._versions = made, versions
        return self._kept[arithmetic].index_select(0, batch.samples.to(batch.images.device))

    def _are_these(self, batch: Batch) -> bool:
        """Return whether the positions are right: the batch has the pixels of these images."""
        raw, samples = batch.raw, batch.samples
        if samples is None or raw is None or len(samples) != len(raw):
            return False
        images, _ = self._splits.train.batch(samples, raw.device)
        return torch.equal(images, raw)

    @torch.no_grad()
    def _all(self, teacher: nn.Module, like: Tensor) -> Tensor | None:
        train, parts = self._splits.train, []
        is_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        layout = torch.channels_last if is_last else torch.contiguous_format
        for places in torch.split(torch.arange(len(train)), self._batch_size):
            images, _ = train.batch(places, like.device)
            shown = normalize(images, self._splits.mean, self._splits.std)
            parts.append(teacher(shown.contiguous(memory_format=layout)))
            if parts[0].dim() != 2 or parts[0][0].numel() * parts[0].element_size() * len(train) > MOST_BYTES:
                return None
        return torch.cat(parts)


def memory_for(
    splits: Splits, batch_size: int, *, epochs: int, sees_raw: bool, teacher: nn.Module
) -> TeacherMemory | None:
    """Return a memory if it pays off; None if the teacher must be run for every batch.

    Args:
        splits: The images; only images in memory are read once more.
        batch_size: Images per forward pass.
        epochs: Length of the training.
        sees_raw: Whether the teacher sees each image unchanged in every epoch.
        teacher: A teacher that is not fixed gets no memory.
    """
    is_fixed = not any(parameter.requires_grad for parameter in teacher.parameters())
    in_memory = type(splits.train) is MemorySplit
    pays = epochs >= LEAST_EPOCHS and sees_raw and is_fixed and in_memory
    return TeacherMemory(splits, batch_size) if pays else None
