"""Find the library of the low-bit execution provider for a device, if there is one."""

from __future__ import annotations

import platform
from pathlib import Path

from export.devices.probing import Probe
from export.lowbit import LowBitUnavailableError, availability, library_path
from export.lowbit.provider import OLDEST_RUNTIME

FILE = "liblowbit.so"


def library_here() -> Path:
    """Return the library for this machine.

    Raises:
        LowBitUnavailableError: If this machine would not gain from it, or it cannot be had.
    """
    found = availability()
    if not found.is_offered:
        raise LowBitUnavailableError(found.reason)
    return library_path()


def library_for(probe: Probe) -> Path:
    """Return the library for a remote device; whether it gains there is asked of the library, on the device.

    Args:
        probe: What the device answered.

    Raises:
        LowBitUnavailableError: If its onnxruntime is too old for it, or there is no library for its processor family.
    """
    version = str(probe.machine.get("onnxruntime") or "0")
    if not is_new_enough(version):
        wanted = ".".join(map(str, OLDEST_RUNTIME))
        raise LowBitUnavailableError(f"needs onnxruntime {wanted} or newer, the device has {version}")
    family = str(probe.machine.get("architecture") or "unknown")
    if family == platform.machine():
        return library_path()
    raise LowBitUnavailableError(f"there is no library for {family} here")


def is_new_enough(version: str) -> bool:
    """Return whether a version of onnxruntime takes plugins."""
    parts = version.split(".")[:2]
    return all(part.isdigit() for part in parts) and tuple(map(int, parts)) >= OLDEST_RUNTIME
