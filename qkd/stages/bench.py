"""The bench stage: latency of the exported files on each device, student and float nets interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from export import Device, DeviceResult, Settings, measure_devices
from qkd.bench.device_file import resolve_devices
from qkd.bench.record import drop_stale, keep_apart, records_of, with_earlier, write_records
from qkd.bench.targets import find_targets, with_baseline
from qkd.config import BenchConfig
from qkd.files import DamagedFileError, read_json
from qkd.progress import Progress
from qkd.report.findings.measurements import SETTINGS, failure_line
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
    how = _settings(settings, run.config.seed)
    rounds, threads = counted(settings.rounds, "round"), _threads(how, devices)
    progress.say(f"{rounds} of {', '.join(targets.paths)} interleaved, {threads}")
    results = measure_devices(devices, targets.paths, how, sample=targets.sample, say=progress.say)
    keep_apart(folder, _devices_before(run), settings.on)
    made_now = records_of(results, targets, how, is_stage=True)
    records = [with_earlier(folder, one, settings, targets.paths) for one in made_now]
    written = write_records(folder, records)
    made += written.values()
    for title in drop_stale(folder, made, targets.paths):
        progress.warn(f"{title} had measured other files than those of this export; its record is deleted")
    _require_one(results)
    for record in records:
        if record["failure"]:
            progress.warn(failure_line(record, written[record["device"]]))
    run.complete("bench", made, files)


def _threads(how: Settings, devices: Sequence[Device]) -> str:
    """Return how many threads are used: one number, or that of each device."""
    used = {device.title: how.on(device).threads for device in devices}
    if len(set(used.values())) == 1:
        return counted(next(iter(used.values())), "thread")
    return ", ".join(f"{counted(threads, 'thread')} on {title}" for title, threads in used.items())


def _devices_before(run: RunFolder) -> list[str]:
    """Return the devices that the stage last measured on; none if that is unknown."""
    try:
        names = read_json(run.manifest_file("bench"))["settings"]["bench"]["on"]
    except (DamagedFileError, OSError, KeyError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _settings(bench: BenchConfig, seed: int) -> Settings:
    return Settings(**{name: getattr(bench, name) for name in SETTINGS}, seed=seed)


def _require_one(results: Sequence[DeviceResult]) -> None:
    if not any(result.reports for result in results):
        reasons = "; ".join(f"{result.device.title}: {result.failure}" for result in results)
        raise BenchError(f"all devices failed to measure: {reasons}")
