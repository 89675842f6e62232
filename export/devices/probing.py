"""Ask a machine to describe itself, and which storage of weights its runtime loads."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from export.devices.connections.address import DeviceError
from export.storage.blocked import WIDTHS, race_models
from export.storage.packing import INT2, INT4, INT8, probe_model
from export.versions import OLDEST, version_text

KINDS = (INT2, INT4, INT8)  # narrowest first
# Debian's own Python takes no packages (externally-managed-environment): an environment works everywhere
WITH_RUNTIME = (
    "make an environment there (python3 -m venv env; env/bin/pip install onnxruntime numpy) and name its Python: "
    "`--python env/bin/python`, from the home folder there, or `python:` in a devices file"
)


@dataclass(frozen=True)
class Probe:
    """A machine's answer to a probe.

    Args:
        machine: CPU, flags, cores, architecture, kernel, memory and versions (None: not installed).
        loads: Names of the element types whose tiny model the runtime loads, and of the blocks that it is fast at.
        providers: Execution providers of the runtime.
        memory_available_bytes: Free memory; None if the system does not say.
        free_disk_bytes: In the folder the files would go to; likewise.
        runtime_error: Why onnxruntime could not be imported; None if it could.
        python: Path of the interpreter.
    """

    machine: Mapping[str, Any]
    loads: tuple[str, ...]
    providers: tuple[str, ...]
    memory_available_bytes: int | None
    free_disk_bytes: int | None
    runtime_error: str | None
    python: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    def check(self) -> None:
        """Raise unless this machine can measure at all.

        Raises:
            DeviceError: If onnxruntime or numpy is missing, or the runtime loads none of the tiny models.
        """
        if self.runtime_error is not None:
            raise DeviceError(f"{self.python} has no working onnxruntime ({self.runtime_error}): {WITH_RUNTIME}")
        if self.machine.get("numpy") is None:
            raise DeviceError(f"{self.python} has no working numpy: {WITH_RUNTIME}")
        if not self.loads:
            raise DeviceError(
                f"onnxruntime {self.machine.get('onnxruntime')} there loads none of the probe models, not even int8 "
                f"weights in opset {INT8.opset}: it must be at least {version_text(OLDEST)}"
            )

    def check_room(self, needed_bytes: int) -> None:
        """Raise if there is not enough room for the files to be copied.

        Raises:
            DeviceError: If less is free than needed.
        """
        free = self.free_disk_bytes
        if free is not None and free < needed_bytes:
            raise DeviceError(
                f"{needed_bytes:,} bytes must be copied, {free:,} are free there: make room, or set folder"
            )


@cache
def probe_models() -> dict[str, str]:
    """Return the tiny model of each element type, as base64."""
    return {kind.name: _text(probe_model(kind)) for kind in KINDS}


@cache
def probe_races() -> dict[str, tuple[str, str, int]]:
    """Return what tests whether a runtime is fast at linear layers in blocks: the arguments of ``wins_race``."""
    races = {blocks.name: race_models(blocks) for blocks in WIDTHS}
    return {name: (_text(special), _text(plain), number) for name, (special, plain, number) in races.items()}


def _text(model: bytes) -> str:
    return base64.b64encode(model).decode("ascii")


def read_probe(answer: Mapping[str, Any]) -> Probe:
    """Return the probe that the runner answered.

    Raises:
        DeviceError: If it is not what the runner writes.
    """
    try:
        machine, loads = dict(answer["machine"]), dict(answer["loads"])
        error = answer["runtime_error"]
        return Probe(
            machine=machine,
            loads=tuple(kind.name for kind in (*KINDS, *WIDTHS) if loads.get(kind.name) is True),
            providers=tuple(str(name) for name in answer["providers"]),
            memory_available_bytes=_count(answer["memory_available_bytes"]),
            free_disk_bytes=_count(answer["free_disk_bytes"]),
            runtime_error=None if error is None else str(error),
            python=str(answer["executable"]) or "the Python there",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceError(f"the device's answer to the probe is not the runner's ({error!r})") from error


def _count(value: Any) -> int | None:
    return None if value is None else int(value)
