"""Score a classifier on a split."""

from __future__ import annotations

import torch
from torch import nn

from qkd.config import DataConfig
from qkd.data import Splits, iterate, normalize
from qkd.data.splits import Split
from qkd.engines.engine import current
from quantizers import batch_statistics
from quantizers.modes import evaluating


def scored_images(split: Split, data: DataConfig) -> int:
    """Return how many images of a split :func:`accuracy` scores.

    Args:
        split: The images.
        data: Which statistics batch norm uses.
    """
    size = data.batch_statistics
    return len(split) if size is None else len(split) // size * size


def accuracy(model: nn.Module, split: Split, splits: Splits, data: DataConfig, device: torch.device) -> float | None:
    """Return the share of a split's images that a model classifies correctly, in eval mode.

    Several devices take turns with the batches, so that each batch is scored as on a single device.

    With ``data.batch_statistics`` it is what role-kd's released code computes: batch norm uses the statistics of each
    batch, and images past the last full batch are left out. The prediction for an image then depends on its batch.

    Args:
        model: Gives logits ``[batch, classes]``. Its modes (train or eval, module by module) are restored.
        split: The images.
        splits: The data set they belong to, for mean and std.
        data: Batch size, workers, and which statistics batch norm uses.
        device: Where the model is.

    Returns:
        A fraction in ``[0, 1]``, or None for an empty split.

    Raises:
        ValueError: If there are fewer images than a batch of ``data.batch_statistics``, a batch size or the number of
            workers is out of range, or mean and std do not fit the images.
        DataError: If an image cannot be decoded.
        TypeError: If images are not uint8.
    """
    if len(split) == 0:
        return None
    right = torch.zeros((), dtype=torch.int64, device=device)
    engine, size = current(), data.batch_statistics or data.eval_batch_size
    count = scored_images(split, data)
    if count == 0:
        raise ValueError(
            f"data.batch_statistics: scores need at least one full batch of {size} images, got {len(split)} images; "
            f"lower it, or omit it to use running statistics"
        )
    places, mode = torch.arange(count), evaluating if data.batch_statistics is None else batch_statistics
    indices = torch.cat(torch.split(places, size)[engine.rank :: engine.size] or (places[:0],))
    with mode(model), torch.no_grad():
        for images, labels in iterate(split, indices, size, device, drop_last=False, workers=data.workers):
            right += (model(normalize(images, splits.mean, splits.std)).argmax(1) == labels).sum()
    return int(engine.sums({"right": right})["right"].item()) / count
