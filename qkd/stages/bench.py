"""The bench stage: latency of the exported files on each device, student and float nets in turns."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export import DeviceResult, Settings, measure_devices
from qkd.bench_targets import Targets, find_targets, with_baseline
from qkd.config import BenchConfig
from qkd.device_file import resolve_devices
from qkd.files import write_json
from qkd.progress import Progress
from qkd.roles.sample import calibration_images
from qkd.run.folder import RunFolder

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
    names = file_names([result.device.title for result in results])
    for result in results:
        path = folder / f"{names[result.device.title]}.json"
        write_json(path, _facts(result, targets, settings.batch_size))
        made.append(path)
    _judge(results, folder, names, progress)
    run.complete("bench", made, files)


def file_name(title: str) -> str:
    """Return a device's name as the stem of a file: ``ssh://pi@board:22`` is ``ssh-pi-board-22``."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-.")


def file_names(titles: Sequence[str]) -> dict[str, str]:
    """Return each device's name as the stem of a file of its own: ``a/b`` and ``a-b`` have two.

    Args:
        titles: Names of devices, no two of them alike.
    """
    stems = {title: file_name(title) for title in titles}
    counts = Counter(stem.lower() for stem in stems.values())  # some file systems tell no case
    return {
        title: stem if stem and counts[stem.lower()] == 1 else f"{stem}-{_mark(title)}".strip("-")
        for title, stem in stems.items()
    }


def _mark(title: str) -> str:
    return hashlib.sha256(title.encode("utf-8", "surrogatepass")).hexdigest()[:8]


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


def _judge(results: tuple[DeviceResult, ...], folder: Path, names: Mapping[str, str], progress: Progress) -> None:
    failed = [result for result in results if result.failure]
    if len(failed) == len(results):
        reasons = "; ".join(f"{result.device.title}: {result.failure}" for result in failed)
        raise BenchError(f"no device could measure: {reasons}")
    for result in failed:
        again = folder / f"{names[result.device.title]}.json"
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
