"""Keep the public names of rooms that have moved, for a release: each use of one warns and says where it is now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(old: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds what was its own in the modules where it is now.

    Args:
        old: Dotted name of the module.
        places: Public name -> dotted name of the module that has it.

    Returns:
        A function that returns a name's value, with a DeprecationWarning, and raises AttributeError for any other name.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        text = f"{old}.{name} is {places[name]}.{name} now; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(places[name]), name)

    return find
