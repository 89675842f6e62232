"""The device and the threads of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qkd.engines.engine import current


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Use this many CPU threads within a block, and the previous number after it.

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
    """Return the device of a config's ``device``: ``auto`` is CUDA if available, else the CPU.

    Each of several processes on a machine gets its own GPU, unless the config names one by its number.

    Raises:
        ValueError: If a CUDA device is requested but not available.
    """
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    if requested == "cuda" and current().size > 1:
        requested = f"cuda:{current().local_rank}"
    device = torch.device(requested)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device: {requested} was requested, but PyTorch finds no such device; use device=auto or cpu")
    return device
