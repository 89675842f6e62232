"""C++ compiled once a machine: the compiler there is, and a cache of libraries that only this user may write to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cpp_compiler() -> str | None:
    """Return the path of ``$CXX``, g++ or clang++, the first that is there; None where none is."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cached_library(name: str, make: Callable[[Path], Path]) -> Path:
    """Return a library from the user's cache, made now if it is not there.

    Args:
        name: Its file name, which holds a hash of all that it is made of.
        make: Compiles it in the folder that it is given, and returns the library.

    Returns:
        The library in ``$XDG_CACHE_HOME/qkd`` (``~/.cache/qkd``), or in a temporary folder where that is read-only.

    Raises:
        Exception: What ``make`` raises; nothing is left behind then.
        OSError: If no folder can be written at all.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkd"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        library = folder / name
        if library.is_file():
            return library
        work = Path(tempfile.mkdtemp(dir=folder))
    except OSError:  # a read-only home: compiled again in every process
        work = Path(tempfile.mkdtemp(prefix="qkd-"))
        library = work / name
    try:
        os.replace(make(work), library)  # another process may have been faster: the same bytes
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if work != library.parent:
        shutil.rmtree(work, ignore_errors=True)
    return library
