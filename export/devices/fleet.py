"""Measure on several devices side by side; one that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from export.devices.connections.address import Device, DeviceError
from export.devices.connections.capture import end_all
from export.devices.measuring import PartlyMeasuredError, Settings, check_files, measure_on
from export.devices.report import LatencyReport
from export.sample import Sample

SSH_PORT = 22  # where an address names none


@dataclass(frozen=True)
class DeviceResult:
    """The result of one device.

    Args:
        device: The device.
        reports: Name of the model -> its report; empty if the device failed.
        failure: Why it failed, or why a part of the request did; empty if nothing did.
        is_input_fault: Whether the failure is one of the models or settings, not of the device.
    """

    device: Device
    reports: Mapping[str, LatencyReport] = field(default_factory=dict)
    failure: str = ""
    is_input_fault: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {
            "device": self.device.title,
            "address": self.device.address,
            "failure": self.failure or None,
            "models": {name: report.to_json() for name, report in self.reports.items()},
        }


def measure_devices(
    devices: Sequence[Device],
    paths: Mapping[str, str | PathLike[str]],
    settings: Settings,
    *,
    sample: Sample | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[DeviceResult, ...]:
    """Measure models on each device; see ``measure_on`` for the arguments.

    Remote devices work side by side, entries of one device one after another. This machine comes last and alone, so
    that packing and copying for the others does not disturb its own figures.

    Args:
        devices: Where to measure; each has its own name.
        paths: Name -> ONNX file.
        settings: How to measure.
        sample: Images with expected logits, or None.
        say: Takes lines of progress, each with the device's name.

    Returns:
        A result for each device, in order; it holds the device's failures.

    Raises:
        FileNotFoundError: If a model file does not exist.
        ValueError: If there is no device or no model, or two devices share a name.
        OSError: If a model file cannot be read.
    """
    _check_names(devices)
    check_files(paths)
    found: dict[str, DeviceResult] = {}
    remote = [device for device in devices if not device.is_local]

    def measure(device: Device) -> DeviceResult:
        heard = (lambda text: say(f"{device.title}: {text}")) if say else None
        try:
            return DeviceResult(device, measure_on(device, paths, settings, sample=sample, say=heard))
        except PartlyMeasuredError as error:
            return DeviceResult(device, error.reports, failure=str(error))
        except (DeviceError, ImportError) as error:
            return DeviceResult(device, failure=str(error))
        except ValueError as error:
            return DeviceResult(device, failure=str(error), is_input_fault=True)

    pool = ThreadPoolExecutor(max_workers=max(1, len(remote)))
    try:
        waiting = [pool.submit(lambda entries: [measure(one) for one in entries], same) for same in _by_place(remote)]
        found |= {result.device.title: result for one in waiting for result in one.result()}
    except BaseException:  # interrupted: end what the threads wait for; they still clean up their devices
        end_all()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    found |= {device.title: measure(device) for device in devices if device.is_local}
    return tuple(found[device.title] for device in devices)


def _by_place(devices: Sequence[Device]) -> list[list[Device]]:
    """Return devices by where they are: the same board under two names, say with other threads, is measured twice."""
    places: dict[tuple[str, str, int | None], list[Device]] = {}
    for device in devices:
        host = device.target.rpartition("@")[2].lower()
        port = device.port or (SSH_PORT if device.scheme == "ssh" else None)
        places.setdefault((device.scheme, host, port), []).append(device)
    return list(places.values())


def _check_names(devices: Sequence[Device]) -> None:
    if not devices:
        raise ValueError("there is no device to measure on")
    titles = [device.title for device in devices]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if twice:
        raise ValueError(f"device {', '.join(twice)} is named more than once")
