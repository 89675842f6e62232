"""Reach an Android device with the system's adb."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from export.devices.connections.address import Device, DeviceError
from export.devices.connections.capture import Captured, capture, printable
from export.devices.connections.shell import Content, Say, blocks_of
from export.scratch import scratch_folder

QUICK_S = 60.0  # for commands that only ask or move names
STATES = {
    "unauthorized": "unlock it and allow debugging from this computer",
    "offline": "plug it in again, or `adb reconnect`",
    "no permissions": "add the udev rules of the device, or restart the adb server",
    "recovery": "boot the device normally",
    "bootloader": "boot the device normally",
    "sideload": "boot the device normally",
}


class AdbShell:
    """A device behind adb.

    Args:
        device: One with an adb address; its serial is one of ``adb devices``.

    Raises:
        DeviceError: If adb is missing, or the device is not there or not ready.
    """

    holds_stdin = False  # before Android 7 a command's stdin is a terminal, which stays open; its alarm ends it

    def __init__(self, device: Device) -> None:
        self.device = device
        self.command = ["adb", "-s", device.target]
        _require(device.target)

    def call(
        self,
        script: str,
        *,
        timeout_s: float,
        stdin: Iterable[bytes] = (),
        say: Say | None = None,
        holds_stdin: bool = False,
    ) -> Captured:
        """Run a script of sh on the device.

        The exit code is printed after the output, too: devices older than Android 7 hand none back.

        Raises:
            DeviceError: If the device is gone, or the time is up.
        """
        mark = f"qkd-exit-{secrets.token_hex(8)}"
        text = f"sh -c {shlex.quote(script)}; code=$?; echo; echo {mark}:$code:"
        command = [*self.command, "shell", text]
        done = capture(command, timeout_s=timeout_s, stdin=stdin, say=say, holds_stdin=holds_stdin)
        found = re.search(rf"\r?\n?{mark}:(\d+):".encode(), done.stdout)
        if found is None:
            words = printable(done.stderr) or printable(done.stdout.decode("utf-8", "replace")) or "no reason given"
            raise DeviceError(f"adb lost {self.device.target} (exit code {done.code}: {words}); see `adb devices`")
        return replace(done, code=int(found[1]), stdout=done.stdout[: found.start()])

    def put(self, folder: str, files: Mapping[str, Content], *, timeout_s: float) -> None:
        """Make the folder and push the files.

        Raises:
            DeviceError: As :meth:`call`, and if the device cannot write them.
        """
        made = self.call(f"umask 077 && mkdir {shlex.quote(folder)}", timeout_s=QUICK_S)
        if made.code:
            raise DeviceError(f"cannot make {folder} on the device: {_words(made)}")
        with scratch_folder("qkd-push-") as place:
            for name, content in files.items():
                source = content if isinstance(content, Path) else place / name
                if not isinstance(content, Path):
                    source.write_bytes(b"".join(blocks_of(content)))
                done = capture([*self.command, "push", str(source), f"{folder}/{name}"], timeout_s=timeout_s)
                if done.code:
                    raise DeviceError(f"cannot copy {name} to {folder} on the device: {_words(done)}")


def _words(done: Captured) -> str:
    return printable(done.stderr) or printable(done.stdout.decode("utf-8", "replace")) or "no reason given"


def _require(serial: str) -> None:
    done = capture(["adb", "devices"], timeout_s=QUICK_S)
    if done.code:
        raise DeviceError(f"adb devices failed: {_words(done)}")
    states = read_devices(done.stdout.decode("utf-8", "replace"))
    if serial not in states:
        raise DeviceError(f"adb knows no device {serial}; it has {', '.join(states) or 'none'}: plug it in, or connect")
    state = states[serial]
    if state != "device":
        way_out = next((words for key, words in STATES.items() if state.startswith(key)), "see `adb devices`")
        raise DeviceError(f"{serial} is {state}: {way_out}")


def read_devices(text: str) -> dict[str, str]:
    """Return serial -> state of what ``adb devices`` printed, without daemon messages."""
    _, _, body = text.partition("List of devices attached")
    rows = (line.strip().partition("\t") for line in body.splitlines() if "\t" in line)
    return {printable(serial): printable(state) for serial, _, state in rows}
