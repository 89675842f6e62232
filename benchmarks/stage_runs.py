"""Runs the stages of a config in its own process, and describes the environment; shared by the accuracy benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkd.config import RunConfig

# Makes a process keep freed memory; otherwise page faults take a tenth of a small net's training (glibc only).
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}
NOT_RUN = "not run to its end"  # the failure of a seed without an error
PRIVATE = ("data.path=", "data.root=", "data.name=npz")


def run_stages(config: str, name: str, words: Sequence[str], folder: Path, *, until: str) -> str:
    """Run or resume a config's stages; return why it failed, or an empty string.

    Args:
        config: Path of the config.
        name: Name of the run folder in ``folder``; the run's output is written to ``NAME.log`` next to it.
        words: ``key.path=value`` overrides.
        folder: Folder of the run folders.
        until: The last stage to run.
    """
    return run_command(["run", config, f"name={name}", *words, "--until", until], name, folder)


def run_command(arguments: Sequence[str], name: str, folder: Path) -> str:
    """Run `qkd` in its own process; return why it failed, or an empty string.

    Args:
        arguments: Arguments of `qkd`, without ``--runs-dir``.
        name: Name of the run folder in ``folder``; the output is written to ``NAME.log`` next to it.
        folder: Folder of the run folders.
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


def run_with_teacher(
    wanted: Callable[[], RunConfig], name: str, folder: Path, stages: Sequence[str], teacher: Path | None = None
) -> str:
    """Run stages in this process; return why they failed, or an empty string. The outcome is noted beside the run.

    Args:
        wanted: Returns the run's config; what it raises is an outcome, too.
        name: Name of the run folder in ``folder``; progress is appended to ``NAME.log`` next to it.
        folder: Folder of the run folders.
        stages: Which stages to run, in order.
        teacher: Run folder whose teacher is copied; None if the run trains its own.
    """
    from qkd.pipeline import run_stages as in_process
    from qkd.progress import Progress
    from qkd.run.folder import RunFolder

    started = time.monotonic()
    try:
        with RunFolder.open(wanted(), runs_dir=folder) as run, (folder / f"{name}.log").open("a") as log:
            if teacher is not None and not run.is_complete("teacher"):
                run.adopt("teacher", teacher)
            in_process(run, stages, Progress(log))
        why = ""
    except Exception as error:  # the row keeps its message, and the others still run
        why = f"{type(error).__name__}: {error}".replace(f"{folder.resolve()}/", "")
    print(f"{name}: {why or 'done'} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    return note_outcome(folder, name, why)


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return count, mean, sample standard deviation, minimum and maximum; only the count if there are no values."""
    if not values:
        return {"seeds": 0}
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "seeds": len(values), "mean": round(statistics.mean(values), 5), "stdev": round(deviation, 5),
        "min": min(values), "max": max(values),
    }  # fmt: skip


def accuracy_text(line: Mapping[str, Any]) -> str:
    """Return the accuracy of a table's line in percent, ± the deviation of its seeds, and the fate of the others.

    Args:
        line: What :func:`spread` returns, plus ``failures``, which hold a message for each seed without a result.
    """
    scatter = f" ± {100 * line['stdev']:.2f}" if line["seeds"] > 1 else ""
    shown = f"{100 * line['mean']:.2f}{scatter} %" if line["seeds"] else "none"
    missing = line.get("failures", [])
    failures = [why for why in missing if why != NOT_RUN]
    failed = f" ({len(failures)} failed: {failures[0][:120]})" if failures else ""
    return shown + failed + (f" ({missing.count(NOT_RUN)} of the seeds not run)" if NOT_RUN in missing else "")


def points_text(value: float | None, scatter: float | None) -> str:
    """Return a difference of accuracies in points, ± the deviation of the seeds; an empty string if there is none."""
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
    """Return versions and hardware that runs were trained with, and their commits; without runs, those of today.

    What runs differ in is given as one text, ``2.13.0 / 2.14.1``. Instruction sets are known of this machine alone, so
    they are left out if a run comes from another processor.

    Args:
        runs: Run folders; missing ones are skipped.
    """
    where = environment()
    files = [file for run in runs if (file := run / "environment.json").is_file()]
    records = [json.loads(file.read_text()) for file in files]
    commits = {found for record in records if (found := record.get("commit"))}
    trained: dict[str, Any] = {key: _common(record.get(key) for record in records) for key in ("python", "cpu")}
    for key in ("torch", "brevitas", "onnxruntime"):
        trained[key] = _common(record.get("packages", {}).get(key) for record in records)
    if trained["cpu"] not in ("", where["cpu"]):
        where |= {"cpu_flags": None, "cpu_capability": None}
    return {
        **where,
        **{key: text for key, text in trained.items() if text},
        "commit": sorted(commits) or where["commit"],
    }


def runs_in(folder: Path) -> list[Path]:
    """Return the run folders in a folder."""
    return sorted(file.parent for file in folder.glob("*/environment.json"))


def _common(values: Iterable[object]) -> str:
    return " / ".join(sorted({str(value) for value in values if value}))


def require_runs(parser: argparse.ArgumentParser, folder: Path, flag: str = "--collect") -> None:
    """End the program if there is nothing to collect, so that no earlier table is replaced by an empty one."""
    if not runs_in(folder):
        parser.error(f"{flag}: no runs in {folder}")


def unlike(run: Path, wanted: Callable[[], RunConfig]) -> str:
    """Return how a run was trained otherwise than a table would say; an empty string if it was not.

    Args:
        run: The run folder.
        wanted: Returns the config that the run would have now.
    """
    from qkd.roles.stored import stored_config
    from qkd.run.identity import different_settings

    try:
        changed = different_settings(stored_config(run), wanted())
    except (ValueError, OSError) as error:
        return f"its settings cannot be compared: {error}"
    found = [f"{key} was {was}, now {now}" for key, (was, now) in changed.items()]
    return f"trained with other settings: {'; '.join(found)}" if found else ""


def note_outcome(folder: Path, name: str, why: str) -> str:
    """Keep why a run failed, for tables that are only collected, or forget it where the run is done; return it."""
    file = folder / f"{name}.failed"
    if why:
        file.write_text(why, encoding="utf-8")
    else:
        file.unlink(missing_ok=True)
    return why


def noted_failure(folder: Path, name: str) -> str:
    """Return why a run failed when it was last tried; an empty string if it did not, or was not tried."""
    file = folder / f"{name}.failed"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def changed_setup(earlier: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Return how a file's setup differs from this one's; an empty string if its rows may stay beside new ones."""
    changed = (key for key in keys if earlier.get(key) != now[key])
    return next((f"{key} was {earlier.get(key)} but is now {now[key]}" for key in changed), "")


def public(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without this machine's folders."""
    return [word for word in overrides if not word.startswith(PRIVATE)]
