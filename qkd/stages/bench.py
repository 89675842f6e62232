"""The bench stage: latency of the exported files on each device, student and float nets in turns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from export import DeviceResult, Settings, measure_devices
from qkd.bench_targets import Targets, find_targets, with_baseline
from qkd.config import BenchConfig
from qkd.device_file import resolve_devices
from qkd.files import write_json
from qkd.progress import Progress
from qkd.rundir import RunFolder
from qkd.stages.sample import calibration_images

# one value for all models of a device
SHARED = ("machine", "threads", "provider", "affinity", "warmup", "rounds", "device", "spinning", "frequency_mhz",
          "temperature_c", "load", "images")  # fmt: skip


class BenchError(RuntimeError):
    """No device could measure."""


def run(run: RunFolder, progress: Progress) -> None:
    """Measure every exported file on every device and write ``bench/<device>.json``, failures included.

    Raises:
        BenchError: If every device failed.
        ConfigError: If a device is not known.
        OSError: If a result cannot be written.
    """
    settings = run.config.bench
    devices = resolve_devices(settings.on, settings.devices, timeout_s=settings.timeout_s)
    folder, targets = run.folder("bench"), find_targets([str(run.path)])
    files = list(targets.paths.values())
    made: list[Path] = []
    if settings.int8_baseline:
        targets = with_baseline(targets, folder, calibration_images(run.config, folder=run.path))
        made = [path for path in targets.paths.values() if path not in files]
    progress.say(f"{settings.rounds} rounds of {', '.join(targets.paths)} in turns, {settings.threads} thread(s)")
    how = _settings(settings, run.config.seed)
    results = measure_devices(devices, targets.paths, how, sample=targets.sample, say=progress.say)
    for result in results:
        write_json(folder / f"{file_name(result.device.title)}.json", _facts(result, targets, settings.batch_size))
        made.append(folder / f"{file_name(result.device.title)}.json")
    _judge(results, folder, progress)
    run.complete("bench", made, files)


def file_name(title: str) -> str:
    """Return a device's name as the stem of a file: ``ssh://pi@board:22`` is ``ssh-pi-board-22``."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-.")


def _settings(bench: BenchConfig, seed: int) -> Settings:
    return Settings(
        threads=bench.threads,
        batch_size=bench.batch_size,
        warmup=bench.warmup,
        rounds=bench.rounds,
        provider=bench.provider,
        affinity=bench.affinity,
        seed=seed,
    )


def _judge(results: tuple[DeviceResult, ...], folder: Path, progress: Progress) -> None:
    failed = [result for result in results if result.failure]
    if len(failed) == len(results):
        reasons = "; ".join(f"{result.device.title}: {result.failure}" for result in failed)
        raise BenchError(f"no device could measure: {reasons}")
    for result in failed:
        again = folder / f"{file_name(result.device.title)}.json"
        progress.warn(f"{result.device.title} failed: {result.failure} (delete {again} to try again)")


def _facts(result: DeviceResult, targets: Targets, batch_size: int) -> dict[str, Any]:
    head = {"device": result.device.title, "address": result.device.address, "failure": result.failure or None}
    if not result.reports:
        return {**head, "models": {}}
    rows = {name: report.to_json() for name, report in result.reports.items()}
    first = next(iter(rows.values()))
    models = {name: {key: value for key, value in row.items() if key not in SHARED} for name, row in rows.items()}
    for name, row in models.items():
        row["path"] = targets.paths[name].name  # the folder may move
    shared = {key: first[key] for key in SHARED}
    return {**head, **shared, "batch_size": batch_size, "reference": targets.reference, "models": models}
