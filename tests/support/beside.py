"""Loads a file of tests by its path: with --import-mode=importlib, tests do not see each other."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def load(path: Path) -> Any:
    """Return a module, or a package by its folder, the same one for each caller of a process.

    Its name is its path below the folder of tests, so that two files of one name are two modules.
    """
    file = path / "__init__.py" if path.is_dir() else path
    name = "_".join(("beside", *path.relative_to(Path(__file__).parents[1]).with_suffix("").parts))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
