"""Cut-out: a square of an image replaced by the data set's mean."""

from __future__ import annotations

import torch
from torch import Tensor


def cut_out(images: Tensor, sides: Tensor, centre_x: Tensor, centre_y: Tensor, fill: Tensor) -> Tensor:
    """Return images with a square each set to ``fill``; what lies beyond the border is clipped.

    The square covers columns ``centre - side // 2`` to ``centre - side // 2 + side - 1``, and rows likewise.

    Args:
        images: Shape ``[batch, channels, height, width]``.
        sides: Of the squares in pixels, int64, shape ``[batch]``; 0 cuts nothing.
        centre_x: Column, int64, shape ``[batch]``.
        centre_y: Row, int64, shape ``[batch]``.
        fill: Per channel, shape ``[channels]``.
    """
    height, width = images.shape[-2:]
    in_columns = _covered(width, sides, centre_x)
    in_rows = _covered(height, sides, centre_y)
    is_cut = in_rows.unsqueeze(2) & in_columns.unsqueeze(1)
    return torch.where(is_cut.unsqueeze(1), fill.view(1, -1, 1, 1), images)


def _covered(length: int, sides: Tensor, centres: Tensor) -> Tensor:
    positions = torch.arange(length, device=sides.device)
    first = (centres - sides // 2).unsqueeze(1)
    return (positions >= first) & (positions < first + sides.unsqueeze(1))
