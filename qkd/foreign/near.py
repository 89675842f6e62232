"""Suggestions for unknown names: the one place where an unknown name is compared with known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_NAME = 64  # characters; longer names resemble nothing, and the comparison takes quadratic time


def nearest(name: str, known: Iterable[str], most: int = 1, *, cutoff: float = 0.6) -> list[str]:
    """Return the known names that are closest to a name, the likeliest first, ignoring case.

    Args:
        name: What was written.
        known: The known names.
        most: How many at most, positive.
        cutoff: Minimum similarity, 0..1 (difflib's ratio).

    Returns:
        At most ``most`` names; none for a name of more than 64 characters.
    """
    if len(name) > LONGEST_NAME:
        return []
    lowered = {one.lower(): one for one in known}
    return [lowered[one] for one in difflib.get_close_matches(name.lower(), lowered, n=most, cutoff=cutoff)]
