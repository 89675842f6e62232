"""Runs tests in another process, with the addresses and the undefined behavior of native code watched (g++)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def compiler() -> str:
    """Return the path of g++; the test is skipped where there is none."""
    return shutil.which("g++") or pytest.skip("no g++")


def require_clean(tests: Sequence[str], environment: Mapping[str, str], timeout_s: int) -> None:
    """Fail unless tests pass in a process that reports what the sanitizers find.

    Args:
        tests: Arguments of pytest.
        environment: Variables beside those of this process; they lead to code that was compiled with ``FLAGS``.
        timeout_s: Seconds that they may take.
    """
    runtimes = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    watched = {"LD_PRELOAD": " ".join(map(str.strip, runtimes)), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", *tests],
        cwd=ROOT, env={**os.environ, **watched, **environment}, capture_output=True, text=True, timeout=timeout_s,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "runtime error" not in done.stdout + done.stderr
