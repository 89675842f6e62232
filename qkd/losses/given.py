"""What a loss takes as given: the teacher's side, a constant unless a gradient into it is requested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_in_graph: ContextVar[bool] = ContextVar("teacher_in_graph", default=False)


@contextmanager
def teacher_in_graph() -> Iterator[None]:
    """Let losses computed in the block pass gradients into the teacher's tensors (to learn how to teach)."""
    token = _in_graph.set(True)
    try:
        yield
    finally:
        _in_graph.reset(token)


def given(teacher: Tensor) -> Tensor:
    """Return a teacher tensor detached from its graph, or unchanged within :func:`teacher_in_graph`."""
    return teacher if _in_graph.get() else teacher.detach()
