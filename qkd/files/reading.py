"""Whether this process may write: if several train together, only the first one writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_readers: list[bool] = []


@contextmanager
def only_reading() -> Iterator[None]:
    """Keep this process from writing and deleting files within a block; functions that would do so return as if done.

    Yields:
        Nothing.
    """
    _readers.append(True)
    try:
        yield
    finally:
        _readers.pop()


def may_write() -> bool:
    """Return whether this process writes files.

    Returns:
        False within :func:`only_reading`.
    """
    return not _readers


def delete_file(path: Path) -> None:
    """Delete a file if it exists and this process writes files.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be deleted.
    """
    if may_write():
        path.unlink(missing_ok=True)
