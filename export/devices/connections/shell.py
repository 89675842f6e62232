"""What a remote device must be able to do: run a command of its shell, and take files."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

from export.devices.connections.capture import Captured

Content: TypeAlias = bytes | Path
"""A file to be copied: its bytes, or its path."""

Say: TypeAlias = Callable[[str], None]
"""Takes a line of progress."""


class Shell(Protocol):
    """A device behind a link. Every method raises ``DeviceError`` if the link fails."""

    holds_stdin: bool
    """Whether a command's stdin is closed there when the connection is lost, and not before."""

    def call(
        self,
        script: str,
        *,
        timeout_s: float,
        stdin: Iterable[bytes] = (),
        say: Say | None = None,
        holds_stdin: bool = False,
    ) -> Captured:
        """Run a script of POSIX sh; its exit code is the result's. ``holds_stdin``: as in ``capture``."""

    def put(self, folder: str, files: Mapping[str, Content], *, timeout_s: float) -> None:
        """Make the folder, for this user alone, and copy files into it."""


def quote_program(program: str) -> str:
    """Return a program as a word of sh; ``~/`` and relative paths start in the home folder of the user who runs it."""
    if "/" in program and not program.startswith("/"):
        return f'"$HOME"/{shlex.quote(program.removeprefix("~/"))}'
    return shlex.quote(program)


def size_of(content: Content) -> int:
    """Return a file's size in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def blocks_of(content: Content, size: int = 1 << 20) -> Iterable[bytes]:
    """Return a file in blocks of at most ``size`` bytes."""
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as stream:
        while block := stream.read(size):
            yield block
