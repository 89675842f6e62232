"""Reduced precision and threads: what a device has, chosen once a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from qkd.engines.engine import current


@dataclass(frozen=True)
class Precision:
    """The arithmetic of a forward pass.

    Args:
        device_type: ``cpu`` or ``cuda``.
        dtype: The reduced type, or None for float32.
    """

    device_type: str
    dtype: torch.dtype | None = None

    @property
    def needs_scaler(self) -> bool:
        """Whether gradients underflow unless the loss is scaled (float16 only)."""
        return self.dtype is torch.float16

    def context(self, *, enabled: bool = True) -> AbstractContextManager[object]:
        """Return the context of a forward pass; ``enabled=False`` gives float32."""
        if self.dtype is None or not enabled:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)


def choose_precision(requested: Literal["off", "bf16", "fp16"], device: torch.device) -> tuple[Precision, str]:
    """Return the precision to use, and a note for the user where it is not the one asked for.

    float16 is used on CUDA only (it needs scaled gradients), bfloat16 on the CPU and on CUDA devices that have it.

    Args:
        requested: ``off`` is float32; the others are mixed with it.
        device: Where the training runs.

    Returns:
        The precision, and the note; empty where the wish is granted.
    """
    full = Precision(device.type)
    if requested == "off":
        return full, ""
    if requested == "fp16":
        if device.type == "cuda":
            return Precision(device.type, torch.float16), ""
        return full, f"autocast fp16 is for CUDA devices; training on {device.type} in float32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return full, "this CUDA device has no bfloat16; training in float32"
    return Precision(device.type, torch.bfloat16), ""


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Use this many CPU threads within a block, and the former number after it.

    Args:
        threads: At least 1; None changes nothing.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If ``threads`` is below 1 (PyTorch's).
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(requested: str) -> torch.device:
    """Return the device of a config's ``device``: ``auto`` is CUDA where there is one, else the CPU.

    Of several processes on a machine each has its own GPU, unless one is named by its number.

    Raises:
        ValueError: If a CUDA device is asked for and is not there.
    """
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    if requested == "cuda" and current().size > 1:
        requested = f"cuda:{current().local_rank}"
    device = torch.device(requested)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device: {requested} is asked for, but PyTorch sees no such device; use device=auto or cpu")
    return device
