"""Find the library of the low-bit execution provider for a device, if there is one."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from export.devices.probing import Probe
from export.lowbit import LowBitUnavailableError, availability, library_path
from export.lowbit.build import built_library
from export.lowbit.cross import TARGETS, cross_toolchain
from export.lowbit.provider import OLDEST_RUNTIME
from export.versions import version_text

FILE = "liblowbit.so"
SWITCHED_OFF = "switched off by QKD_LOWBIT=0"


def library_here() -> Path:
    """Return the library for this machine.

    Raises:
        LowBitUnavailableError: If this machine would not benefit from it, or it cannot be obtained.
    """
    found = availability()
    if not found.is_offered:
        raise LowBitUnavailableError(found.reason)
    return library_path()


def library_for(probe: Probe) -> Path:
    """Return the library for a remote device; the library itself decides on the device whether it helps.

    The cross-compiler's library needs no newer C library than onnxruntime's own wheels do; without that compiler
    (package ``ziglang``), a device of this machine's processor family gets the library of this machine.

    Args:
        probe: The device's answer.

    Raises:
        LowBitUnavailableError: If its onnxruntime is too old for it, or no library can be made for its processor.
        OSError: If the library cannot be written to the cache.
    """
    if os.environ.get("QKD_LOWBIT") == "0":
        raise LowBitUnavailableError(SWITCHED_OFF)
    version = str(probe.machine.get("onnxruntime") or "0")
    if not is_new_enough(version):
        wanted = version_text(OLDEST_RUNTIME)
        raise LowBitUnavailableError(f"needs onnxruntime {wanted} or newer, the device has {version}")
    family = str(probe.machine.get("architecture") or "unknown")
    target = next((name for name, (machine, _) in TARGETS.items() if machine == family), None)
    if target is None:
        raise LowBitUnavailableError(f"there are no kernels for the processor family {family}")
    try:
        return built_library(cross_toolchain(target))
    except LowBitUnavailableError:
        if family != platform.machine():
            raise
        return library_path()


def is_new_enough(version: str) -> bool:
    """Return whether a version of onnxruntime takes plugins."""
    parts = version.split(".")[:2]
    return all(part.isdigit() for part in parts) and tuple(map(int, parts)) >= OLDEST_RUNTIME
