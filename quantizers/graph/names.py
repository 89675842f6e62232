"""Module paths of a network that are valid in a student."""

from __future__ import annotations

import functools
import keyword

from torch import fx, nn

from quantizers.student import Student


@functools.cache
def _taken() -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that are taken in a student, and in any module within it."""
    student = Student(nn.Module(), _empty_graph())
    return frozenset(dir(student)) | {"_code", "graph", "meta"}, frozenset(dir(nn.Module()))


def _empty_graph() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    return graph


def safe_path(path: str) -> str:
    """Return a module path with an underscore after every name that is taken (``graph``, ``class``)."""
    outer, inner = _taken()
    parts = path.split(".")
    return ".".join(
        f"{part}_" if keyword.iskeyword(part) or part in (inner if depth else outer) else part
        for depth, part in enumerate(parts)
    )
