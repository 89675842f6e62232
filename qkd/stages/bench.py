"""The bench stage: latency of the exported files on each device, student and float nets interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from export import DeviceResult, Settings, measure_devices
from qkd.bench.device_file import resolve_devices
from qkd.bench.measuring import SETTINGS
from qkd.bench.record import drop_stale, records_of, write_records
from qkd.bench.targets import find_targets, with_baseline
from qkd.config import BenchConfig
from qkd.progress import Progress
from qkd.roles.sample import calibration_images
from qkd.run.folder import RunFolder
from qkd.units import counted


class BenchError(RuntimeError):
    """No device produced a measurement."""


def run(run: RunFolder, progress: Progress) -> None:
    """Measure every exported file on every device and write ``bench/<device>.json``, failures included.

    Raises:
        BenchError: If every device failed.
        ConfigError: If a device is unknown.
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
    rounds, threads = counted(settings.rounds, "round"), counted(settings.threads, "thread")
    progress.say(f"{rounds} of {', '.join(targets.paths)} interleaved, {threads}")
    how = _settings(settings, run.config.seed)
    results = measure_devices(devices, targets.paths, how, sample=targets.sample, say=progress.say)
    written = write_records(folder, records_of(results, targets, batch_size=settings.batch_size))
    made += written.values()
    for title in drop_stale(folder, made, targets.paths):
        progress.warn(f"{title} had measured other files than those of this export; its record is deleted")
    _judge(results, written, progress)
    run.complete("bench", made, files)


def _settings(bench: BenchConfig, seed: int) -> Settings:
    return Settings(**{name: getattr(bench, name) for name in SETTINGS}, seed=seed)


def _judge(results: Sequence[DeviceResult], written: Mapping[str, Path], progress: Progress) -> None:
    failed = [result for result in results if result.failure]
    if not any(result.reports for result in results):
        reasons = "; ".join(f"{result.device.title}: {result.failure}" for result in failed)
        raise BenchError(f"all devices failed to measure: {reasons}")
    for result in failed:
        again = written[result.device.title]
        progress.warn(f"{result.device.title} failed: {result.failure} (delete {again} to try again)")
