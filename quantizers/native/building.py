"""C++ compiled once per machine: the compiler, and a cache of libraries that only this user can write to."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

PARALLEL = "-fopenmp"
WIDE = "-mprefer-vector-width=512"  # of AVX-512 processors: compilers prefer 256 bits for several of them
# omitted if the compiler does not support them: one thread, plain instructions, narrower vectors
OPTIONAL = (PARALLEL, "-march=native", WIDE)
_SUBSETS = tuple(  # what to omit; the first that compiles wins
    subset for size in range(len(OPTIONAL) + 1) for subset in itertools.combinations(OPTIONAL, size)
)
_TIMEOUT_S = 120
_ELF_HEADER = 64  # bytes
_ELF_SECTIONS = {1: (slice(32, 36), 46), 2: (slice(40, 48), 58)}  # 32 and 64 bits -> places of the section table, sizes
_ELF_MACHINES = {62: "x86_64", 183: "aarch64", 40: "armv7l", 243: "riscv64"}
_LEFT_AFTER_S = 24 * 3600.0
_log = logging.getLogger(__name__)


def is_x86() -> bool:
    """Return whether this machine runs x86-64 instructions."""
    return platform.machine().lower() in ("x86_64", "amd64")


def cpp_compiler() -> str | None:
    """Return the path of the first of ``$CXX``, g++ and clang++ that exists, or None."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def loaded_library(
    stem: str, source: str, flags: Sequence[str], *, without: str, parallel: bool = False
) -> ctypes.CDLL | None:
    """Return the loaded library of C++ compiled for this processor, the same at every call, or None.

    It is None with ``QKD_NATIVE=0``, without a compiler, and if the compiler fails; the last two are logged once.

    Args:
        stem: Start of the library's name.
        source: The C++.
        flags: Compiler flags.
        without: What happens without it, for the log.
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
        _log.info("no C++ compiler found (install g++ or clang++): %s", without)
        return None
    try:
        return ctypes.CDLL(str(compiled_library(stem, source, flags, compiler, parallel=parallel)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("%s was not compiled (%s): %s", stem, error, without)
        return None


def compiled_library(stem: str, source: str, flags: Sequence[str], compiler: str, *, parallel: bool = False) -> Path:
    """Return C++ as a library for this processor, compiled now if it is not in the user's cache.

    Args:
        stem: Start of the library's name.
        source: The C++.
        flags: Compiler flags.
        compiler: Its path.
        parallel: Compile with OpenMP, too. A compiler without support for one of :data:`OPTIONAL` omits it.

    Returns:
        The library's path.

    Raises:
        subprocess.SubprocessError: If the compiler fails.
        OSError: If it cannot be started, or no folder is writable.
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
    """Return a key that distinguishes processors sharing a home folder: a library is for the one that compiled it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *sorted(set(kept))])


def library_fault(path: Path, machine: str = "") -> str:
    """Return why a Linux library cannot be loaded, as far as its header tells; empty if it can, or is no ELF file.

    The system would end the process while it loads one that is cut off, and call one of another processor missing.

    Args:
        path: The library.
        machine: The processor that it is for, by Python's name; default: this one.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_ELF_HEADER)
    if not any(head) or (head.startswith(b"\x7fELF") and len(head) < _ELF_HEADER):
        return "it is cut off"
    if not head.startswith(b"\x7fELF"):
        return ""  # the loader says so
    order: Literal["little", "big"] = "little" if head[5] == 1 else "big"
    table, each = _ELF_SECTIONS.get(head[4], _ELF_SECTIONS[2])
    number, sections = (int.from_bytes(head[where], order) for where in (slice(18, 20), table))
    size, count = (int.from_bytes(head[start : start + 2], order) for start in (each, each + 2))
    wanted = (machine or platform.machine()).lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    if (made_for := _ELF_MACHINES.get(number, f"machine {number}")) != wanted and wanted in _ELF_MACHINES.values():
        return f"it is for {made_for}, not for {wanted}"
    if sections + size * count > path.stat().st_size:  # the last thing in the file
        return "it is cut off"
    return ""


def cached_library(name: str, make: Callable[[Path], Path], machine: str = "") -> Path:
    """Return a library from the user's cache, compiled now if it is not there.

    Args:
        name: Its file name, which contains a hash of everything that it is built from.
        make: Compiles it in the given folder, and returns the library.
        machine: As for :func:`library_fault`.

    Returns:
        The library in ``$XDG_CACHE_HOME/qkd`` (``~/.cache/qkd``), or in a temporary folder where that is read-only or
        there is no home.

    Raises:
        Exception: What ``make`` raises; nothing is left behind then.
        OSError: If no folder is writable at all, or what ``make`` returns is no library for the machine.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkd"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        library = folder / name
        if library.is_file() and not library_fault(library, machine):
            return library
        _clear_leftovers(folder)
        work = Path(tempfile.mkdtemp(dir=folder))
    except (OSError, RuntimeError):  # a read-only home, or none at all: compiled again in every process
        work = Path(tempfile.mkdtemp(prefix="qkd-"))
        library = work / name
    try:
        made = make(work)
        if fault := library_fault(made, machine):
            raise OSError(f"the compiler wrote a file that cannot be loaded: {fault}")
        os.replace(made, library)  # another process may have been faster: the same bytes
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if work != library.parent:
        shutil.rmtree(work, ignore_errors=True)
    return library


def _clear_leftovers(folder: Path) -> None:
    """Delete what compilations that were killed have left behind, as soon as none of them can still be running."""
    for work in folder.glob("tmp*"):
        with contextlib.suppress(OSError):
            if work.is_dir() and time.time() - work.stat().st_mtime > _LEFT_AFTER_S:
                shutil.rmtree(work, ignore_errors=True)
