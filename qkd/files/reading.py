"""Whether this process may write: of several that train together, the first one writes for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_readers: list[bool] = []


@contextmanager
def only_reading() -> Iterator[None]:
    """Let this process write and delete no file within a block; the functions that would do so return as if they had.

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
    """Delete a file, if it is there and this process writes.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be deleted.
    """
    if may_write():
        path.unlink(missing_ok=True)
