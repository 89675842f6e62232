"""Temporary folders whose errors say that they are full."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOM_BYTES = 1 << 20  # what is written to see whether a folder has room, unless the caller knows what it needs
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def scratch_folder(prefix: str = "qkd-", room: int = ROOM_BYTES) -> Iterator[Path]:
    """Yield a new temporary folder, which is removed at the end.

    Libraries and compilers that cannot write to it report that in words of their own ("serialization failed"), as if
    the model were at fault. So if anything fails inside, the folder's room is looked at first.

    Args:
        prefix: How the folder's name begins.
        room: Bytes that the largest file in it needs.

    Yields:
        The folder.

    Raises:
        OSError: If something failed inside, and the folder is full; it names the folder, and the way out.
    """
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        try:
            yield Path(name)
        except Exception as error:
            full = _errno_of_writing(Path(name), room)
            if full is None:
                raise
            words = f"{os.strerror(full)}: free some space there, or set TMPDIR to a folder that has room"
            raise OSError(full, words, name) from error


def _errno_of_writing(folder: Path, room: int) -> int | None:
    """Return why that many bytes cannot be written to a folder, or None."""
    try:
        (folder / "room").write_bytes(bytes(room))
    except OSError as error:
        return error.errno if error.errno in FULL else None
    return None
