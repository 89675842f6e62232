"""Import a package's exports on first use, so that reading a table does not load PyTorch."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.moved import OLD_NAMES, by_old_spelling


def on_demand(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose exports are under ``if TYPE_CHECKING`` (PEP 562).

    The list of imports is read from the package's own ``__init__.py``, so that there is only one list: people, editors
    and type checkers read it as imports; this function reads where each name comes from.

    Args:
        package: Its ``__name__``.

    Returns:
        A function that imports and returns an export, and one that lists them.
    """

    @functools.cache
    def homes() -> dict[str, tuple[str, str]]:
        tree = ast.parse(Path(str(sys.modules[package].__file__)).read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        return {
            alias.asname or alias.name: (node.module, alias.name)
            for node in imports
            if node.module and node.module.startswith(f"{package}.")
            for alias in node.names
        }

    def get(name: str) -> Any:
        if (name.startswith("__") and name != "__version__") or name not in homes():
            if name in OLD_NAMES.get(package, {}):
                return by_old_spelling(package)(name)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = homes()[name]
        value = getattr(importlib.import_module(module), original)
        setattr(sys.modules[package], name, value)  # looked up only once
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *homes()})
