"""Write files whole or not at all."""

from __future__ import annotations

import os
import secrets
from os import PathLike
from pathlib import Path

from export.checks import ExportError


def checked_target(path: str | PathLike[str]) -> Path:
    """Return the path, once it is known that a file may be put there.

    Raises:
        ExportError: If it is a folder, or its folder does not exist.
    """
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{target} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise ExportError(f"the folder {target.parent} does not exist; create it first")
    return target


def write_whole(target: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, flush it to the disk, and rename it.

    Raises:
        ExportError: If that fails (disk full, folder not writable); nothing is left behind, an older file stays.
    """
    temporary = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")  # who cleans a run folder knows it
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
