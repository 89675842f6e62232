"""Finds the line of the network's own code that is running."""

from __future__ import annotations

import os
import sys

import torch

_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)


def user_site() -> str:
    """Return ``file.py:line`` of the innermost frame outside torch and this package, or an empty string."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED) and not name.startswith("<"):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
