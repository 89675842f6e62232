"""Describe the machine a latency was measured on."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

CPU_INFO = Path("/proc/cpuinfo")
FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")
# The instructions that decide how fast (and on x86 how exactly) int8 products run.
TELLING_FLAGS = frozenset(
    ("ssse3", "sse4_1", "avx", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx_vnni_int8")
    + ("amx_int8", "amx_tile", "asimd", "asimddp", "i8mm", "sve", "sve2", "bf16")
)


def describe_machine(runtime_version: str) -> dict[str, Any]:
    """Return the CPU, its telling flags, governor and frequency (None where unreadable), kernel and versions."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "cpu_flags": sorted(flags & TELLING_FLAGS),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "kernel": f"{platform.system()} {platform.release()}",
        "governor": _read(FREQUENCY / "scaling_governor"),
        "python": sys.version.split()[0],
        "onnxruntime": runtime_version,
    }


def frequency_mhz() -> float | None:
    """Return the present frequency of the first core in MHz, None where the system does not say."""
    text = _read(FREQUENCY / "scaling_cur_freq")
    if text is not None and text.isdigit():
        return int(text) / 1000
    lines = [line for line in (_read(CPU_INFO) or "").splitlines() if line.lower().startswith("cpu mhz")]
    return float(lines[0].split(":")[1]) if lines else None


def _cpu() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    for line in (_read(CPU_INFO) or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags", fields.get("features", ""))  # x86 says flags, Arm says Features
    return fields.get("model name") or platform.processor() or "unknown", set(flags.split())


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
