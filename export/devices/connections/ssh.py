"""Reach a device with the system's OpenSSH client, which knows the user's config, agent and jump hosts."""

from __future__ import annotations

import shlex
import tarfile
from collections.abc import Iterable, Mapping

from export.devices.connections.address import Device, DeviceError
from export.devices.connections.capture import Captured, capture, printable
from export.devices.connections.shell import Content, Say, blocks_of, size_of

LINK_FAILED = 255  # ssh's own failures; commands have 0 to 254 by convention
# After the user's own options, of which ssh takes the first. Alive messages find a dead network within a minute.
OPTIONS = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=3")
CAUSES = {
    "Connection refused": "no ssh server listens there: start it, or correct the port",
    "Permission denied": "the device takes none of your keys: try `ssh` by hand, load the key into ssh-agent, or name "
    "it in ~/.ssh/config",
    "Host key verification failed": "its host key is not the known one, or not known yet: connect once by hand",
    "Could not resolve hostname": "there is no such host: correct the name, or add it to ~/.ssh/config",
    "No route to host": "the network does not reach it: is it on?",
    "timed out": "it does not answer: is it on, and in this network?",
    "Too many authentication failures": "name the key in ~/.ssh/config (IdentitiesOnly yes)",
}


class SshShell:
    """A device behind ssh; every call opens a separate connection (share them with ControlMaster, if you like).

    Args:
        device: One with an ssh address.
    """

    holds_stdin = True

    def __init__(self, device: Device) -> None:
        self.device = device
        port = [] if device.port is None else ["-p", str(device.port)]
        settings = [word for option in OPTIONS for word in ("-o", option)]
        self.command = ["ssh", "-T", *device.ssh_options, *settings, *port, "--", device.target]

    def call(
        self,
        script: str,
        *,
        timeout_s: float,
        stdin: Iterable[bytes] = (),
        say: Say | None = None,
        holds_stdin: bool = False,
    ) -> Captured:
        """Run a script of sh on the device, whatever the user's shell is there.

        Raises:
            DeviceError: If ssh cannot connect, the connection is lost, or the time is up.
        """
        command = [*self.command, f"sh -c {shlex.quote(script)}"]
        done = capture(command, timeout_s=timeout_s, stdin=stdin, say=say, holds_stdin=holds_stdin)
        if done.code == LINK_FAILED:
            raise DeviceError(_explain(done.stderr, self.device.target))
        return done

    def put(self, folder: str, files: Mapping[str, Content], *, timeout_s: float) -> None:
        """Make a folder for this user alone, and unpack the files there from a tar stream.

        Raises:
            DeviceError: As :meth:`call`, and if the device cannot write them (disk full, not allowed).
        """
        where = shlex.quote(folder)
        done = self.call(
            f"umask 077 && mkdir {where} && tar -xf - -C {where}", timeout_s=timeout_s, stdin=tar_stream(files)
        )
        if done.code:
            raise DeviceError(f"cannot write to {folder} on the device: {printable(done.stderr) or 'no reason given'}")


def tar_stream(files: Mapping[str, Content]) -> Iterable[bytes]:
    """Return a tar archive in blocks, readable by any tar.

    Args:
        files: Name -> content; names without folders.
    """
    for name, content in files.items():
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = size_of(content), 0o600
        yield entry.tobuf(tarfile.USTAR_FORMAT)
        yield from blocks_of(content)
        yield bytes(-entry.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _explain(stderr: str, target: str) -> str:
    words = printable(stderr) or "the connection was lost"
    for cause, way_out in CAUSES.items():
        if cause in stderr:
            return f"ssh to {target} failed ({words}): {way_out}"
    return f"ssh to {target} failed or was cut off ({words}): try `ssh {target}` by hand"
