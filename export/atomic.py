"""Atomic writes: a file is complete under its name, or what was there before is untouched."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

TEMPORARY_MARK = ".partial-"  # in the name of every unfinished file, so that leftovers of a killed process can be found


def replace_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name next to it, flush it to the disk, rename it, and flush the folder.

    The folder is flushed so that the new name survives a power cut.

    Args:
        path: The file; replaced if it exists. Its folder must exist.
        data: The content.

    Raises:
        OSError: If the disk is full or the folder cannot be written; nothing is left behind.
        ValueError: If the path is a device, a pipe or a socket, or a link to one.
    """
    _refuse_special(path)
    unfinished = path.parent / f".{path.name}{TEMPORARY_MARK}{secrets.token_hex(4)}"
    handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            _write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    _flush_folder(path.parent)


def _refuse_special(path: Path) -> None:
    """Raise if the path is a device, a pipe or a socket, which a rename would replace with a file."""
    try:
        mode, folder = os.stat(path).st_mode, path.parent.resolve()
    except (OSError, RuntimeError, ValueError):
        return  # a new file, or the write itself will report the problem
    is_file = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    # /dev/stdout is the system's own link, wherever it points
    if not is_file or folder == Path("/dev") or Path("/proc") in folder.parents:
        raise ValueError(f"{path}: is a device, a pipe or a socket, which a file would replace; name a file")


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
