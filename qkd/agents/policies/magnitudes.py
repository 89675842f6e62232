"""What the levels 0..9 mean for each operation.

Note: the published values in pixels (translations, cut-out) are for 32x32 images. On other sides they grow and shrink
in proportion, rounded down, so that level 9 does not push an 8x8 digit out of its frame; on 32x32 they are the
published ones.

References:
    The role-kd release (Fu et al., arXiv 2004.08861), which follows PBA (Ho et al., arXiv 1905.05393).
"""

from __future__ import annotations

PIXELS_FOR_SIDE = 32


def rotate_degrees(level: int) -> int:
    """Return the angle, 0..27 degrees; the sign is drawn."""
    return level * 30 // 10


def translate_pixels(level: int, side: int) -> int:
    """Return the shift in pixels of an image with this side (0..9 at 32); the sign is drawn."""
    return level * side // PIXELS_FOR_SIDE


def shear_slope(level: int) -> float:
    """Return the shear, 0..0.27 pixels per pixel; the sign is drawn."""
    return level * 0.3 / 10


def enhance_factor(level: int) -> float:
    """Return the factor of brightness, color, contrast and sharpness, 0.1..1.72; 1 changes nothing."""
    return level * 1.8 / 10 + 0.1


def posterize_bits(level: int) -> int:
    """Return how many bits of a pixel are kept, 4..1."""
    return 4 - level * 4 // 10


def solarize_threshold(level: int) -> int:
    """Return the value from which pixels are inverted, 256..26."""
    return 256 - level * 256 // 10


def cutout_pixels(level: int, side: int) -> int:
    """Return the side of the square that is cut out of an image with this side (0, 2, ..., 18 at 32)."""
    return level * 2 * side // PIXELS_FOR_SIDE
