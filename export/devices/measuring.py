"""Measure models on one device: probe it, make the files fit, run, and report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from export.conversion.repack import fit_storage
from export.defaults import BATCH_SIZE, RANGES, ROUNDS, THREADS, WARMUP
from export.devices import onboard
from export.devices.connections.adb import AdbShell
from export.devices.connections.address import Device, DeviceError
from export.devices.connections.shell import Content, Say, Shell, blocks_of, size_of
from export.devices.connections.ssh import SshShell
from export.devices.links import Link, LocalLink, RemoteLink
from export.devices.perf_test import PerfTestLink
from export.devices.probing import Probe
from export.devices.providers import AUTO, RUNTIMES, Entry, as_job, entries_of, failed_entries, left_out, provider_names
from export.devices.report import LatencyReport, as_run, measured
from export.devices.shipping import FILE as LIBRARY
from export.devices.shipping import library_for, library_here
from export.devices.suiting import suited, without_student
from export.lowbit import PROVIDER as LOW_BIT
from export.lowbit import LowBitUnavailableError
from export.runtime import CPU, runtime
from export.sample import Sample, sample_bytes

SHELLS: dict[str, Callable[[Device], Shell]] = {"ssh": SshShell, "adb": AdbShell}
SAMPLE = "sample.npz"


class PartlyMeasuredError(DeviceError):
    """A part of the request could not be measured on a device, such as under a runtime that is missing there.

    Args:
        failures: The reasons, each once.
        reports: Reports of what was measured, by name.
    """

    def __init__(self, failures: Sequence[str], reports: Mapping[str, LatencyReport]) -> None:
        super().__init__("; ".join(dict.fromkeys(failures)))
        self.reports = dict(reports)


@dataclass(frozen=True)
class Settings:
    """How to measure; a device may have its own threads, affinity and provider.

    Args:
        threads: Intra-op threads, at least 1.
        batch_size: Images per inference; must be the model's own if that is fixed.
        warmup: Untimed inferences per model, after the first.
        rounds: Timed inferences per model, at least 1.
        providers: Execution providers, all models under each: ``cpu``, ``lowbit`` or onnxruntime's names. ``auto``: the
            CPU's, and also the low-bit one if the device benefits from it and it takes some of the file.
        affinity: CPUs that the process is pinned to; empty for none.
        seed: Seed of the normally distributed images.
        memory: Whether each model's peak memory is taken, in a separate process.

    Raises:
        ValueError: If a value is out of range.
    """

    threads: int = THREADS
    batch_size: int = BATCH_SIZE
    warmup: int = WARMUP
    rounds: int = ROUNDS
    providers: tuple[str, ...] = (AUTO,)
    affinity: tuple[int, ...] = ()
    seed: int = 0
    memory: bool = True

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
            if value > most:
                raise ValueError(f"{name} must be at most {most:,}, got {value}")
        provider_names(self.providers)
        if any(cpu < 0 for cpu in self.affinity):
            raise ValueError(f"affinity must be numbers of CPUs from 0 on, got {list(self.affinity)}")

    def on(self, device: Device) -> Settings:
        """Return the settings with the device's own values put in."""
        providers = None if device.provider is None else (device.provider,)
        own = {"threads": device.threads, "affinity": device.affinity, "providers": providers}
        return replace(self, **{key: value for key, value in own.items() if value is not None})  # type: ignore[arg-type]


def measure_on(
    device: Device,
    paths: Mapping[str, str | PathLike[str]],
    settings: Settings,
    *,
    sample: Sample | None = None,
    say: Say | None = None,
) -> dict[str, LatencyReport]:
    """Measure models on one device, interleaved.

    The device first describes itself. A file whose low-bit weights its runtime cannot load is repacked, which
    changes no output, before anything is copied. What was copied is removed again, also after a failure.

    Args:
        device: Where to measure.
        paths: Name -> ONNX file with one float32 input, its first axis the batch.
        settings: How to measure.
        sample: Images with expected logits, to score the models on there.
        say: Takes lines of progress.

    Returns:
        Name -> report, in the order of ``paths``. Under the low-bit provider, and under others that run besides the
        CPU's, a name says so: ``student, low-bit provider``.

    Raises:
        ValueError: If there is no model, a model cannot be fed or loaded or is for another runtime, the provider or
            affinity is not there, a model's outputs under the low-bit provider are not those of the CPU's, or a file
            changed meanwhile.
        FileNotFoundError: If a file does not exist.
        ImportError: If onnxruntime is missing on this machine and this is where to measure.
        DeviceError: If the device cannot be reached, lacks something, or fails. If a provider or runtime besides the
            CPU's fails and others do not, a ``PartlyMeasuredError`` with the reports of the others.
        OSError: If a file cannot be read.
    """
    check_files(paths)
    if device.is_local:
        runtime()
    own, link = settings.on(device), link_to(device)
    entries = suited(entries_of(list(paths), provider_names(own.providers)), paths)
    if say is not None:
        for sentence in without_student(entries, paths):
            say(sentence)
    probe = link.probe()
    probe.check()
    hashes = _hashes(paths)
    fitted = {name: fit_storage(Path(path), probe.loads) for name, path in paths.items()}
    names = {name: f"{number}.onnx" for number, name in enumerate(paths)}
    files: dict[str, Content] = {names[name]: one.content for name, one in fitted.items()}
    if sample is not None:
        files[SAMPLE] = sample_bytes(sample)
    job = _job([as_job(entry, n, names[entry.model]) for n, entry in enumerate(entries)], own, device)
    job |= {"sample": SAMPLE if sample is not None else None, **_low_bit(device, probe, entries, files)}
    job["runtimes"] = _runtimes(entries, files)
    if not device.is_local:
        probe.check_room(sum(map(size_of, files.values())))
    answer = link.run(job, files, say)
    if changed := [str(paths[name]) for name, then in _hashes(paths).items() if then != hashes[name]]:
        raise ValueError(f"{', '.join(changed)}: changed while it was measured, so it is unknown which file was timed; "
                         f"measure again")  # fmt: skip
    failed = failed_entries(answer, entries)
    untaken = left_out(answer, entries)
    missing = {**untaken, **failed}
    rows = [_Row(entry, n, answer) for n, entry in enumerate(entries) if n not in missing]
    for n, why in untaken.items():
        if not entries[n].is_optional:  # the user asked for this provider by name
            _note(rows, entries[n].model, f"not measured with the low-bit provider: {why}")
    shared = {"threads": own.threads, "affinity": own.affinity, **as_run(answer)}
    reports = {
        row.title: LatencyReport(
            path=str(paths[row.entry.model]),
            device=device.title,
            **row.fields,
            size_bytes=size_of(fitted[row.entry.model].content),
            repacked=fitted[row.entry.model].repacked,
            interleaved_with=tuple(other.title for other in rows if other is not row),
            provider=row.provider,
            model=row.entry.model,
            sha256=hashes[row.entry.model] or "",
            **shared,
        )
        for row in rows
    }
    if failed:
        raise PartlyMeasuredError([*failed.values()], reports)
    return reports


class _Row:
    """The result of an entry; a file of which the low-bit provider takes nothing ran on the CPU's."""

    def __init__(self, entry: Entry, number: int, answer: Mapping[str, Any]) -> None:
        self.entry = entry
        self.fields = measured(answer, entry.title, entry=str(number))
        self.title, self.provider = entry.title, entry.provider
        if entry.provider == LOW_BIT and self.fields["claimed_nodes"] == 0:
            self.title, self.provider = entry.model, CPU
            self.fields["notes"] += ("the low-bit provider takes nothing of this file: the CPU provider ran it",)


def _note(rows: Sequence[_Row], model: str, text: str) -> None:
    """Add a note to the row of a model on the CPU provider."""
    for row in rows:
        if row.entry.model == model and row.provider == CPU:
            row.fields["notes"] += (text,)


def _low_bit(device: Device, probe: Probe, entries: Sequence[Entry], files: dict[str, Content]) -> dict[str, Any]:
    """Put the low-bit provider's library among the files, if it is requested; return what the job says about it."""
    if all(entry.provider != LOW_BIT for entry in entries) or device.perf_test is not None:
        return {"low_bit": None, "why_no_low_bit": ""}
    try:
        files[LIBRARY] = library_here() if device.is_local else library_for(probe)
    except (LowBitUnavailableError, OSError) as error:
        return {"low_bit": None, "why_no_low_bit": str(error)}
    return {"low_bit": LIBRARY, "why_no_low_bit": ""}


def _runtimes(entries: Sequence[Entry], files: dict[str, Content]) -> dict[str, str]:
    """Put the programs that open other runtimes among the files; return runtime -> file."""
    wanted = sorted({entry.provider for entry in entries} & RUNTIMES.keys())
    files.update({f"{name}_session.py": Path(onboard.__file__).parent / f"{name}_session.py" for name in wanted})
    return {name: f"{name}_session.py" for name in wanted}


def link_to(device: Device) -> Link:
    """Return the way to a device.

    Raises:
        DeviceError: If an adb device is not there.
    """
    if device.is_local:
        return LocalLink(device)
    shell = SHELLS[device.scheme](device)
    return RemoteLink(device, shell) if device.perf_test is None else PerfTestLink(device, shell)


def probe_device(device: Device) -> Probe:
    """Return how a device describes itself.

    Args:
        device: The device to probe.

    Returns:
        Its processor, memory, runtime and what that loads.

    Raises:
        DeviceError: If it cannot be reached, or has no Python.
    """
    return link_to(device).probe()


def check_files(paths: Mapping[str, str | PathLike[str]]) -> None:
    """Raise unless there are models, and each is a file.

    Raises:
        ValueError: If there is none.
        FileNotFoundError: If a file does not exist.
    """
    if not paths:
        raise ValueError("there is no model to measure: `paths` is empty")
    for path in paths.values():
        if not Path(path).is_file():
            raise FileNotFoundError(f"no model file at {path}")


def _hashes(paths: Mapping[str, str | PathLike[str]]) -> dict[str, str | None]:
    """Return the SHA-256 of each file; None for one that is gone."""
    hashes: dict[str, str | None] = {}
    for name, path in paths.items():
        digest = hashlib.sha256()
        try:
            for block in blocks_of(Path(path)):
                digest.update(block)
        except FileNotFoundError:
            hashes[name] = None
        else:
            hashes[name] = digest.hexdigest()
    return hashes


def _job(models: list[dict[str, Any]], settings: Settings, device: Device) -> dict[str, Any]:
    return {
        "models": models,
        **{key: getattr(settings, key) for key in ("threads", "batch_size", "warmup", "rounds", "seed", "memory")},
        "affinity": list(settings.affinity),
        # if one model is left: threads of one session that spin take the core from the session whose turn it is
        "spinning": settings.threads > 1,
        "timeout_s": device.timeout_s,
    }
