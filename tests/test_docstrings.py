"""Docstrings are complete, say what the code does, and their examples run."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("quantizers", "export", "qkd")
MODULES = sorted(path for top in OURS for path in (ROOT / top).rglob("*.py"))
PACKAGES = [".".join(path.parent.relative_to(ROOT).parts) for path in MODULES if path.name == "__init__.py"]
# Calls of the standard library that reach for the disk: what calls them may raise OSError.
TOUCHES_DISK = {
    "iterdir", "mkdir", "open", "read_bytes", "read_text", "rename", "rglob", "rmdir", "stat", "symlink_to", "unlink",
    "write_bytes", "write_text",
}  # fmt: skip
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|References|Note|See also):$", re.MULTILINE)


def exported(wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the wanted objects that some `__all__` lists, each under the first name that it has."""
    found: dict[int, tuple[str, Any]] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            one = getattr(module, name)
            if wanted(one):
                found.setdefault(id(one), (f"{package}.{name}", one))
    return dict(found.values())


def is_function(one: Any) -> bool:
    return inspect.isfunction(inspect.unwrap(one)) if callable(one) and not inspect.isclass(one) else False


def is_class(one: Any) -> bool:
    return inspect.isclass(one) and one.__module__.split(".")[0] in OURS


FUNCTIONS = exported(is_function)
CLASSES = exported(is_class)


def sections(text: str) -> dict[str, str]:
    """Return the sections of a docstring in Google's style, by title."""
    parts = SECTION.split(inspect.cleandoc(text))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section: str) -> list[str]:
    """Return the names before the colons of a section: `a, b: Text` names two."""
    found: list[str] = []
    for names in re.findall(r"^ {4}([\w.*`]+(?:, [\w.*`]+)*)(?: \([^)]*\))?:", section, re.MULTILINE):
        found += [name.strip("*`") for name in names.split(", ")]
    return found


class Errors:
    """Which errors leave a function, read from its code and from that of the functions of ours that it calls."""

    def __init__(self) -> None:
        self._known: dict[Any, frozenset[type[BaseException]]] = {}

    def of(self, function: Any) -> frozenset[type[BaseException]]:
        function = inspect.unwrap(function)
        if function not in self._known:
            self._known[function] = frozenset()  # a circle adds nothing
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            names = {**vars(builtins), **function.__globals__}
            self._known[function] = frozenset(self._walk(tree.body[0].body, names))  # type: ignore[attr-defined]
        return self._known[function]

    def _walk(self, nodes: list[Any], names: dict[str, Any]) -> set[type[BaseException]]:
        found: set[type[BaseException]] = set()
        for node in nodes:
            if isinstance(node, ast.Try):
                caught = tuple(error for handler in node.handlers for error in self._caught(handler, names))
                found |= {error for error in self._walk(node.body, names) if not issubclass(error, caught)}
                found |= self._walk([*node.handlers, *node.orelse, *node.finalbody], names)
                continue
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                continue  # raises when it is called, not here
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                module = importlib.import_module(node.module or "")
                names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
            if isinstance(node, ast.Raise) and node.exc is not None:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                error = value_of(raised, names)
                if inspect.isclass(error) and issubclass(error, BaseException):
                    found.add(error)
            if isinstance(node, ast.Call):
                found |= self._called(node, names)
            found |= self._walk(list(ast.iter_child_nodes(node)), names)
        return found

    def _called(self, node: ast.Call, names: dict[str, Any]) -> frozenset[type[BaseException]]:
        called = value_of(node.func, names)
        if called is builtins.open or (called is None and getattr(node.func, "attr", "") in TOUCHES_DISK):
            return frozenset({OSError})
        if is_class(called) and not issubclass(called, BaseException):
            made = [getattr(called, name, None) for name in ("__init__", "__post_init__")]
            return frozenset(error for one in made if inspect.isfunction(one) and ours(one) for error in self.of(one))
        return self.of(called) if is_function(called) and ours(called) else frozenset()

    @staticmethod
    def _caught(handler: ast.ExceptHandler, names: dict[str, Any]) -> Iterator[type[BaseException]]:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        for kind in kinds:
            value = value_of(kind, names)
            yield from value if isinstance(value, tuple) else [value] if inspect.isclass(value) else []


def ours(function: Any) -> bool:
    return str(function.__module__).split(".")[0] in OURS


def value_of(node: Any, names: dict[str, Any]) -> Any:
    """Return what a name or a dotted name stands for, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = value_of(node.value, names)
        return getattr(owner, node.attr, None) if inspect.ismodule(owner) or inspect.isclass(owner) else None
    return None


ERRORS = Errors()
