"""User code that a config names: found, read without running it, and imported when requested."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from qkd.foreign.near import nearest
from qkd.foreign.opening import read_text

MOST_SOURCES = 200  # files that one file imports from its folder; more are a project, which should be a package


def is_place(name: str) -> bool:
    """Return whether a name refers to code: ``path/to/file.py:name`` or ``package.module:name``."""
    return ":" in name


def file_of(place: str) -> Path | None:
    """Return the file of ``path/to/file.py:name``; None for ``package.module:name``."""
    module = place.rpartition(":")[0]
    return Path(module).expanduser() if module.endswith(".py") else None


def source_of(place: str) -> Path | None:
    """Return the source file of a place without running it; None if there is none."""
    file = file_of(place)
    if file is not None:
        return file if file.is_file() else None
    with _importable(Path.cwd()):
        try:
            spec = importlib.util.find_spec(place.rpartition(":")[0])
        except (ImportError, ValueError):  # a parent is missing, or the name is none
            return None
    found = None if spec is None or spec.origin is None else Path(spec.origin)
    return found if found is not None and found.is_file() else None


def place_fault(place: str) -> str:
    """Return what is wrong with a place, judging by its source without running it; empty if nothing is.

    Args:
        place: ``path/to/file.py:name`` or ``package.module:name``.
    """
    module, _, name = place.rpartition(":")
    source = source_of(place)
    if source is None:
        return f"no such file: {module}" if file_of(place) is not None else f"no module {module!r} can be imported here"
    if not name.isidentifier():
        return f"needs the name of a function or class behind the colon, got {name!r}"
    if source.suffix != ".py":
        return ""
    try:
        names = set(_top_level(ast.parse(read_text(source), str(source))))
    except OSError as error:
        return f"{source} cannot be read: {error}"
    except (SyntaxError, ValueError) as error:
        return f"{source} is not Python that this version can parse: {error}"
    if name in names or "*" in names:
        return ""
    near = nearest(name, sorted(names))
    return f"{source} has no `{name}`; " + (f"did you mean `{near[0]}`?" if near else f"it has {_some(names)}")


def load_place(place: str) -> Any:
    """Import the object that a place names.

    A file's own folder can be imported from while it is read; what it takes from there is its own, so that two files
    with a ``layers.py`` beside them do not meet. For a module the current folder counts, too.

    Args:
        place: ``path/to/file.py:name`` or ``package.module:name``.

    Raises:
        ImportError, AttributeError: If there is no such file, module or name.
        Exception: Whatever the code raises.
    """
    module, _, name = place.rpartition(":")
    file = file_of(place)
    if file is not None:
        return getattr(_file_module(file), name)
    with _importable(Path.cwd()):
        return getattr(importlib.import_module(module), name)


@contextmanager
def imports_beside(place: str) -> Iterator[None]:
    """Let code import from the folder of its file within a block: what it imports only when it is called."""
    file = file_of(place)
    if file is None:
        yield
        return
    with _apart(file.resolve().parent):
        yield


def sources_of(file: Path) -> dict[str, Path]:
    """Return a Python file and what it imports from its folder: path relative to the folder -> file.

    Args:
        file: Which; its imports are read, not run.

    Raises:
        ValueError: If it is not Python, or imports more than 200 files from there.
        OSError: If a file cannot be read.
    """
    folder, found, waiting = file.resolve().parent, dict[str, Path](), [file.resolve()]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(folder).as_posix()
        if name in found:
            continue
        found[name] = path
        if len(found) > MOST_SOURCES:
            raise ValueError(f"{file}: imports more than {MOST_SOURCES} files from its folder; make them a package")
        try:
            tree = ast.parse(read_text(path), str(path))
        except SyntaxError as error:
            raise ValueError(f"{path} is not Python that this version can parse: {error}") from error
        for module in _imported(tree):
            waiting += _beside(folder, module)
    return dict(sorted(found.items()))


def code_hash(file: Path) -> str:
    """Return the SHA-256 of a Python file and all that it imports from its folder, by name and content."""
    digest = hashlib.sha256()
    for name, path in sources_of(file).items():
        digest.update(f"{name}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _file_module(path: Path) -> ModuleType:
    """Import a file that no package holds, once for each content."""
    path = path.resolve()
    if not path.is_file():
        raise ImportError(f"{path}: no such file")
    name = f"qkd_file_{path.stem}_{code_hash(path)[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _apart(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _apart(folder: Path) -> Iterator[None]:
    """Make a folder importable; modules that were imported from it are forgotten, but for whoever holds them."""
    before = set(sys.modules)
    with _importable(folder):
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                file = getattr(sys.modules[name], "__file__", None)
                if file is not None and not name.startswith("qkd_file_") and folder in Path(file).parents:
                    del sys.modules[name]


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):  # within a package beside the file
            yield from ()


def _beside(folder: Path, module: str) -> list[Path]:
    """Return the files of a module in a folder: its own, or all of its package's."""
    first = folder / module.split(".")[0]
    if first.with_suffix(".py").is_file():
        return [first.with_suffix(".py")]
    if not first.is_dir() or not any(first.glob("*.py")):
        return []
    return [path for path in sorted(first.rglob("*.py")) if not os.path.islink(path)]


def _top_level(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module binds at its top, also within ``if`` and ``try``, but not within functions."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            yield from (name for one in ast.walk(node) if isinstance(one, ast.Global) for name in one.names)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            waiting += ast.iter_child_nodes(node)


def _some(names: set[str]) -> str:
    shown = sorted(name for name in names if not name.startswith("_"))
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "") if shown else "no names at all"
