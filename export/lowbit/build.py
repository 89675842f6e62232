"""Compile the low-bit execution provider once per machine, into the user's cache folder."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.scratch import scratch_folder
from quantizers.native.building import cached_library, cpp_compiler

logger = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "native"
# No contraction into fused multiply-adds: roundings must be those of ONNX Runtime. The last flag silences GCC 12, whose
# own headers of intrinsics read what it takes for uninitialized.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-uninitialized")
# Only an instruction set's own files are compiled for it; the processor decides which one runs.
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vnni", "-mfma"),
    "-mprefer-vector-width=512",
)
INSTRUCTION_SETS = {"amx": (*AVX512, "-mgfni"), "avx512": AVX512, "avx2": ("-mavx2", "-mfma")}
OPTIONAL_FLAGS = {"amx": ("-mamx-tile", "-mamx-int8")}  # GCC 11 and Clang 12 know them; without them, there is no AMX
PROBE = """#if defined(__AMX_INT8__)
void probe() { __asm__ volatile("tdpbusd %tmm2, %tmm1, %tmm0\\n\\ttilerelease"); }
#endif
"""
ANSWER_S = 30.0  # for the compiler's version
LONGEST_COMPILATION_S = 900  # the first time, a cross-compiler also compiles the C++ runtime of the target


class LowBitUnavailableError(RuntimeError):
    """The low-bit execution provider is not available; the message is one line that says what is missing."""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler and the processors that it compiles for.

    Args:
        command: How it is called: a program and its first arguments.
        machine: Processor family that it compiles for, as ``platform.machine()`` names it.
        extra_flags: For this build only (sanitizers).
    """

    command: tuple[str, ...]
    machine: str
    extra_flags: tuple[str, ...] = ()


def host_toolchain() -> Toolchain:
    """Return the compiler of this machine.

    Raises:
        LowBitUnavailableError: If there is none.
    """
    compiler = cpp_compiler()
    if compiler is None:
        raise LowBitUnavailableError("no C++ compiler: install g++ or clang++ to build the low-bit execution provider")
    return Toolchain((compiler,), platform.machine())


def built_library(toolchain: Toolchain) -> Path:
    """Return the compiled library, from the cache if these sources were compiled before.

    Args:
        toolchain: What compiles it.

    Raises:
        LowBitUnavailableError: If it does not compile; the message holds the compiler's first error.
    """
    name = f"lowbit-{_fingerprint(toolchain)}.so"
    return cached_library(name, lambda folder: compile_library(toolchain, folder), toolchain.machine)


def compile_library(toolchain: Toolchain, folder: Path) -> Path:
    """Compile into a folder and return the library.

    Args:
        toolchain: What compiles it.
        folder: Where objects and library are written.

    Raises:
        LowBitUnavailableError: If it does not compile.
    """
    logger.warning("compiling the low-bit execution provider for %s, once: about half a minute", toolchain.machine)
    jobs = [(source, folder / f"{source.stem}.o") for source in sorted(SOURCES.rglob("*.cc"))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda job: _run([*_command(toolchain, job[0]), "-c", str(job[0]), "-o", str(job[1])]), jobs))
    library = folder / "liblowbit.so"
    objects = [str(made) for _, made in jobs]
    _run([*toolchain.command, *toolchain.extra_flags, "-shared", "-o", str(library), *objects, "-lpthread"])
    return library


def _command(toolchain: Toolchain, source: Path) -> list[str]:
    flags: tuple[str, ...] = ()
    if toolchain.machine in ("x86_64", "AMD64"):
        name = source.stem.split("_")[0]
        flags = INSTRUCTION_SETS.get(name, ())
        optional = OPTIONAL_FLAGS.get(name, ())
        flags += optional if _knows(toolchain.command, optional) else ()
    return [*toolchain.command, *FLAGS, f"-I{SOURCES}", *flags, *toolchain.extra_flags]


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_COMPILATION_S)
    except subprocess.CalledProcessError as error:
        silent = f"{command[0]} ended with exit code {error.returncode} and said nothing"
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or [silent]
        raise LowBitUnavailableError(f"the low-bit execution provider does not compile: {lines[0]}") from error
    except subprocess.TimeoutExpired as error:
        reason = f"{Path(command[0]).name} took longer than {LONGEST_COMPILATION_S} s"
        raise LowBitUnavailableError(f"the low-bit execution provider does not compile: {reason}") from error
    except OSError as error:
        raise LowBitUnavailableError(f"the low-bit execution provider does not compile: {error}") from error


def _fingerprint(toolchain: Toolchain) -> str:
    words = [
        *toolchain.command,
        toolchain.machine,
        *toolchain.extra_flags,
        *FLAGS,
        repr((INSTRUCTION_SETS, OPTIONAL_FLAGS)),
    ]
    words += [_version(toolchain.command), platform.system()]
    words += [str(flags) for flags in OPTIONAL_FLAGS.values() if _knows(toolchain.command, flags)]
    for source in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        words += [source.relative_to(SOURCES).as_posix(), source.read_text(encoding="utf-8")]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:20]


@functools.cache
def _knows(command: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    """Return whether a compiler accepts these flags, and its assembler what the flags are for."""
    with scratch_folder() as folder:
        source = folder / "probe.cc"
        source.write_text(PROBE)
        words = [*command, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            return (
                subprocess.run(words, capture_output=True, timeout=LONGEST_COMPILATION_S, check=False).returncode == 0
            )
        except (OSError, subprocess.TimeoutExpired):
            return False  # the compilation itself reports what is wrong


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise LowBitUnavailableError(
            f"the compiler {command[0]} does not answer: `{shlex.join(command)} --version` took more than "
            f"{ANSWER_S:g} s"
        ) from error
    except OSError as error:
        raise LowBitUnavailableError(
            f"the compiler {command[0]} cannot be started: {error.strerror or error}"
        ) from error
    return answer.stdout
