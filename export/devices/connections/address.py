"""Say which device is meant: this machine, one behind ssh, or one behind adb."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from export.defaults import MOST_THREADS, TIMEOUT_S

LOCAL = "local"
SCHEMES = ("ssh", "adb")
FOLDERS = {"ssh": "/tmp", "adb": "/data/local/tmp"}  # where adb's shell user may write and execute  # noqa: S108
LONGEST_S = 1e6  # eleven days; beyond some such number the system's clock calls overflow
FORMS = "local, ssh://[user@]host[:port] or adb://SERIAL"
NAME = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.@:%\[\]-]*")  # never starts like an option


class DeviceError(RuntimeError):
    """A device could not be reached, or could not measure; the message says what to do."""


@dataclass(frozen=True)
class Device:
    """Where to measure, and how to work there.

    Args:
        address: ``local``, ``ssh://[user@]host[:port]`` (the host may be an alias of ``~/.ssh/config``), or
            ``adb://SERIAL``.
        name: Shown in tables and used for file names; by default the address.
        python: The Python there that has onnxruntime: a name on the PATH or a path; a relative path, ``~/`` or not,
            starts in the home folder there.
        folder: Where a temporary folder may be made; by default ``/tmp``, for adb ``/data/local/tmp``.
        perf_test: Path of ``onnxruntime_perf_test`` there; if given, it measures instead of Python.
        ssh_options: Further arguments of ``ssh``, such as ``-F my_config``; if ``~/.ssh/config`` is not enough.
        timeout_s: Longest duration of one command there, in seconds.
        threads: Intra-op threads on this device; by default that of the measurement.
        affinity: CPUs to pin to; by default those of the measurement.
        provider: Execution provider, or several with commas; by default those of the measurement.

    Raises:
        ValueError: If a field is out of range, or the address has none of these forms.
    """

    address: str = LOCAL
    name: str = ""
    python: str = "python3"
    folder: str | None = None
    perf_test: str | None = None
    ssh_options: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S
    threads: int | None = None
    affinity: tuple[int, ...] | None = None
    provider: str | None = None

    def __post_init__(self) -> None:
        check_address(self.address)
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")
        if self.timeout_s > LONGEST_S:
            raise ValueError(f"timeout_s must be at most {LONGEST_S:g}, got {self.timeout_s}")
        if not self.python or self.python.startswith("-"):
            raise ValueError(f"python must be a program, got {self.python!r}")
        if self.python.startswith("~") and not self.python.startswith("~/"):
            raise ValueError(f"python: only ~/, the home folder there, is known, got {self.python!r}; give its path")
        for field in ("folder", "perf_test"):
            value = getattr(self, field)
            if value is not None and not PurePosixPath(value).is_absolute():
                raise ValueError(f"{field} must be an absolute path on the device, got {value!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ValueError(f"threads must be at most {MOST_THREADS}, got {self.threads}")
        texts = (self.name, self.python, self.folder, self.perf_test, self.provider, *self.ssh_options)
        if any("\0" in text for text in texts if text is not None):
            raise ValueError(f"device {self.title!r}: a text of it holds the character NUL, which no command takes")

    @property
    def title(self) -> str:
        """The name, or the address if there is none."""
        return self.name or self.address

    @property
    def is_local(self) -> bool:
        """Whether this is the machine the toolkit runs on."""
        return self.address == LOCAL

    @property
    def scheme(self) -> str:
        """``local``, ``ssh`` or ``adb``."""
        return LOCAL if self.is_local else self.address.partition("://")[0]

    @property
    def work_folder(self) -> str:
        """Where the temporary folder is made on a remote device."""
        return self.folder or FOLDERS.get(self.scheme, "")

    @property
    def target(self) -> str:
        """``[user@]host`` for ssh, the serial for adb."""
        return _split(self.address)[0]

    @property
    def port(self) -> int | None:
        """The port of an ssh address, if it has one."""
        return _split(self.address)[1]


def as_device(device: str | Device) -> Device:
    """Return the device at an address; a ``Device`` is returned unchanged.

    Args:
        device: An address (``local``, ``ssh://[user@]host[:port]``, ``adb://SERIAL``), or a device.

    Returns:
        The device.

    Raises:
        ValueError: If the address has an unknown form.
    """
    return device if isinstance(device, Device) else Device(device)


def check_address(address: str) -> None:
    """Raise unless the address has one of the known forms.

    Raises:
        ValueError: If it does not, or holds characters that neither a host nor a serial has.
    """
    if address == LOCAL:
        return
    scheme, mark, rest = address.partition("://")
    if not mark or scheme not in SCHEMES:
        raise ValueError(f"device {address!r} is not an address; it must be {FORMS}")
    if not NAME.fullmatch(rest) or "/" in rest:
        raise ValueError(f"device {address!r}: {rest!r} is no {'host' if scheme == 'ssh' else 'serial'}; give {FORMS}")
    if scheme == "ssh":
        _split(address)


def _split(address: str) -> tuple[str, int | None]:
    rest = address.partition("://")[2]
    if address.startswith("adb://"):
        return rest, None  # a serial may be host:port
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"device {address!r}: {error}; give {FORMS}") from error
    if not host or parts.password is not None:
        raise ValueError(f"device {address!r}: give {FORMS}; passwords are not taken, use a key or ssh-agent")
    user = f"{parts.username}@" if parts.username else ""
    typed = rest.rpartition("@")[2]  # urlsplit lowers the case, which an alias of ~/.ssh/config may need
    plain = typed.removesuffix(f":{port}") if port is not None else typed
    return f"{user}{plain.strip('[]')}", port
