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


def arithmetic_note(version: str | None, cpu_flags: Collection[str]) -> str:
    """Return what an onnxruntime computes wrongly on a processor; empty if nothing is known.

    Args:
        version: As ``onnxruntime.__version__``; None if unknown.
        cpu_flags: The processor's instruction sets, by Linux's names.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None or AMX not in cpu_flags:
        return ""
    low, high = AMX_FAULTY
    if not low <= (int(numbers[1]), int(numbers[2])) < high:
        return ""
    advice = f"use {version_text(high)} or later, or one before {version_text(low)}"
    return (
        f"onnxruntime {version} multiplies 8-bit integers wrongly with AMX in layers whose number of output channels "
        f"is not a multiple of 16 (its issue 26324); {advice}"
    )
