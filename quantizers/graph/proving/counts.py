"""Finds the numbers of images at which a network may become another function: those that its code asks about.

Recordings use two and three images, where ``if x.size(0) > 4`` takes the same branch. So the network also runs with
sizes that note what they are compared with and divided by. Its function can change only at the numbers of images that
follow from those; running it with each of them, and with their neighbors, shows whether it does. The ``USUAL``
numbers of images are always tried, and in small networks ``UNTRACKED`` ones where code takes a size that cannot note
anything: with ``len``, or to look it up in a set or dictionary. Sizes that pass through NumPy or tensors are not
noticed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

USUAL = (8, 33)
UNTRACKED = (64, 65, 128, 129, 256, 257)  # batch sizes that people write, and one more
MOST_VOLUME = 5e7  # values within the network in one of these runs; prepare would otherwise take ten times as long
_NBYTES = Tensor.nbytes.__get__  # type: ignore[attr-defined]
MOST_IMAGES = 2**16  # a condition on a larger batch has some other purpose


class SizesOfBatch(TorchFunctionMode):
    """Hands out the sizes of tensors as :class:`Size` where they depend on the number of images.

    Args:
        images: How many images the network gets while this is active.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images, self._noted, self.is_untracked = images, set[float](), False
        self.volume = 0  # values that the operations made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.volume += result.numel()
        tensor = args[0] if args else None
        if type(result) not in (int, torch.Size) or not isinstance(tensor, Tensor) or tensor.dim() == 0:
            return result
        if int(tensor.shape[0]) != self.images:
            return result
        name = getattr(func, "__name__", "")
        self.is_untracked |= name == "__len__"  # Python makes a plain number of whatever it returns
        if isinstance(result, torch.Size):
            return torch.Size((Size(result[0], 1.0, self), *result[1:])) if len(result) == tensor.dim() else result
        axis = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
        if name in ("numel", "nelement") or func == _NBYTES or (name == "size" and axis in (0, -tensor.dim())):
            return Size(result, result / self.images, self)
        return result

    def note(self, *counts: float) -> None:
        """Note numbers of images at which something may change."""
        self._noted.update(count for count in counts if 0 < count <= MOST_IMAGES)

    @property
    def candidates(self) -> list[int]:
        """Return the numbers of images to try, in order: those noted and their neighbors."""
        ends = {end for count in self._noted for end in (math.floor(count), math.ceil(count))}
        return sorted({end + step for end in ends for step in (-1, 0, 1)} - {-1, 0})


class Size(int):
    """A size that grows with the number of images, and notes at which number a decision on it would change.

    Args:
        value: The size.
        slope: What each image adds to it.
        batch: Records the numbers of images.
        exact: The size before it was rounded down, if different.
    """

    slope: float
    batch: SizesOfBatch
    exact: float

    def __new__(cls, value: int, slope: float, batch: SizesOfBatch, exact: float | None = None) -> Size:
        """Return the number, with its dependencies."""
        made = super().__new__(cls, value)
        made.slope, made.batch, made.exact = slope, batch, value if exact is None else exact
        return made

    def __hash__(self) -> int:
        """Return the number's hash; what it is then compared with, if anything, is unknown."""
        self.batch.is_untracked |= self.slope != 0
        return int.__hash__(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copy and pickle as the plain number, wherever it is held."""
        return int, (int(self),)

    def __neg__(self) -> Size:
        return Size(-int(self), -self.slope, self.batch, -self.exact)


def _slope(number: Any) -> float:
    return number.slope if isinstance(number, Size) else 0.0


def _plain(number: Any) -> Any:
    return int(number) if isinstance(number, Size) else number


def _exact(number: Any) -> Any:
    return number.exact if isinstance(number, Size) else number


def _comparison(function: Callable[[Any, Any], Any]) -> Callable[[Size, Any], Any]:
    """Return a comparison that notes the number of images at which both sides are equal."""

    def compare(self: Size, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        slope = self.slope - _slope(other)
        if slope and math.isfinite(other):
            steps = (0, 1) if abs(slope) < 1 else (0,)  # a size that was rounded down is equal for a while
            self.batch.note(*(self.batch.images + (_exact(other) + step - self.exact) / slope for step in steps))
        return function(int(self), _plain(other))

    return compare


def _arithmetic(
    function: Callable[[Any, Any], Any], slope: Callable[[Any, Any], float], *, swapped: bool, divides: bool
) -> Callable[[Size, Any], Any]:
    """Return an operation whose result is still tracked if it is an integer; a divisor is noted."""

    def compute(self: Size, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        first, second = (other, self) if swapped else (self, other)
        if divides and not swapped and self.slope:
            self.batch.note(abs(_plain(other) / self.slope))
        result = function(_plain(first), _plain(second))
        if type(result) is not int:
            return result
        exact = (operator.truediv if function is operator.floordiv else function)(_exact(first), _exact(second))
        return Size(result, slope(first, second), self.batch, exact)

    return compute


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Size, f"__{_name}__", _comparison(getattr(operator, _name)))
for _name, _of, _divides in (
    ("add", lambda a, b: _slope(a) + _slope(b), False),
    ("sub", lambda a, b: _slope(a) - _slope(b), False),
    ("mul", lambda a, b: _slope(a) * _plain(b) + _plain(a) * _slope(b), False),
    ("truediv", lambda _a, _b: 0.0, True),
    ("floordiv", lambda a, b: _slope(a) / _plain(b), True),
    ("mod", lambda _a, _b: 0.0, True),
):
    for _prefix in ("", "r"):
        _made = _arithmetic(getattr(operator, _name), _of, swapped=_prefix == "r", divides=_divides)
        setattr(Size, f"__{_prefix}{_name}__", _made)
