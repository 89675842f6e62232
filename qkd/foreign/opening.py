"""Open files that a person or another file names: regular ones only, of a bounded size.

A named pipe would block whoever opens it, a device may never end; both are refused before they are opened.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST_TEXT_BYTES = 64 << 20  # the largest text of ours is the metrics or the journal of a long run: a few MB
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableFileError(OSError):
    """The path is not a regular file or not a valid file name, or the file is too large for its kind."""


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a regular file, or a link to one, with this name.

    Args:
        path: Any name.

    Returns:
        False also if the name is not valid or not accessible.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; never blocks.

    Args:
        path: The file, or a link to it.

    Returns:
        The open file, binary; the caller closes it.

    Raises:
        UnreadableFileError: If it is a named pipe, a socket or a device, or the name is not valid.
        OSError: If there is no such file, it is a folder, or it cannot be read.
    """
    try:
        _refuse_irregular(path, os.stat(path).st_mode)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a NUL in it, or half of a surrogate pair
        raise UnreadableFileError(f"{os.fspath(path)!r}: not a name that a file can have ({error})") from error
    try:
        _refuse_irregular(path, os.fstat(handle).st_mode)  # it may have been replaced in between
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | os.PathLike[str], most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file, or a link to it.
        most_bytes: A file of more bytes is refused unread.

    Returns:
        All bytes of the file.

    Raises:
        UnreadableFileError: As :func:`open_regular`, and if the file is larger.
        OSError: As :func:`open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read() if size <= most_bytes else b""
    if size > most_bytes:
        raise UnreadableFileError(
            f"{path}: has {size:,} bytes, and this kind of file has at most {most_bytes:,}; name another file"
        )
    return data


def read_text(path: str | os.PathLike[str], most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Return the text of a UTF-8 file.

    Args:
        path: The file, or a link to it.
        most_bytes: A file of more bytes is refused unread.

    Returns:
        The text, newlines unchanged.

    Raises:
        UnicodeDecodeError: If it is not UTF-8.
        UnreadableFileError: As :func:`read_regular`.
        OSError: As :func:`open_regular`.
    """
    return read_regular(path, most_bytes).decode("utf-8")


def _refuse_irregular(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(Path(path)))
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise UnreadableFileError(f"{path}: is {kind}, not a file; write its content to a file and name that")
