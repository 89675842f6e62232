"""An emulated aarch64 user space, and a cross-compiler, fetched once into a cache folder."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import beside
import pytest

HERE = Path(__file__).parents[1]
# What this project's tests of the provider import there; the platform decides the versions.
PACKAGES = ("onnxruntime", "numpy", "onnx", "protobuf", "ml_dtypes", "typing_extensions",
            "pytest", "pluggy", "iniconfig", "packaging", "pygments")  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """An aarch64 user space with onnxruntime, onnx and pytest.

    Args:
        root: Debian's Python and what it needs.
        qemu: The emulator.
        site: Packages.
    """

    root: Path
    qemu: Path
    site: Path

    def run(
        self, cpu: str, words: list[str], *, cwd: Path, timeout_s: float = 900, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run its Python on a processor."""
        places = [str(self.site), str(HERE / "support/without_torch"), environment.pop("PYTHONPATH", "")]
        paths = ":".join(filter(None, places))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LOWBIT", "QKD"))}
        return subprocess.run(
            [str(self.qemu), "-cpu", cpu, "-L", str(self.root), str(self.root / "usr/bin/python3.11"), *words],
            cwd=cwd, env={**kept, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1",
                          **environment},
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip


def arm() -> Arm:
    """Return the user space; skip the test where it cannot be had."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator is fetched for x86-64")
    devices = beside.load(HERE / "export/devices/test_emulated_arm.py")
    fetcher = fetch()
    root = fetcher.debian("aarch64-python", "arm64", "bookworm", devices.PYTHON)
    emulator = "usr/bin/qemu-aarch64"
    qemu = fetcher.debian("qemu-aarch64", "amd64", "trixie", ("qemu-user",), only=emulator) / emulator
    return Arm(root, qemu, fetcher.wheels("aarch64-site-tests", "3.11", (*devices.NEW, "any"), PACKAGES))


def fetch() -> Any:
    """Return what fetches Debian packages and wheels."""
    return beside.load(HERE / "export/devices/conftest.py").Fetcher()


def ziglang() -> Path:
    """Return a folder that holds the package `ziglang`; skip the test where it cannot be had."""
    cache = beside.load(HERE / "export/devices/conftest.py").CACHE
    place = cache / "ziglang"
    if not (place / "ziglang").exists():
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), "ziglang"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            pytest.skip(f"the package ziglang cannot be had: {done.stderr.strip()[-200:]}")
    return place
