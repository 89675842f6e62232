"""Subpackages that are also functions: ``qkd.run(config)`` runs, ``qkd.run.folder`` is a module.

A module is called through its class, so each of these gets a class that calls the function of its name.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Callable(ModuleType):
    """A subpackage that can be called as the function of its name in :mod:`qkd.api`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function."""
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module("qkd.api"), name)(*args, **options)


def callable_room(name: str) -> None:
    """Let a module be called as the function of its name.

    Args:
        name: Dotted, of a module that is being imported.
    """
    sys.modules[name].__class__ = _Callable


if TYPE_CHECKING:
    from qkd.api.distilling import distill
    from qkd.api.running import run
else:

    def __getattr__(name: str) -> Any:
        if name in ("distill", "run"):
            return importlib.import_module(f"qkd.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["callable_room", "distill", "run"]
