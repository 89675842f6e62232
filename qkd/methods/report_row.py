"""A row that a method adds to the report: a net that the student learned from or with, and that is discarded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One net.

    Args:
        role: Its description for people, with its bits.
        net: A name of ``qkd ls nets``.
        test_accuracy: Fraction of the test images; None if unknown.
        teaches: Whether the student learned from it, rather than with it; these come first.
    """

    role: str
    net: str
    test_accuracy: float | None
    teaches: bool = False


def row_of(role: str, result: Mapping[str, Any], *, teaches: bool = False) -> Row:
    """Return the row of a net.

    Args:
        role: Its description.
        result: Its results, as in a ``result.json``.
        teaches: Whether the student learned from it.
    """
    bits = result.get("weight_bits")
    code = "" if bits is None else f" w{bits}a{result['act_bits']}"
    return Row(role + code, str(result.get("net", "")), result.get("test_accuracy"), teaches)
