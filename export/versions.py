"""Versions of onnxruntime: the oldest that files and measurements need, how one is written, which compute wrongly."""

from __future__ import annotations

import re
from collections.abc import Collection

Version = tuple[int, int]
OLDEST: Version = (1, 14)


def version_text(version: Version) -> str:
    """Return a version as text: ``1.17``."""
    return ".".join(map(str, version))


AMX = "amx_int8"
AMX_FAULTY: tuple[Version, Version] = ((1, 21), (1, 25))  # from, to (measured: 1.20 and 1.25 are right)
AMX_WIDTH = 16  # layers with a multiple of so many output channels are right
_AMX_FAULT = (
    f"multiplies 8-bit integers wrongly with AMX in layers whose number of output channels is not a multiple of "
    f"{AMX_WIDTH} (its issue 26324)"
)


def arithmetic_note(version: str | None, cpu_flags: Collection[str]) -> str:
    """Return what an onnxruntime computes wrongly on a processor; empty if nothing is known.

    Args:
        version: As ``onnxruntime.__version__``; None if unknown.
        cpu_flags: The processor's instruction sets, by Linux's names.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    low, high = AMX_FAULTY
    if numbers is None or AMX not in cpu_flags or not low <= (int(numbers[1]), int(numbers[2])) < high:
        return ""
    advice = f"use {version_text(high)} or later, or one before {version_text(low)}"
    return f"onnxruntime {version} {_AMX_FAULT}; {advice}"


def range_note(oldest: Version, layers: Collection[str]) -> str:
    """Return what versions from ``oldest`` on compute wrongly on some processors; empty if none does.

    Args:
        oldest: The oldest version that must run a file.
        layers: Names of the layers concerned.
    """
    low, high = AMX_FAULTY
    if oldest >= high:
        return ""
    first, last = max(oldest, low), (high[0], high[1] - 1)
    versions = version_text(first) if first == last else f"{version_text(first)} to {version_text(last)}"
    advice = f"use {version_text(high)} or later on such a processor"
    return f"onnxruntime {versions} {_AMX_FAULT} (here {', '.join(layers)}); {advice}"
