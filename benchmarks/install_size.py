"""Measures the disk space of an environment's distributions, and how much of it is for GPUs.

    python benchmarks/install_size.py --json benchmarks/results/install_size.json

GPU libraries are the distributions that PyTorch's default Linux build requires for CUDA (`nvidia-*`, `cuda-*`,
`triton`) and the CUDA part of PyTorch itself (its libraries named for CUDA). The CPU build has none of this.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from qkd.cli.options.values import output_file

GPU = re.compile(r"nvidia[-_]|cuda[-_]|triton$")
CUDA_PART = re.compile(r"torch/lib/.*(cuda|cudnn|nvrtc|nccl|cupti|nvshmem).*\.so")
SHOWN = ("torch", "torchvision", "onnx", "onnxruntime", "brevitas", "numpy", "scipy", "scikit-learn", "matplotlib",
         "sympy", "pillow")  # fmt: skip


def weigh() -> dict[str, int]:
    """Return megabytes of each distribution that is needed to run, with GPU libraries and the rest grouped."""
    total: dict[str, int] = {}
    needed = _needed("qkd-toolkit")
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name not in needed and not GPU.match(name):
            continue
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            size = path.stat().st_size if path.is_file() else 0
            is_gpu = GPU.match(name) or (name == "torch" and CUDA_PART.search(str(file)))
            key = "GPU libraries" if is_gpu else name if name in SHOWN else "everything else"
            total[key] = total.get(key, 0) + size
    return {name: round(size / 1e6) for name, size in sorted(total.items(), key=lambda item: -item[1])}


def _needed(name: str) -> set[str]:
    """Return the names of a distribution and of everything that it requires here, without extras."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        one = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if one in found:
            continue
        try:
            requirements = metadata.requires(one) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(one)
        waiting += [_name_of(words) for words in requirements if _is_for_here(words)]
    return found


def _name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return match[0] if match else ""


def _is_for_here(requirement: str) -> bool:
    """Whether a requirement holds for this interpreter and platform, without an extra."""
    from packaging.requirements import Requirement

    marker = Requirement(requirement).marker
    return marker is None or marker.evaluate({"extra": ""})


def table(found: dict[str, Any]) -> list[str]:
    """Return the sizes as Markdown: GPU libraries first, then what a CPU needs."""
    parts = dict(found["megabytes"])
    gpu = parts.pop("GPU libraries", 0)
    rows = [f"| {name} | {size:,} MB |" for name, size in parts.items() if size >= found["least_shown"]]
    small = sum(size for size in parts.values() if size < found["least_shown"])
    return [
        "| part | on disk |", "|---|---|", f"| **GPU libraries**, not needed without a GPU | {gpu:,} MB |", *rows,
        f"| smaller packages | {small:,} MB |", f"| **all but the GPU libraries** | {sum(parts.values()):,} MB |",
    ]  # fmt: skip


def main() -> None:
    """Measure, print the table, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file(".json"))
    options = parser.parse_args()
    import torch

    found = {
        "megabytes": weigh(), "least_shown": 20, "torch": torch.__version__, "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print("\n".join(table(found)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
