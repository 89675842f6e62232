"""Counter-based random numbers: a function of a key, an image's position in the data set and their use.

So they do not depend on which batch an image is in, on the other images in it, or on the device.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
_Words = npt.NDArray[np.uint64]

# SplitMix64: the step of its counter and the multipliers of its mixing function.
_STEP, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Use(IntEnum):
    """What the numbers are used for; each has its own 65,536 per image. A seed's images depend on these values."""

    FIRES = 0
    TURNS = 1
    COUNT = 2
    KINDS = 3
    LEVELS = 4
    SIGNS = 5
    CENTERS = 6
    CROP = 7
    FLIP = 8
    CUTOUT = 9
    EPOCH = 10
    MIX = 11
    PIECE = 12


class SampleDraws:
    """Draws for each image of a batch.

    Args:
        key: Names the epoch of a training, 0 to 2 ** 64 - 1.
        samples: Positions in the data set, int64, shape ``[batch]``.

    References:
        Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (the mixing function).
    """

    def __init__(self, key: int, samples: IntArray) -> None:
        start = _mix(np.array([key], dtype=np.uint64))
        self._states = _mix(start + samples.astype(np.uint64) * _STEP)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._states)

    def words(self, use: Use, count: int) -> _Words:
        """Return ``count`` numbers 0..2 ** 64 - 1 per image, shape ``[batch, count]``."""
        positions = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(int(use) << 16)
        return _mix(self._states[:, None] + positions * _STEP)

    def uniform(self, use: Use, count: int) -> FloatArray:
        """Return ``count`` numbers in [0, 1) per image, of 53 bits, shape ``[batch, count]``."""
        numbers: FloatArray = (self.words(use, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return numbers

    def integers(self, high: int, use: Use, count: int) -> IntArray:
        """Return ``count`` integers 0..high - 1 per image (``high`` up to 2 ** 32), shape ``[batch, count]``."""
        scaled = ((self.words(use, count) >> np.uint64(32)) * np.uint64(high)) >> np.uint64(32)
        numbers: IntArray = scaled.astype(np.int64)
        return numbers


def take_key(generator: torch.Generator) -> int:
    """Return a key drawn from a generator: a single draw."""
    low, high = -(2**63), 2**63 - 1
    drawn = torch.randint(low, high, (), dtype=torch.int64, generator=generator, device=generator.device)
    return int(drawn) % 2**64


def _mix(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    mixed: _Words = words ^ (words >> np.uint64(31))
    return mixed
