"""CutMix: paste a box of the next image into each image, and return its share of the label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qkd.agents.operations.counting import FloatArray, SampleDraws, Use
from qkd.agents.operations.rows import to_device


@dataclass(frozen=True)
class Mixed:
    """The second label of each image of a batch.

    Args:
        labels: Of the images that the boxes come from, int64, shape ``[batch]``.
        share: Area of the box as a fraction of the image, 0 where nothing was pasted, float32, shape ``[batch]``.
    """

    labels: Tensor
    share: Tensor

    def first(self, count: int) -> Mixed:
        """Return the second labels of the first ``count`` images."""
        return Mixed(self.labels[:count], self.share[:count])

    def rows(self, part: slice) -> Mixed:
        """Return the second labels of some of the images."""
        return Mixed(self.labels[part], self.share[part])

    def main(self, labels: Tensor) -> Tensor:
        """Return the label of each image's larger part, ``[batch]``; ``labels`` are the images' own."""
        return torch.where(self.share > 0.5, self.labels, labels)


def mix_boxes(images: Tensor, labels: Tensor, draws: SampleDraws, probability: float) -> tuple[Tensor, Mixed]:
    r"""Return images with a box of the next image in each, and the labels that go with it; the last one's is the first.

    The box covers :math:`1 - \lambda` of the image before it is clipped at the border, :math:`\lambda \sim U(0, 1)`,
    its center is uniform, its sides are those of the image times :math:`\sqrt{1 - \lambda}`; ``share`` is the area
    after clipping.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``, augmented already; untouched.
        labels: int64, shape ``[batch]``.
        draws: Of these images: which are mixed, and their boxes.
        probability: That an image is mixed.

    Returns:
        The images, same shape and device, and their second labels.

    References:
        Yun et al., `CutMix <https://arxiv.org/abs/1905.04899>`_, 2019, section 3.1 with :math:`\alpha = 1`.

    Note:
        Published: one box for the whole batch, pasted from a random permutation. Here every image draws for itself,
        and the box comes from the next image (epochs are shuffled). For that to be the next one of the epoch for
        any batch size, also pass the first image of the next batch, and drop the last result.
    """
    height, width = images.shape[-2:]
    drawn = draws.uniform(Use.MIX, 4)
    boxes = _boxes(drawn[:, 1:], height, width)
    boxes[drawn[:, 0] >= probability] = 0
    top, bottom, left, right = (to_device(boxes[:, place], images.device).view(-1, 1) for place in range(4))
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    is_pasted = (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)
    share = ((bottom - top) * (right - left)).view(-1).to(torch.float32) / (height * width)
    return torch.where(is_pasted, images.roll(-1, 0), images), Mixed(labels.roll(-1, 0), share)


def _boxes(drawn: FloatArray, height: int, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return top, bottom, left and right (exclusive) of each box, ``[batch, 4]``, from three uniform numbers each."""
    side = np.sqrt(drawn[:, 0])
    edges = []
    for size, place in ((height, drawn[:, 1]), (width, drawn[:, 2])):
        length, center = (size * side).astype(np.int64), (size * place).astype(np.int64)
        edges += [np.clip(center - length // 2, 0, size), np.clip(center - length // 2 + length, 0, size)]
    return np.stack(edges, 1)
