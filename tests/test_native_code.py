"""Kernels that are compiled on the user's machine, with addresses and undefined behavior watched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sanitizers

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
    compiler = tmp_path / "g++"  # every compiler that a test finds is this one
    flags = " ".join(sanitizers.FLAGS)
    compiler.write_text(f'#!/bin/sh\nexec {sanitizers.compiler()} "$@" {flags}\n', encoding="utf-8")
    compiler.chmod(0o700)
    environment = {
        "CXX": str(compiler),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    sanitizers.require_clean([tests, "-k", WATCHED[tests]], environment, 3500)
    libraries = list((tmp_path / "cache" / "qkd").glob("*.so"))
    assert libraries, "no kernel was compiled"
    assert all(b"__asan_report" in library.read_bytes() for library in libraries)
