"""Offer the low-bit execution provider to ONNX Runtime."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.lowbit.build import LowBitUnavailableError, built_library, host_toolchain
from export.versions import version_text
from quantizers.native.building import library_fault

PROVIDER = "LowBitExecutionProvider"
SWITCH = "QKD_LOWBIT"  # 0 in the environment: do not use it
PACKAGE = "onnxruntime_ep_lowbit"  # the library alone, for devices without a compiler
OLDEST_RUNTIME = (1, 23)  # the first with compiled nodes in plugin providers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Availability:
    """Whether the provider gains anything on this machine.

    Args:
        kernels: The instruction set that it would use, empty if it offers nothing.
        reason: One line for users.
    """

    kernels: str
    reason: str

    @property
    def is_offered(self) -> bool:
        """Whether sessions can use the provider."""
        return bool(self.kernels)


@functools.cache
def library_path() -> Path:
    """Return the provider's library.

    It is the file that ``QKD_LOWBIT_LIBRARY`` names, else that of the package ``onnxruntime-ep-lowbit``, else one that
    is compiled here, once.

    Returns:
        The path of a shared library that exists.

    Raises:
        LowBitUnavailableError: If none of them exists, with the reason.
        OSError: If it cannot be written to the cache.
    """
    if named := os.environ.get("QKD_LOWBIT_LIBRARY"):
        if not Path(named).is_file():
            raise LowBitUnavailableError(f"QKD_LOWBIT_LIBRARY names no file: {named}")
        return Path(named)
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:
        return built_library(host_toolchain())
    return Path(package.get_library_path())


def availability() -> Availability:
    """Report what the provider would do on this machine; never raises.

    Returns:
        The kernels it would use, or why it would use none.
    """
    if os.environ.get(SWITCH) == "0":
        return Availability("", "switched off by QKD_LOWBIT=0")
    try:
        _runtime()
        path = library_path()
        if fault := library_fault(path):
            return Availability("", f"{path}: {fault}")
        library = ctypes.CDLL(str(path))
    except (LowBitUnavailableError, OSError, subprocess.SubprocessError) as error:
        return Availability("", str(error))
    try:
        describe = library.lowbit_describe
    except AttributeError:
        return Availability("", f"{path} is not the library of this provider, or that of an older version")
    describe.restype = ctypes.c_char_p
    kernels, reason = describe().decode().split("\n", 1)
    return Availability(kernels, reason)


def register() -> str:
    """Make the provider known to onnxruntime in this process; a second call changes nothing.

    Sessions then take ``providers=["LowBitExecutionProvider", "CPUExecutionProvider"]``; in onnxruntime 1.23 and
    some later versions, which take plugins by device, ``SessionOptions.add_provider_for_devices`` with the devices of
    ``onnxruntime.get_ep_devices()``. It stays registered: a library may leave only after the last session that uses it.

    Returns:
        The provider's name.

    Raises:
        LowBitUnavailableError: If onnxruntime is too old, nothing can be compiled, or this processor would not benefit.
        OSError: If the library cannot be written to the cache.
    """
    onnxruntime = _runtime()
    found = availability()
    if not found.is_offered:
        raise LowBitUnavailableError(found.reason)
    if all(device.ep_name != PROVIDER for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(PROVIDER, str(library_path()))
    return PROVIDER


def providers() -> list[str]:
    """List the providers to give to a session.

    Returns:
        Ours first if it is faster and this onnxruntime takes plugins by name (see :func:`register`), the CPU's always.

    Raises:
        OSError: If the library cannot be written to the cache.
    """
    try:
        name, onnxruntime = register(), _runtime()
    except LowBitUnavailableError as error:
        _say_once(str(error), is_wanted=os.environ.get(SWITCH) == "0")
        return ["CPUExecutionProvider"]
    if name not in onnxruntime.get_available_providers():
        _say_once(f"onnxruntime {onnxruntime.__version__} takes it by device, not by name (add_provider_for_devices)")
        return ["CPUExecutionProvider"]
    return [name, "CPUExecutionProvider"]


@functools.cache
def _say_once(reason: str, *, is_wanted: bool = False) -> None:
    """Log why the provider is not used: a warning, which Python prints by default, unless someone asked for it."""
    level = logging.INFO if is_wanted else logging.WARNING
    logger.log(level, "low-bit execution provider: %s; the CPU provider computes everything", reason)


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise LowBitUnavailableError("onnxruntime is not installed") from error
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < OLDEST_RUNTIME:
        wanted = version_text(OLDEST_RUNTIME)
        raise LowBitUnavailableError(f"needs onnxruntime {wanted} or newer, this is {onnxruntime.__version__}")
    return onnxruntime
