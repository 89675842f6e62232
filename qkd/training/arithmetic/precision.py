"""Reduced precision: what a device supports of what is requested."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from quantizers.modes import exact_float32

PRECISIONS = ("float32", "bf16", "fp16")


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
        """Return the context of a forward pass; ``enabled=False`` gives float32, on GPUs without TensorFloat-32."""
        if self.dtype is None or not enabled:
            return exact_float32()
        return torch.autocast(self.device_type, dtype=self.dtype)


def choose_precision(requested: str, device: torch.device) -> tuple[Precision, str]:
    """Return the precision to use, and a note for the user if it is not the requested one.

    float16 is used only on CUDA (it needs scaled gradients), bfloat16 on the CPU and on CUDA devices that support it.

    Args:
        requested: ``float32``, or ``bf16`` or ``fp16``, which are mixed with float32.
        device: Where the training runs.

    Returns:
        The precision, and the note; empty if the request is met.

    Raises:
        ValueError: If the precision is unknown.
    """
    if requested not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {requested!r}")
    full = Precision(device.type)
    if requested == "float32":
        return full, ""
    if requested == "fp16":
        if device.type == "cuda":
            return Precision(device.type, torch.float16), ""
        return full, f"precision fp16 is for CUDA devices; training on {device.type} in float32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return full, "this CUDA device does not support bfloat16; training in float32"
    return Precision(device.type, torch.bfloat16), ""
