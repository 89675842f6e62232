"""The bench stage: latency of the exported files on this machine, student and float nets in turns."""

from __future__ import annotations

from typing import Any

from export import LatencyReport, measure_interleaved
from qkd.files import read_json, write_json
from qkd.progress import Progress
from qkd.rundir import RunFolder
from qkd.stages.export import exported_files

SHARED = ("machine", "threads", "provider", "warmup", "rounds", "device", "spinning")  # one value for all models


def run(run: RunFolder, progress: Progress) -> None:
    """Measure every exported file and write ``bench/local.json``.

    Raises:
        ValueError: If a file cannot be loaded or filled.
        OSError: If the result cannot be written.
    """
    source = run.path / "export" / "export.json"
    files = exported_files(source.parent, read_json(source))
    settings = run.config.bench
    progress.say(f"{settings.rounds} rounds of {', '.join(files)} in turns, {settings.threads} thread(s)")
    reports = measure_interleaved(
        files,
        threads=settings.threads,
        batch_size=settings.batch_size,
        warmup=settings.warmup,
        rounds=settings.rounds,
        seed=run.config.seed,
    )
    target = run.folder("bench") / "local.json"
    write_json(target, _facts(reports, settings.batch_size))
    run.complete("bench", [target], list(files.values()))


def _facts(reports: dict[str, LatencyReport], batch_size: int) -> dict[str, Any]:
    rows = {name: report.to_json() for name, report in reports.items()}
    first = next(iter(rows.values()))
    models = {name: {key: value for key, value in row.items() if key not in SHARED} for name, row in rows.items()}
    for name, row in models.items():
        row["path"] = reports[name].path.rpartition("/")[2]
    return {**{key: first[key] for key in SHARED}, "batch_size": batch_size, "models": models}
