"""Bring the runner to a machine, run it there, and bring its answer back; nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from export.devices.connections.address import Device, DeviceError
from export.devices.connections.answer import read_answer
from export.devices.connections.capture import capture
from export.devices.connections.shell import Content, Say, Shell, quote_program
from export.devices.onboard import runner
from export.devices.probing import Probe, probe_models, probe_races, read_probe
from export.scratch import scratch_folder

RUNNER, JOB = "runner.py", "job.json"
PROBE_S = 120.0  # importing onnxruntime from a slow card takes tens of seconds
REMOVE_S = 30.0


class Link(Protocol):
    """A way to a machine that measures."""

    def probe(self) -> Probe:
        """Probe the machine. Raises ``DeviceError`` if that fails."""

    def run(self, job: Mapping[str, Any], files: Mapping[str, Content], say: Say | None) -> dict[str, Any]:
        """Measure; return the runner's answer.

        Args:
            job: As ``runner.run`` takes it.
            files: The files that it names, by file name.
            say: Takes lines of progress.
        """


class LocalLink:
    """This machine: the runner in a separate process, the model files where they are."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def probe(self) -> Probe:
        """Ask this process's runtime."""
        return read_probe(_probe_here())

    def run(self, job: Mapping[str, Any], files: Mapping[str, Content], say: Say | None) -> dict[str, Any]:
        """Run the runner with this interpreter and this process's import path."""
        token = secrets.token_hex(8)
        with scratch_folder() as place:
            for name, content in files.items():
                _place(place / name, content)
            (place / JOB).write_text(json.dumps({**job, "token": token, "watched": True}), encoding="utf-8")
            command = [sys.executable, str(Path(runner.__file__).resolve()), "run", str(place / JOB)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            limit = self.device.timeout_s
            done = capture(command, timeout_s=limit, environment=environment, say=say, holds_stdin=True)
        return read_answer(done, token)


class RemoteLink:
    """A machine behind a shell.

    Args:
        device: The device.
        shell: Its shell.
    """

    def __init__(self, device: Device, shell: Shell) -> None:
        self.device, self.shell = device, shell
        self.python = quote_program(device.python)

    def probe(self) -> Probe:
        """Feed the runner to the device's Python; nothing is copied."""
        token = secrets.token_hex(8)
        words = (token, self.device.work_folder, json.dumps({**probe_models(), **probe_races()}))
        script = f"exec {self.python} - probe {' '.join(map(shlex.quote, words))}"
        limit = min(PROBE_S, self.device.timeout_s)
        return read_probe(read_answer(self.shell.call(script, timeout_s=limit, stdin=[runner_source()]), token))

    def run(self, job: Mapping[str, Any], files: Mapping[str, Content], say: Say | None) -> dict[str, Any]:
        """Copy runner, job and files to a new folder, run, and remove the folder."""
        token = secrets.token_hex(8)
        content = json.dumps({**job, "token": token, "watched": self.shell.holds_stdin}).encode()
        with work_folder(self.device, self.shell, token) as folder:
            self.shell.put(folder, {RUNNER: runner_source(), JOB: content, **files}, timeout_s=self.device.timeout_s)
            where = shlex.quote(folder)
            # the device removes the folder itself: that works, too, when the connection is lost meanwhile
            script = f"cd {where} && {self.python} {RUNNER} run {JOB}; code=$?; cd / && rm -rf {where}; exit $code"
            done = self.shell.call(script, timeout_s=self.device.timeout_s, say=say, holds_stdin=self.shell.holds_stdin)
            return read_answer(done, token)


@contextlib.contextmanager
def work_folder(device: Device, shell: Shell, token: str) -> Iterator[str]:
    """Yield the path of a folder to be made on a device, and always remove it at the end.

    Its name is chosen here and not by the device, so that it is known even if the device's reply is lost.
    """
    folder = f"{device.work_folder}/qkd-{token}"
    try:
        yield folder
    finally:
        with contextlib.suppress(DeviceError):  # the device is gone; the first error tells more
            shell.call(f"rm -rf {shlex.quote(folder)}", timeout_s=min(REMOVE_S, device.timeout_s))


@cache
def runner_source() -> bytes:
    """Return the runner's file."""
    return Path(runner.__file__).read_bytes()


@cache
def _probe_here() -> dict[str, Any]:
    answer: dict[str, Any] = runner.probe({**probe_models(), **probe_races()}, tempfile.gettempdir())
    return answer


def _place(target: Path, content: Content) -> None:
    if isinstance(content, Path):
        target.symlink_to(content.resolve())
    else:
        target.write_bytes(content)
