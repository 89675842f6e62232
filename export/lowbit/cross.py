"""Compile the low-bit execution provider for another processor family, with the compiler of the package `ziglang`."""

from __future__ import annotations

import importlib.util
import sys

from export.lowbit.build import LowBitUnavailableError, Toolchain

# What `--target` names: the processor family, and the target as the compiler spells it. The oldest C library that
# onnxruntime's own wheels of 1.23 and newer run on is 2.27 or 2.28; ours needs nothing newer.
GLIBC = (2, 28)
TARGETS = {
    "aarch64-linux": ("aarch64", "aarch64-linux-gnu.{}.{}".format(*GLIBC)),
    "x86_64-linux": ("x86_64", "x86_64-linux-gnu.{}.{}".format(*GLIBC)),
}
# It instruments what it compiles and writes debug information unless told not to.
FLAGS = ("-fno-sanitize=all", "-g0", "-s")


def cross_toolchain(target: str) -> Toolchain:
    """Return the compiler for a target; the library that it makes holds its own C++ runtime.

    Args:
        target: A key of `TARGETS`.

    Returns:
        The compiler of the package ``ziglang``.

    Raises:
        ValueError: If the target is unknown.
        LowBitUnavailableError: If the package ``ziglang`` is not installed.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; use one of {', '.join(TARGETS)}")
    if importlib.util.find_spec("ziglang") is None:
        raise LowBitUnavailableError(
            "the cross-compiler is missing: pip install ziglang (or the extra: pip install 'qkd-toolkit[cross]')"
        )
    machine, spelled = TARGETS[target]
    return Toolchain((sys.executable, "-m", "ziglang", "c++", "-target", spelled), machine, FLAGS)
