"""Find devices by address, or by name in a devices file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from export.devices import Device
from qkd.config import Cpu, Positive, Section, Threads
from qkd.config.bind_faults import did_you_mean, place, plain_faults, schema_faults
from qkd.config.binding import bind_section, read_config, shipped_folder
from qkd.failures import ConfigError, first_of
from qkd.foreign.shown import shown_line

FILE_NAME = "devices.yaml"
FORM = "devices: {board: {address: ssh://pi@board, python: env/bin/python}}"


class DeviceEntry(Section):
    """A device of a devices file; the keys of ``export.Device``."""

    address: str = Field(description="local, ssh://[user@]host[:port] or adb://SERIAL")
    python: str = Field("python3", description="the Python there with onnxruntime; relative: to the home folder there")
    folder: str | None = Field(None, description="where a temporary folder may be made; absent: /tmp")
    perf_test: str | None = Field(None, description="path of onnxruntime_perf_test there, to measure without Python")
    ssh_options: tuple[str, ...] = Field((), description="further arguments for ssh")
    timeout_s: Positive | None = Field(None, description="longest duration of one command there, in seconds")
    threads: Threads | None = Field(None, description="intra-op threads; absent: those of the measurement")
    affinity: tuple[Cpu, ...] | None = Field(None, description="CPUs it is pinned to")
    provider: str | None = Field(None, description="auto, cpu, lowbit or onnxruntime's name; several with commas")

    @model_validator(mode="after")
    def _makes_a_device(self) -> DeviceEntry:
        self.device("")
        return self

    def device(self, name: str) -> Device:
        """Return the device, under a name."""
        values = {key: value for key, value in self.model_dump().items() if value is not None}
        return Device(name=name, **values)


class DevicesFile(Section):
    """A devices file."""

    devices: dict[str, DeviceEntry] = Field(description="name -> device")


def read_devices(path: Path) -> dict[str, Device]:
    """Return the devices of a file by name.

    Args:
        path: A YAML file in the form of ``configs/devices.yaml``.

    Raises:
        ConfigError: With every fault: no such file, not YAML, unknown, missing, ill-typed or bad keys.
    """
    if not os.path.exists(path):
        raise ConfigError([f"{path}: no such devices file; its form: {FORM}"])
    data = read_config(path)
    faults = plain_faults(data)
    try:
        bound = bind_section(DevicesFile, data)
    except ValidationError as error:
        faults = [*schema_faults(error, data, DevicesFile), *faults]
    if faults:
        raise ConfigError(first_of([f"{path}: {place('', where).lstrip('.')}: {what}" for where, what in faults]))
    return {name: entry.device(name) for name, entry in bound.devices.items()}


def default_file() -> Path:
    """Return the default devices file: the user's own, or else the shipped one.

    Never one in the current folder, whose author could run commands here (``ssh_options``); it must be named.
    """
    own = own_file()
    return own if own.is_file() else shipped_folder() / FILE_NAME


def own_file() -> Path:
    """Return the path of the user's own devices file: ``~/.config/qkd/devices.yaml``."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "qkd" / FILE_NAME


def resolve_devices(
    names: Sequence[str], file: Path | None = None, *, timeout_s: float | None = None
) -> tuple[Device, ...]:
    """Return the devices with these names or addresses.

    Args:
        names: ``local``, addresses, and names of the devices file.
        file: The devices file; default: :func:`default_file`, read only if a name needs it.
        timeout_s: Of devices whose entry gives none, in seconds.

    Raises:
        ConfigError: With every fault of names, addresses and the file.
    """
    needs_file = file is not None or any("://" not in name and name != "local" for name in names)
    path = file or default_file()
    known = read_devices(path) if needs_file else {}
    devices, faults = [], []
    for name in names:
        try:
            devices.append(_find(name, known, path))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(faults)
    return tuple(
        replace(device, timeout_s=timeout_s) if timeout_s and device.timeout_s == Device.timeout_s else device
        for device in devices
    )


def entry_of(device: Device) -> dict[str, Any]:
    """Return what a device's figures depend on, as plain data; of ``ssh_options``, which may hold secrets, a hash.

    Args:
        device: The device.
    """
    options = "\0".join(device.ssh_options).encode("utf-8", "surrogatepass")
    return {
        "address": device.address,
        "python": device.python,
        "perf_test": device.perf_test,
        "threads": device.threads,
        "affinity": None if device.affinity is None else list(device.affinity),
        "provider": device.provider,
        "ssh_options": hashlib.sha256(options).hexdigest()[:16] if device.ssh_options else None,
    }


def changed_device(folder: Path, names: Sequence[str], file: Path | None) -> str:
    """Return which device's entry has changed since a run measured on it; empty if none has, or that is unknown.

    Args:
        folder: ``bench/`` of the run.
        names: Those of the config's ``bench.on``.
        file: The config's devices file.
    """
    from qkd.report.findings.measurements import records_in  # imports torch

    try:
        devices = {device.title: entry_of(device) for device in resolve_devices(names, file)}
    except (ConfigError, OSError):  # it cannot be measured again here
        return ""
    for _, record in records_in(folder):
        title, then = record.get("device"), record.get("entry")
        if not isinstance(then, dict) or not isinstance(title, str):  # older versions recorded none
            continue
        for key, value in devices.get(title, {}).items():
            if key in then and then[key] != value:
                return f"{key} of device {title} was {then[key]!r}, is {value!r}"
    return ""


def _find(name: str, known: dict[str, Device], path: Path) -> Device:
    if name in known:
        return known[name]
    if name == "local" or "://" in name:
        return Device(name)
    raise ValueError(
        f"device {shown_line(repr(name))} is neither an address (ssh://..., adb://...) nor a name of "
        f"{_place(path)}; {_way_out(name, known)}{_unread(path)}"
    )


def _place(path: Path) -> str:
    """Return a devices file as messages name it; the shipped one is not for editing."""
    if path.is_file() and path != shipped_folder() / FILE_NAME:
        return str(path)
    return f"your devices file, which would be {own_file()} (or --devices FILE)"


def _way_out(name: str, known: Mapping[str, Device]) -> str:
    names = [*known, "local"]
    near = did_you_mean(name, names)
    try:
        Device(f"ssh://{name}")
    except ValueError:
        return near
    return f"{near} (a host, or an alias of ~/.ssh/config, is ssh://{name})"


def _unread(path: Path) -> str:
    here = Path("configs") / FILE_NAME
    return f"; {here} is read where it is named: --devices {here}" if here.is_file() and path != here else ""
