"""Runs the stages of a config in its own process, and describes where: what the accuracy benchmarks share."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# A process keeps the memory that it frees: without this a tenth of a small net's training is page faults (glibc only).
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}
NOT_RUN = "not run to its end"  # the failure of a seed that nothing went wrong with
PRIVATE = ("data.path=", "data.root=", "data.name=npz")


def run_stages(config: str, name: str, words: Sequence[str], folder: Path, *, until: str) -> str:
    """Run a config's stages, resuming; return why it failed, or nothing.

    Args:
        config: Path of the config.
        name: Of the run folder in ``folder``; what the run says is written to ``NAME.log`` beside it.
        words: ``key.path=value`` overrides.
        folder: Where run folders are kept.
        until: The last stage to run.
    """
    return run_command(["run", config, f"name={name}", *words, "--until", until], name, folder)


def run_command(arguments: Sequence[str], name: str, folder: Path) -> str:
    """Run `qkd` in its own process; return why it failed, or nothing.

    Args:
        arguments: Behind `qkd`, without ``--runs-dir``.
        name: Of the run folder in ``folder``; what is said is written to ``NAME.log`` beside it.
        folder: Where run folders are kept.
    """
    command = [sys.executable, "-m", "qkd.cli", *arguments]
    done = subprocess.run(
        [*command, "--runs-dir", str(folder)], capture_output=True, text=True, check=False,
        env={**os.environ, **KEEP_MEMORY},
    )  # fmt: skip
    (folder / f"{name}.log").write_text(done.stdout + done.stderr)
    if not done.returncode:
        return ""
    lines = done.stderr.strip().splitlines() or ["no message"]
    stage = next((line[3:].split(":")[0] for line in reversed(lines) if line.startswith("== ")), "config")
    return f"{stage}: {lines[-1]}".replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return count, mean, standard deviation (of a sample), least and largest; the count alone where there is none."""
    if not values:
        return {"seeds": 0}
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "seeds": len(values), "mean": round(statistics.mean(values), 5), "stdev": round(deviation, 5),
        "min": min(values), "max": max(values),
    }  # fmt: skip


def accuracy_text(line: Mapping[str, Any]) -> str:
    """Return the accuracy of a table's line in percent, ± that of its seeds, and what became of the other seeds.

    Args:
        line: What :func:`spread` returns; ``failures`` beside it hold a message for each seed without a result.
    """
    scatter = f" ± {100 * line['stdev']:.2f}" if line["seeds"] > 1 else ""
    shown = f"{100 * line['mean']:.2f}{scatter} %" if line["seeds"] else "none"
    missing = line.get("failures", [])
    failures = [why for why in missing if why != NOT_RUN]
    failed = f" ({len(failures)} failed: {failures[0][:120]})" if failures else ""
    return shown + failed + (f" ({missing.count(NOT_RUN)} of the seeds not run)" if NOT_RUN in missing else "")


def points_text(value: float | None, scatter: float | None) -> str:
    """Return a difference of accuracies in points, ± that of the seeds; nothing where there is none."""
    if value is None:
        return ""
    return f"{100 * value:+.2f}" + ("" if scatter is None else f" ± {100 * scatter:.2f}")


def environment() -> dict[str, Any]:
    """Return versions and hardware."""
    import brevitas
    import onnxruntime
    import torch

    from qkd.machine import cpu_flags
    from qkd.run.environment import environment as of_run

    run = of_run(0)
    return {
        "python": platform.python_version(), "torch": torch.__version__, "brevitas": brevitas.__version__,
        "onnxruntime": onnxruntime.__version__, "machine": platform.machine(), "cpu": run["cpu"],
        "cpu_flags": list(cpu_flags()), "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": run["commit"], "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def environment_of(runs: Iterable[Path]) -> dict[str, Any]:
    """Return versions and hardware, with the commits that runs were made with; this one where there are no runs.

    Args:
        runs: Run folders; those that are missing are passed over.
    """
    where = environment()
    files = [file for run in runs if (file := run / "environment.json").is_file()]
    commits = {found for file in files if (found := json.loads(file.read_text()).get("commit"))}
    return {**where, "commit": sorted(commits) or where["commit"]}


def public(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without this machine's folders."""
    return [word for word in overrides if not word.startswith(PRIVATE)]
