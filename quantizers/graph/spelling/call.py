"""One operation that a network runs, with its arguments by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantizers.graph.form.refusal import NoSpelling, RewriteError
from quantizers.graph.spelling.pen import Pen, Value


@dataclass(frozen=True)
class Call:
    """An operation and its arguments.

    Args:
        name: Its name in ATen or torch.nn.functional, without the in-place suffix.
        arguments: By name, defaults filled in; tensors that depend on the images are values.
        shapes: Shape of every tensor it returns.
    """

    name: str
    arguments: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or ``default`` if this operation has none with that name."""
        return self.arguments.get(name, default)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the first result."""
        return self.shapes[0]

    def value(self, name: str = "self") -> Value:
        """Return an argument that must depend on the images.

        Raises:
            NoSpelling: If it is a constant.
        """
        operand = self.arguments[name]
        if not isinstance(operand, Value):
            raise NoSpelling
        return operand

    def fixed(self, name: str) -> Tensor | None:
        """Return an argument that must not depend on the images, a tensor or None.

        Raises:
            NoSpelling: If it depends on them.
        """
        operand = self.arguments.get(name)
        if isinstance(operand, Value):
            raise NoSpelling(f"its {name} is computed from the images; use a constant or learned one")
        return operand


def spelled(speller: Callable[[Pen, Call], Any], pen: Pen, call: Call) -> Any:
    """Return what a speller writes for an operation that torch itself can run.

    Raises:
        NoSpelling: If it writes nothing, or cannot express the arguments; the network itself is fine.
    """
    try:
        return speller(pen, call)
    except (NoSpelling, RewriteError):
        raise
    except (ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise NoSpelling(f"its arguments cannot be expressed ({reason}); use others, or another operation") from error


def pair(given: Any) -> tuple[int, int]:
    """Return a size given as one number or as a sequence of one or two as (height, width)."""
    if isinstance(given, (tuple, list)):
        return int(given[0]), int(given[-1])
    return int(given), int(given)


def axis_of(axis: Any, rank: int) -> int:
    """Return an axis counted from the front."""
    return int(axis) % max(rank, 1)
