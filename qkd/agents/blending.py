"""Operations that mix an image with a degenerate one: colour with its grey, sharpness with its smoothed self."""

from __future__ import annotations

import torch
from torch import Tensor

_RED, _GREEN, _BLUE = 19595, 38470, 7471  # ITU-R 601-2 luma in 1/65536, as Pillow converts to grey


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
    mixed = base + factors.to(torch.float32) * (images.to(torch.float32) - base)
    return mixed.clamp_(0, 255).to(torch.uint8)


def luminance(images: Tensor) -> Tensor:
    """Return images as grey: ITU-R 601-2 luma of three channels; of any other number their mean, rounded.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.

    Returns:
        Integers 0..255, shape ``[batch, 1, height, width]``.
    """
    channels = images.shape[1]
    if channels == 1:
        return images
    if channels != 3:
        return (2 * images.sum(1, keepdim=True, dtype=torch.int32) + channels) // (2 * channels)
    red, green, blue = (images[:, channel : channel + 1].to(torch.int32) for channel in range(3))
    return (red * _RED + green * _GREEN + blue * _BLUE + 0x8000) >> 16


def recolour(images: Tensor, factors: Tensor) -> Tensor:
    """Return images with more or less colour; grey images as they are.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.
        factors: Shape ``[batch]``: 0 is grey, 1 changes nothing.
    """
    if images.shape[1] == 1:
        return images
    return blend(luminance(images), images, factors.view(-1, 1, 1, 1))


def sharpen(images: Tensor, factors: Tensor) -> Tensor:
    """Return images sharper or smoother.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.
        factors: Shape ``[batch]``: 0 is smoothed, 1 changes nothing, above 1 is sharper.
    """
    return blend(smooth(images), images, factors.view(-1, 1, 1, 1))


def smooth(images: Tensor) -> Tensor:
    """Return the mean of each 3x3 neighbourhood, its centre weighing 5 of 13, rounded; the border as it is.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.

    Returns:
        uint8, same shape: ``PIL.ImageFilter.SMOOTH``.
    """
    height, width = images.shape[-2:]
    if height < 3 or width < 3:
        return images
    values = images.to(torch.int32)
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[..., 1:-1, 1:-1]
    result = images.clone()
    result[..., 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)  # total / 13, no ties: 13 is odd
    return result
