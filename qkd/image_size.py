"""Sizes of images as configs, nets and files write them: a side, or height and width."""

from __future__ import annotations

from typing import TypeAlias

ImageSize: TypeAlias = "int | tuple[int, int]"
"""In pixels: the side of square images, or ``(height, width)`` of others."""


def height_width(size: ImageSize) -> tuple[int, int]:
    """Return height and width in pixels.

    Example:
        >>> height_width(32), height_width((24, 32))
        ((32, 32), (24, 32))
    """
    return (size, size) if isinstance(size, int) else size


def image_size_of(height: int, width: int) -> ImageSize:
    """Return a size as people write it: one number if it is square."""
    return height if height == width else (height, width)


def size_text(size: ImageSize) -> str:
    """Return a size in words, ``height x width`` in pixels.

    Example:
        >>> size_text(32), size_text((24, 32))
        ('32x32', '24x32')
    """
    return "x".join(map(str, height_width(size)))


def parsed_size(text: str) -> ImageSize:
    """Return the image size in a file's header: ``32`` or ``24x32``.

    Raises:
        ValueError: If it is neither.
    """
    sides = [int(side) for side in text.split("x")]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"an image size must be a side or HEIGHTxWIDTH in pixels, got {text!r}")
    return sides[0] if len(sides) == 1 else image_size_of(*sides)


def side_of_square(size: ImageSize, taker: str) -> int:
    """Return the side of square images.

    Raises:
        ValueError: If they are not square; ``taker`` is what needs them to be.
    """
    height, width = height_width(size)
    if height != width:
        raise ValueError(f"{taker} takes square images, got {height}x{width}; set data.image_size to one number")
    return height
