"""Images drawn from formulas, without data or a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Shape = tuple[int, int, int]  # channels, height and width in pixels

CELLS = (4, 5, 6, 8, 11)  # number of cells along the shorter side of the image that a field is enlarged from
SHAPES = 3  # maximum per image
CURVES, POINTS = 3, 10  # maximum curves per image, and points per curve
JOINED = 0.7  # probability that a curve starts where the previous one ends
REFERENCE_SIDE = 32  # pixels; thicknesses of curves are stated for it


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return random numbers that broadcast over images, shape ``[count, 1, 1, 1]``."""
    return torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator)


def _fields(count: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return smooth random fields: several scales, contrasts and brightnesses, in color or nearly gray."""
    found = torch.empty(count, *shape)
    for place, cells in enumerate(CELLS):
        found[place :: len(CELLS)] = _enlarged(len(range(place, count, len(CELLS))), shape, cells, generator)
    found = found - found.mean((1, 2, 3), keepdim=True)
    found = found / found.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)
    gain, bias = uniform(count, 0.8, 5.0, generator), uniform(count, -1.5, 0.5, generator)
    return torch.sigmoid(gain * (found + bias))


def _windows(count: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return fields seen through soft ellipses of random position and size, on black."""
    down, across = (torch.linspace(-1, 1, side) for side in shape[1:])
    top, left = (uniform(count, -0.25, 0.25, generator) for _ in range(2))
    tall, wide = (uniform(count, 0.35, 1.0, generator) for _ in range(2))
    radius = (((down.view(-1, 1) - top) / tall).square() + ((across - left) / wide).square()).sqrt()
    return _fields(count, shape, generator) * torch.sigmoid(12 * (1 - radius))


def _shapes(count: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return flat rectangles and ellipses that occlude each other, with soft edges, on a flat or black background.

    References:
        "Dead leaves": Lee, Mumford, Huang, Occlusion Models for Natural Images, 2001.
    """
    channels, height, width = shape
    down, across = torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width)

    def color() -> Tensor:
        gray = uniform(count, 0, 1, generator)
        own = torch.rand(count, channels, 1, 1, generator=generator)
        return gray if channels == 1 else torch.where(uniform(count, 0, 1, generator) < 0.5, gray, own)

    found = color() * (uniform(count, 0, 1, generator) < 0.5).float() + torch.zeros(count, *shape)
    for place in range(SHAPES):
        tilt = uniform(count, -math.pi / 2, math.pi / 2, generator)
        y, x = (axis - uniform(count, -0.6, 0.6, generator) for axis in (down, across))
        u, v = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()
        a, b = (uniform(count, math.log(0.1), math.log(1.2), generator).exp() for _ in range(2))
        rectangle = torch.maximum(u.abs() - a, v.abs() - b)
        ellipse = (((u / a).square() + (v / b).square()).sqrt() - 1) * torch.minimum(a, b)
        outside = torch.where(uniform(count, 0, 1, generator) < 0.5, rectangle, ellipse)
        cover = torch.sigmoid(-outside / uniform(count, 0.01, 0.06, generator))
        cover = cover * ((uniform(count, 0, 1, generator) < 0.5) | (place == 0)).float()
        found = found * (1 - cover) + color() * cover
    return found


def _strokes(count: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Return a few random curves per image, of random thickness, on black, like line drawings."""
    channels, height, width = shape
    controls = torch.empty(count, CURVES, 3, 2).uniform_(0.16, 0.84, generator=generator)
    joined = torch.rand(count, CURVES - 1, 1, generator=generator) < JOINED
    for curve in range(1, CURVES):
        ends = controls[:, curve - 1, 2]
        controls[:, curve, 0] = torch.where(joined[:, curve - 1], ends, controls[:, curve, 0])
    shown = torch.arange(CURVES) < torch.randint(1, CURVES + 1, (count, 1), generator=generator)
    distance = _distances(controls, shown, height, width)
    unit = min(height, width) / REFERENCE_SIDE
    thickness, softness = uniform(count, 1.2, 3.2, generator), uniform(count, 0.5, 1.5, generator)
    ink = uniform(count, 0.5, 1.0, generator) * torch.sigmoid((thickness - distance / unit) / softness)
    return ink.expand(-1, channels, -1, -1)


# Each takes the number of images, their shape and a random generator; it returns fractions of the full range,
# shape `[count, channels, height, width]`.
KINDS: Mapping[str, Callable[[int, Shape, torch.Generator], Tensor]] = {
    "fields": _fields,
    "windows": _windows,
    "shapes": _shapes,
    "strokes": _strokes,
}


class Procedural:
    """Images of alternating kinds.

    Args:
        shape: Channels, height and width.
        kinds: Names of :data:`KINDS`.
        mean: Per channel, fractions of the full range.
        std: Likewise.
        device: The device of the images.
    """

    def __init__(
        self, shape: Shape, kinds: Sequence[str], mean: Sequence[float], std: Sequence[float], device: torch.device
    ) -> None:
        self.shape, self.kinds, self.device = shape, tuple(kinds), device
        self._mean, self._std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return normalized images, and no classes."""
        pixels = torch.empty(count, *self.shape)
        for place, kind in enumerate(self.kinds):
            some = len(range(place, count, len(self.kinds)))
            pixels[place :: len(self.kinds)] = KINDS[kind](some, self.shape, generator)
        return ((pixels - self._mean) / self._std).to(self.device), None


def _enlarged(count: int, shape: Shape, cells: int, generator: torch.Generator) -> Tensor:
    """Return random planes enlarged from a few cells; channels agree more in some images than in others."""
    channels, *sides = shape
    if count == 0:
        return torch.empty(0, *shape)
    coarse = [min(side, max(2, round(cells * side / min(sides)))) for side in sides]
    own = torch.randn(count, channels, *coarse, generator=generator)
    if channels > 1:
        gray = uniform(count, 0, 1, generator)
        own = gray.sqrt() * torch.randn(count, 1, *coarse, generator=generator) + (1 - gray).sqrt() * own
    return functional.interpolate(own, size=sides, mode="bicubic", align_corners=False)


def _distances(controls: Tensor, shown: Tensor, height: int, width: int) -> Tensor:
    """Return each pixel's distance to the nearest point of the visible curves, in pixels.

    Args:
        controls: Control points of quadratic Bezier curves, fractions of width and height, shape
            ``[count, curves, 3, 2]``.
        shown: Which curves are visible, shape ``[count, curves]``; the first one always is.
        height: In pixels.
        width: In pixels.
    """
    at = torch.linspace(0, 1, POINTS).view(1, 1, -1, 1)
    start, bend, end = (controls[:, :, None, place] for place in range(3))
    points = (1 - at).square() * start + 2 * at * (1 - at) * bend + at.square() * end
    across = (points[..., 0] * width).flatten(1)
    down = (points[..., 1] * height).flatten(1)
    hidden = (~shown).repeat_interleave(POINTS, 1)
    nearest = torch.full((len(controls), height, width), torch.inf)
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for point in range(across.shape[1]):
        vertical = (rows - down[:, point, None]).square()[:, :, None]
        horizontal = (columns - across[:, point, None]).square()[:, None, :]
        nearest = torch.minimum(nearest, (vertical + horizontal).masked_fill(hidden[:, point, None, None], torch.inf))
    return nearest.sqrt()[:, None]
