"""Runs the whole toolkit on a device: alone, as the only process of an NCCL group, and as two that share the GPU.

    python benchmarks/gpu/whole_runs.py --out results/

Each run trains teacher and student of a smoke config and exports the student with its parity check. Their students are
compared: a group sums gradients in another order, so weights agree only up to rounding.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from record import distance, environment, write_record  # isort: skip - next to this file

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = ROOT / "configs" / "digits" / "smoke.yaml"
LAUNCH = ("-m", "torch.distributed.run", "--nproc_per_node", "1")


def whole_run(
    name: str, folder: Path, device: str, *, launcher: tuple[str, ...] = (), words: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run a config up to its export in separate processes; return the outcome."""
    command = [sys.executable, *launcher, "-m", "qkd", "run", str(CONFIG), f"name={name}", f"device={device}", *words]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--until", "export", "--runs-dir", str(folder)], capture_output=True, text=True, check=False,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
    )  # fmt: skip
    said = done.stdout + done.stderr
    parity = next((line.strip() for line in said.splitlines() if "parity of student.onnx" in line), None)
    found = {"ok": done.returncode == 0, "seconds": round(time.perf_counter() - start, 1), "parity": parity}
    return found if found["ok"] else {**found, "said": said[-3000:]}


def main() -> int:
    """Run all three, compare, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shared = "cuda:0" if args.device == "cuda" else args.device
    record: dict[str, Any] = {"what": __doc__.splitlines()[0], "environment": environment(torch.device(args.device))}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = record["runs"] = {
            "alone": whole_run("alone", folder, args.device),
            "again": whole_run("again", folder, args.device),
            "group_of_one": whole_run("group_of_one", folder, args.device, launcher=LAUNCH),
            "two_processes": whole_run("two_processes", folder, shared, words=("--devices", "2")),
        }
        alone = folder / "alone" / "student" / "weights.safetensors"
        for name, row in rows.items():
            weights = folder / name / "student" / "weights.safetensors"
            if weights.is_file() and alone.is_file():
                row["distance_from_alone"] = _apart(load_file(weights), load_file(alone))
            print(f"{name}: {row}", flush=True)
    write_record(args.out / "gpu_runs.json", record)
    return sum(not row["ok"] for row in rows.values())


def _apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative distance over the tensors."""
    return max(distance(found[key].float(), value.float()) for key, value in expected.items())


if __name__ == "__main__":
    sys.exit(main())
