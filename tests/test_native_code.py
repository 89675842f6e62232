"""Kernels that are compiled on the user's machine, with addresses and undefined behavior watched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1"
# Tests of each kernel (those of the low-bit provider are watched by their own test), and what to leave out of them.
WATCHED = {
    "tests/qkd/agents/operations": "not fewer_instructions",
    "tests/qkd/data/sets/test_resampling.py": "",
    "tests/quantizers/native": "",
    "tests/quantizers/fused/test_batch_norm.py": "",
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tests", WATCHED)
def test_sanitizers_find_nothing(tests: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    compiler = tmp_path / "g++"  # every compiler that a test finds is this one
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" {SANITIZE}\n', encoding="utf-8")
    compiler.chmod(0o700)
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", tests, "-k", WATCHED[tests]],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "runtime error" not in done.stdout + done.stderr
    libraries = list((tmp_path / "cache" / "qkd").glob("*.so"))
    assert libraries, "no kernel was compiled"
    assert all(b"__asan_report" in library.read_bytes() for library in libraries)
