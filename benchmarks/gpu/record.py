"""The provenance in every result file, and a write that leaves either the complete new file or the old one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from qkd.files import write_text


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, device and commit."""
    from qkd.run.environment import environment as of_run

    run = of_run(0)
    is_cuda = device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "brevitas": run["packages"].get("brevitas"), "commit": run["commit"],
        "device": torch.cuda.get_device_name(device) if is_cuda else run["cpu"],
        "driver": _driver() if is_cuda else None,
        "cpu": run["cpu"], "cores": os.cpu_count(),
    }  # fmt: skip


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write JSON atomically: it may be read, or its writer killed, at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")


def is_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors hold equal values, on any devices."""
    return torch.equal(first.detach().cpu(), second.detach().cpu())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of the expected tensor."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
