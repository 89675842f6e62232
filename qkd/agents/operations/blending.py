"""Operations that mix an image with a degenerate one: its mean gray, its gray, or its smoothed self."""

from __future__ import annotations

import torch
from torch import Tensor

# ITU-R 601-2 luma in 1/65536, as Pillow converts to gray. Sums stay below 2 ** 24, so float32 holds them exactly.
_RED, _GREEN, _BLUE, _HALF = 19595.0, 38470.0, 7471.0, 32768.0


def blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    r"""Return :math:`d + f (x - d)`, cut to 0..255 and rounded down: ``PIL.Image.blend`` in float32.

    Args:
        degenerate: What factor 0 gives, 0..255.
        images: What factor 1 gives, 0..255.
        factors: Broadcastable to both.

    Returns:
        uint8, the broadcast shape.
    """
    base = degenerate.to(torch.float32)
    mixed = (images.to(torch.float32) - base).mul_(factors.to(torch.float32)).add_(base)
    return mixed.clamp_(0, 255).to(torch.uint8)


def luminance(images: Tensor) -> Tensor:
    """Return images as gray: ITU-R 601-2 luma of three channels; of any other number their mean, rounded.

    Args:
        images: uint8, or float32 of whole numbers 0..255, shape ``[batch, channels, height, width]``.

    Returns:
        Whole numbers 0..255, float32, shape ``[batch, 1, height, width]``.
    """
    channels = images.shape[1]
    if channels == 1:
        return images.to(torch.float32)
    if channels != 3:
        return images.sum(1, keepdim=True, dtype=torch.float32).div_(channels).add_(0.5).floor_()
    red, green, blue = (images[:, channel : channel + 1].to(torch.float32) for channel in range(3))
    total = (red * _RED).add_(green, alpha=_GREEN).add_(blue, alpha=_BLUE)
    return total.add_(_HALF).mul_(1 / 65536).floor_()


def mean_gray(light: Tensor) -> Tensor:
    """Return the mean of each gray image, rounded half up.

    Args:
        light: Whole numbers, shape ``[batch, 1, height, width]``.

    Returns:
        Whole numbers, float32, shape ``[batch, 1, 1, 1]``.
    """
    count = light[0].numel() if len(light) else 1
    total = light.sum((1, 2, 3), keepdim=True, dtype=torch.float64)  # whole numbers: exact in any order
    return total.mul_(2).add_(count).div_(2 * count).floor_().to(torch.float32)


def smooth(images: Tensor, out: Tensor) -> None:
    """Write the mean of each 3x3 neighborhood, its center weighing 5 of 13, rounded; the border does not change.

    Args:
        images: Whole numbers 0..255, float32, shape ``[batch, channels, height, width]``.
        out: Same shape and type; what ``PIL.ImageFilter.SMOOTH`` makes.
    """
    height, width = images.shape[-2:]
    out.copy_(images)
    if height < 3 or width < 3:
        return
    rows = (images[..., :-2, :] + images[..., 1:-1, :]).add_(images[..., 2:, :])
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(images[..., 1:-1, 1:-1], alpha=4)
    out[..., 1:-1, 1:-1] = total.mul_(1 / 13).add_(0.5).floor_()  # no ties, and none near: 13 is odd
