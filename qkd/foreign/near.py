"""Names that a person may have meant: the one place where an unknown name is compared with known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_NAME = 64  # characters; longer ones are like nothing, and comparing them takes the square of it


def nearest(name: str, known: Iterable[str], most: int = 1, *, cutoff: float = 0.6) -> list[str]:
    """Return the known names that are spelled most like a name, the likeliest first; capitals make no difference.

    Args:
        name: What was written.
        known: The names there are.
        most: How many at most, positive.
        cutoff: How alike they must be, 0..1 (as difflib counts it).

    Returns:
        At most ``most`` names; none for a name of more than 64 characters.
    """
    if len(name) > LONGEST_NAME:
        return []
    lowered = {one.lower(): one for one in known}
    return [lowered[one] for one in difflib.get_close_matches(name.lower(), lowered, n=most, cutoff=cutoff)]
