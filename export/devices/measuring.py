"""Measure models on one device: probe it, make the files fit, run, and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from export.conversion.repack import fit_storage
from export.devices.connections.adb import AdbShell
from export.devices.connections.address import MOST_THREADS, Device
from export.devices.connections.shell import Content, Say, Shell, size_of
from export.devices.connections.ssh import SshShell
from export.devices.links import Link, LocalLink, RemoteLink
from export.devices.perf_test import PerfTestLink
from export.devices.probing import Probe
from export.devices.report import LatencyReport, measured
from export.runtime import CPU, runtime
from export.sample import Sample, sample_bytes

SHELLS: dict[str, Callable[[Device], Shell]] = {"ssh": SshShell, "adb": AdbShell}
SAMPLE = "sample.npz"
MOST_ROUNDS = 10_000_000  # each takes eight bytes on the device; at 10 us an inference, two minutes
RANGES = {"threads": (1, MOST_THREADS), "batch_size": (1, 1_000_000), "warmup": (0, MOST_ROUNDS),
          "rounds": (1, MOST_ROUNDS)}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How to measure; a device may have its own threads, affinity and provider.

    Args:
        threads: Intra-op threads, at least 1.
        batch_size: Images an inference; must be the model's own where that is fixed.
        warmup: Untimed inferences a model, after the first.
        rounds: Timed inferences a model, at least 1.
        provider: Execution provider by onnxruntime's name.
        affinity: CPUs the process is pinned to; empty: none.
        seed: Of the normally distributed images.
        memory: Whether each model's peak memory is taken, in a separate process.

    Raises:
        ValueError: If a value is out of range.
    """

    threads: int = 1
    batch_size: int = 1
    warmup: int = 20
    rounds: int = 200
    provider: str = CPU
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
        if any(cpu < 0 for cpu in self.affinity):
            raise ValueError(f"affinity must be numbers of CPUs from 0 on, got {list(self.affinity)}")

    def on(self, device: Device) -> Settings:
        """Return the settings with the device's own values put in."""
        own = {"threads": device.threads, "affinity": device.affinity, "provider": device.provider}
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
        device: Where.
        paths: Name -> ONNX file with one float32 input, its first axis the batch.
        settings: How.
        sample: Images with expected logits, to score the models on there.
        say: Takes lines of progress.

    Returns:
        Name -> report, in the order of ``paths``.

    Raises:
        ValueError: If there is no model, a model cannot be fed or loaded, or the provider or affinity is not there.
        FileNotFoundError: If a file does not exist.
        ImportError: If onnxruntime is missing on this machine and this is where to measure.
        DeviceError: If the device cannot be reached, lacks something, or fails.
        OSError: If a file cannot be read.
    """
    check_files(paths)
    if device.is_local:
        runtime()
    own, link = settings.on(device), link_to(device)
    probe = link.probe()
    probe.check()
    fitted = {name: fit_storage(Path(path), probe.loads) for name, path in paths.items()}
    files: dict[str, Content] = {f"{number}.onnx": one.content for number, one in enumerate(fitted.values())}
    if sample is not None:
        files[SAMPLE] = sample_bytes(sample)
    if not device.is_local:
        probe.check_room(sum(map(size_of, files.values())))
    answer = link.run(_job(list(paths), own, device, has_sample=sample is not None), files, say)
    return {
        name: LatencyReport(
            path=str(path),
            device=device.title,
            **measured(answer, name, entry=str(number)),
            size_bytes=size_of(fitted[name].content),
            repacked=fitted[name].repacked,
            interleaved_with=tuple(other for other in paths if other != name),
            spinning=_spins(own, len(paths)),
            **{key: getattr(own, key) for key in ("threads", "provider", "warmup", "rounds", "affinity")},
        )
        for number, (name, path) in enumerate(paths.items())
    }


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
        device: Which.

    Returns:
        Its processor, memory, runtime and what that loads.

    Raises:
        DeviceError: If it cannot be reached, or has no Python.
    """
    return link_to(device).probe()


def check_files(paths: Mapping[str, str | PathLike[str]]) -> None:
    """Raise unless there are models, and all of them are files.

    Raises:
        ValueError: If there is none.
        FileNotFoundError: If a file does not exist.
    """
    if not paths:
        raise ValueError("there is no model to measure: `paths` is empty")
    for path in paths.values():
        if not Path(path).is_file():
            raise FileNotFoundError(f"no model file at {path}")


def _job(names: list[str], settings: Settings, device: Device, *, has_sample: bool) -> dict[str, Any]:
    return {
        # the answer is by key: a device's texts are cleaned, and a name with two spaces would come back as another
        "models": [{"name": name, "key": str(n), "file": f"{n}.onnx"} for n, name in enumerate(names)],
        **{key: getattr(settings, key) for key in ("threads", "batch_size", "warmup", "rounds", "provider", "seed")},
        "affinity": list(settings.affinity),
        "memory": settings.memory,
        "spinning": _spins(settings, len(names)),
        "sample": SAMPLE if has_sample else None,
        "timeout_s": device.timeout_s,
    }


def _spins(settings: Settings, models: int) -> bool:
    # threads of one session that wait busily would take the core from the session whose turn it is
    return settings.threads > 1 and models == 1
