"""The published operation spaces: their operations, and the meaning of the levels.

Note: translations in pixels are published for images of 32x32 and larger. PBA's scale with the side
(`qkd.agents.policies.magnitudes`); TrivialAugment's 32 pixels shrink with sides below 32, so that an 8x8 digit stays
in its frame just like a 32x32 image. RandAugment's are published as a fraction of the side.

References:
    PBA: Ho et al., arXiv 1905.05393, as the role-kd release (arXiv 2004.08861) uses it. RandAugment (Cubuk et al.,
    arXiv 1909.13719) and TrivialAugment "wide" (Müller and Hutter, arXiv 2103.10158): the operations and ranges that
    torchvision documents for ``v2.RandAugment`` and ``v2.TrivialAugmentWide``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qkd.agents.policies import magnitudes
from qkd.agents.policies.policy import LEVELS, PBA_OPERATIONS

GEOMETRIC = ("Rotate", "TranslateX", "TranslateY", "ShearX", "ShearY")
ENHANCING = ("Brightness", "Color", "Contrast", "Sharpness")
BINS = 31  # levels of RandAugment and TrivialAugment
WIDE_PIXELS = 32  # TrivialAugment's largest translation
TORCHVISION_OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)


@dataclass(frozen=True)
class Space:
    """Operations and the meaning of their levels.

    Args:
        name: Shown in messages.
        operations: Operations to draw from, names in ``PBA_OPERATIONS`` or ``Identity``.
        levels: Number of levels, which start at 0.
        meaning: ``(operation, level, sign, side)`` -> degrees counterclockwise, pixels, pixels per pixel, factor, bits
            kept, threshold, or side in pixels. ``side`` is that of the image along the operation's direction.
    """

    name: str
    operations: tuple[str, ...]
    levels: int
    meaning: Callable[[str, int, int, int], float]


def _pba(name: str, level: int, sign: int, side: int) -> float:
    meanings: dict[str, Callable[[], float]] = {
        "Rotate": lambda: sign * magnitudes.rotate_degrees(level),
        "TranslateX": lambda: sign * magnitudes.translate_pixels(level, side),
        "TranslateY": lambda: sign * magnitudes.translate_pixels(level, side),
        "ShearX": lambda: sign * magnitudes.shear_slope(level),
        "ShearY": lambda: sign * magnitudes.shear_slope(level),
        "Posterize": lambda: magnitudes.posterize_bits(level),
        "Solarize": lambda: magnitudes.solarize_threshold(level),
        "Cutout": lambda: magnitudes.cutout_pixels(level, side),
    }
    return magnitudes.enhance_factor(level) if name in ENHANCING else meanings.get(name, lambda: 0)()


def _randaugment(name: str, level: int, sign: int, side: int) -> float:
    if name in ("TranslateX", "TranslateY"):
        return sign * int(_even(0.0, 150.0 / 331.0 * side)[level])
    if name == "Posterize":
        return _bits(level, lost=4)
    return _shared(name, level, sign, rotate=30.0, shear=0.3, enhance=0.9)


def _trivial(name: str, level: int, sign: int, side: int) -> float:
    if name in ("TranslateX", "TranslateY"):
        return sign * int(_even(0.0, float(min(WIDE_PIXELS, side)))[level])
    if name == "Posterize":
        return _bits(level, lost=6)
    return _shared(name, level, sign, rotate=135.0, shear=0.99, enhance=0.99)


def _shared(name: str, level: int, sign: int, *, rotate: float, shear: float, enhance: float) -> float:
    if name == "Rotate":
        return sign * _even(0.0, rotate)[level]
    if name in ("ShearX", "ShearY"):
        return sign * _even(0.0, shear)[level]
    if name == "Solarize":
        return 255 * _even(1.0, 0.0)[level]
    return 1.0 + sign * _even(0.0, enhance)[level]


def _bits(level: int, *, lost: int) -> int:
    return 8 - round(level * lost / (BINS - 1))


@functools.lru_cache(maxsize=32)
def _even(first: float, last: float) -> tuple[float, ...]:
    """Return the levels' values, evenly spaced, in float32 as torchvision computes them."""
    return tuple(torch.linspace(first, last, BINS).tolist())


PBA = Space("pba", PBA_OPERATIONS, LEVELS, _pba)
RANDAUGMENT = Space("randaugment", TORCHVISION_OPERATIONS, BINS, _randaugment)
TRIVIAL_WIDE = Space("trivial", TORCHVISION_OPERATIONS, BINS, _trivial)
