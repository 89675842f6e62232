"""Make the low-bit execution provider for a device: its library, or a wheel that holds it."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.lowbit.build import LowBitUnavailableError, built_library, host_toolchain
from export.lowbit.cross import GLIBC, TARGETS, cross_toolchain
from export.lowbit.wheel import write_wheel
from export.writing import checked_target, write_whole
from quantizers.native.building import cpp_compiler


@dataclass(frozen=True)
class Deployed:
    """A file that was made.

    Args:
        target: What it runs on, as `TARGETS` names it.
        path: The file.
        size_bytes: Its size.
    """

    target: str
    path: Path
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {**asdict(self), "path": str(self.path)}

    def to_text(self) -> str:
        """Return a line for users."""
        return f"{self.path}  ({self.size_bytes / 1e3:,.0f} kB, {self.target})"


def build_library(target: str | None = None, out: Path | None = None) -> Deployed:
    """Compile the provider's library.

    Args:
        target: A key of `TARGETS`; by default this machine, with its own compiler if it has one.
        out: A copy is written there, whole or not at all; its folder must exist.

    Returns:
        The copy, or the library in the cache.

    Raises:
        ValueError: If the target is unknown, or ``out`` cannot name or be written as a file.
        LowBitUnavailableError: If a compiler is missing or fails.
        OSError: If a file cannot be written.
    """
    copy = None if out is None else checked_target(out)
    if target is None and cpp_compiler() is not None:
        library = built_library(host_toolchain())
    else:
        library = built_library(cross_toolchain(target or this_machine()))
    if copy is not None:
        write_whole(copy, library.read_bytes())
        library = copy
    return Deployed(target or this_machine(), library, library.stat().st_size)


def build_wheel(target: str | None, folder: Path) -> Deployed:
    """Compile the library for every Linux with glibc 2.28 and write the wheel that holds it.

    Args:
        target: A key of `TARGETS`; by default this machine's.
        folder: Where the wheel is written; created if it does not exist.

    Returns:
        The wheel.

    Raises:
        ValueError: If the target is unknown.
        LowBitUnavailableError: If the cross-compiler is missing or fails.
        OSError: If a file cannot be written.
    """
    target = target or this_machine()
    library = built_library(cross_toolchain(target))
    folder.mkdir(parents=True, exist_ok=True)
    path = write_wheel(library, "manylinux_{}_{}_{}".format(*GLIBC, TARGETS[target][0]), folder)
    return Deployed(target, path, path.stat().st_size)


def this_machine() -> str:
    """Return the target of this machine.

    Raises:
        LowBitUnavailableError: If it is not one of `TARGETS`.
    """
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    found = f"{machine}-{platform.system().lower()}"
    if found not in TARGETS:
        raise LowBitUnavailableError(f"{found} is not a target of the cross-compiler; use one of {', '.join(TARGETS)}")
    return found
