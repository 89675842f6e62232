"""Values among the arguments: numbers, lists of epochs or CPUs, files to write; argparse words what is wrong."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from qkd.files.user_paths import user_path
from qkd.foreign.shown import shown_line

MOST_DIGITS = 9  # of a whole number among the arguments
CPU, MOST_CPUS = "[0-9]{1,4}", 8192  # index of a CPU; Linux supports at most this many


def whole(text: str) -> int:
    """Return a whole number of a bounded number of digits; its own range is checked where it is used."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdecimal() or len(digits) > MOST_DIGITS:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at most {MOST_DIGITS} digits, got {shown_line(repr(text), 40)}"
        )
    return int(text)


def positive(text: str) -> int:
    """Return a positive whole number."""
    if text.startswith("-") or whole(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def finite(text: str) -> float:
    """Return a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {shown_line(repr(text), 40)}")
    return value


def epochs(text: str) -> tuple[int, ...]:
    """Return the epochs of a list such as ``0,10,20``."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) <= MOST_DIGITS for part in parts):
        raise argparse.ArgumentTypeError(f"must be epochs such as 0,10,20, got {shown_line(repr(text), 40)}")
    return tuple(int(part) for part in parts)


def cpus(text: str) -> tuple[int, ...]:
    """Return the numbers of a list of CPUs such as ``0,1`` or ``4-7``."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not re.fullmatch(CPU, first) or (dash and not re.fullmatch(CPU, last)):
            raise argparse.ArgumentTypeError(
                f"must be numbers of CPUs such as 0,1 or 4-7, got {shown_line(repr(text), 40)}"
            )
        found += range(int(first), int(last if dash else first) + 1)
        if len(found) > MOST_CPUS:
            raise argparse.ArgumentTypeError(f"names more than {MOST_CPUS} CPUs")
    return tuple(found)


def output_file(*endings: str, in_new_folder: bool = False) -> Callable[[str], Path]:
    """Return the type of an argument that names a file to write.

    Checked before anything is computed: the folder exists, the ending fits, and no file of a run would be replaced.

    Args:
        endings: Allowed ones, such as ``.png``; any if none is given.
        in_new_folder: Whether the folder need not exist.
    """

    def path_of(text: str) -> Path:
        from qkd.run.target import run_of

        path = user_path(text)
        if endings and path.suffix not in endings:
            raise argparse.ArgumentTypeError(f"must end in {' or '.join(endings)}, got {shown_line(text, 200)}")
        if path.is_dir() or not (in_new_folder or path.parent.is_dir()):
            raise argparse.ArgumentTypeError(
                f"needs the name of a file in an existing folder, got {shown_line(text, 200)}"
            )
        if (run := run_of(path)) is not None:
            raise argparse.ArgumentTypeError(
                f"{shown_line(text, 200)} would be among the files of the run {run}; choose a place outside of it"
            )
        return path

    return path_of
