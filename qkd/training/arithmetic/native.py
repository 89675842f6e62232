"""Which types a processor multiplies natively: emulated bfloat16 costs more than float32, and rounds."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

AMPERE = 8  # first CUDA compute capability with bfloat16 in its matrix units
X86 = ("avx512_bf16", "amx_bf16")  # Linux CPU flags
ARM = ("bf16",)


def has_native_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 natively.

    Args:
        device: The device of a training. CPU flags are read on Linux; on other systems the answer is no.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= AMPERE
    flags = cpu_flags()
    known = ARM if platform.machine().lower() in ("aarch64", "arm64") else X86
    return device.type == "cpu" and _is_used(flags) and any(flag in flags for flag in known)


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the processor's flags as Linux reports them; empty if they cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(found.partition(":")[2].split())


def _is_used(flags: frozenset[str]) -> bool:
    """Return whether PyTorch may use the widest vectors available; ``ATEN_CPU_CAPABILITY`` can forbid it."""
    return "avx512f" not in flags or torch.backends.cpu.get_cpu_capability() == "AVX512"
