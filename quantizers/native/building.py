"""C++ compiled once a machine: the compiler there is, and a cache of libraries that only this user may write to."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

PARALLEL = "-fopenmp"
OPTIONAL = (PARALLEL, "-march=native")  # left out where the compiler does not know them: one thread, plain instructions
_SUBSETS = ((), OPTIONAL[:1], OPTIONAL[1:], OPTIONAL)  # what is left out, the first that compiles
_TIMEOUT_S = 120
_log = logging.getLogger(__name__)


def cpp_compiler() -> str | None:
    """Return the path of ``$CXX``, g++ or clang++, the first that is there; None where none is."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def loaded_library(
    stem: str, source: str, flags: Sequence[str], *, without: str, parallel: bool = False
) -> ctypes.CDLL | None:
    """Return C++ compiled for this processor and loaded, the same at every call; None where there is none.

    There is none with ``QKD_NATIVE=0``, without a compiler, and where it fails; the last two are logged, once.

    Args:
        stem: A word for it, which the library's name begins with.
        source: The C++.
        flags: Of the compiler.
        without: What is done in its place, for the log.
        parallel: As for :func:`compiled_library`.
    """
    if os.environ.get("QKD_NATIVE") == "0":
        return None
    return _loaded(stem, source, tuple(flags), cpp_compiler(), without, parallel=parallel)


@functools.lru_cache(maxsize=8)
def _loaded(
    stem: str, source: str, flags: Sequence[str], compiler: str | None, without: str, *, parallel: bool
) -> ctypes.CDLL | None:
    if compiler is None:
        _log.info("no C++ compiler (g++ or clang++ would do): %s", without)
        return None
    try:
        return ctypes.CDLL(str(compiled_library(stem, source, flags, compiler, parallel=parallel)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("%s was not compiled (%s): %s", stem, error, without)
        return None


def compiled_library(stem: str, source: str, flags: Sequence[str], compiler: str, *, parallel: bool = False) -> Path:
    """Return C++ as a library for this processor, compiled now if it is not in the user's cache.

    Args:
        stem: What the library's name begins with.
        source: The C++.
        flags: Of the compiler.
        compiler: Its path.
        parallel: Compile with OpenMP, too. Where the compiler does not know it, or ``-march=native``, it does without.

    Returns:
        The library's path.

    Raises:
        subprocess.SubprocessError: If the compiler fails.
        OSError: If it cannot be started, or no folder can be written.
    """
    wanted = [*flags, PARALLEL] if parallel else list(flags)
    words = "\n".join((source, *wanted, compiler, platform.system(), _processor()))

    def make(folder: Path) -> Path:
        file, library = folder / f"{stem}.cpp", folder / "unfinished.so"
        file.write_text(source, encoding="utf-8")
        for left_out in _SUBSETS:
            kept = [flag for flag in wanted if flag not in left_out]
            try:
                _run([compiler, *kept, str(file), "-o", str(library)])
                return library
            except subprocess.CalledProcessError as error:
                failed = error
        raise failed

    return cached_library(f"{stem}-{hashlib.sha256(words.encode()).hexdigest()[:20]}.so", make)


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)


def _processor() -> str:
    """Return what tells processors apart that share a home folder: a library is for the one that compiled it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *sorted(set(kept))])


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
