"""The low-bit execution provider for ONNX Runtime, without the toolkit that makes its models.

It runs 2-bit convolutions by look-up tables, on an unmodified onnxruntime (1.23 or newer, installed separately)::

    import onnxruntime
    import onnxruntime_ep_lowbit as lowbit

    name = lowbit.get_ep_name()
    onnxruntime.register_execution_provider_library(name, lowbit.get_library_path())
    options = onnxruntime.SessionOptions()
    if devices := [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]:
        options.add_provider_for_devices(devices, {})
    session = onnxruntime.InferenceSession("student.onnx", options)

On a processor where it gains nothing it offers no device; the model then runs on the CPU provider with the same
outputs. Files need no change. The library asks for glibc 2.28 and nothing else: its C++ runtime (LLVM's libc++) is
inside.
"""
# This file is `onnxruntime_ep_lowbit/__init__.py` of the wheel that `qkd lowbit wheel` writes; it imports nothing from
# the toolkit.

from __future__ import annotations

from pathlib import Path

__all__ = ["get_ep_name", "get_ep_names", "get_library_path"]

LIBRARY = "liblowbit.so"


def get_library_path() -> str:
    """Return the path of the library, for ``onnxruntime.register_execution_provider_library``.

    Raises:
        FileNotFoundError: If the file is missing from the package.
    """
    path = Path(__file__).resolve().parent / LIBRARY
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: install the package onnxruntime-ep-lowbit again")
    return str(path)


def get_ep_names() -> list[str]:
    """Return the names of the library's execution providers."""
    return [get_ep_name()]


def get_ep_name() -> str:
    """Return the name of the library's execution provider."""
    return "LowBitExecutionProvider"
