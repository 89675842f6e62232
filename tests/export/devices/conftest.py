"""A real ssh server on loopback, with its own keys and port; nothing of the system is changed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from export import Sample, expect, write_view
from export.devices import Device

KEYGEN = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkd-toolkit"
PACKAGES = ("openssh-server", "libwrap0")


def find_sshd() -> tuple[Path, Path | None]:
    """Return sshd and the folder of libraries it needs, fetched from Debian where it is not installed."""
    installed = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if installed:
        return Path(installed), None
    root = CACHE / "openssh-server"
    if not (root / "usr/sbin/sshd").exists():
        fetch_debian(PACKAGES, root)
    libraries = next(iter((root / "usr/lib").glob("*-linux-gnu*")), None) or next(
        iter((root / "lib").glob("*-linux-*"))
    )
    return root / "usr/sbin/sshd", libraries


def fetch_debian(packages: tuple[str, ...], root: Path) -> None:
    """Unpack Debian packages into a folder; skip the test where that cannot be done."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        pytest.skip("no sshd here, and no apt-get and dpkg to fetch one")
    downloads = root.with_name(f"{root.name}-{os.getpid()}.part")
    downloads.mkdir(parents=True)
    try:
        done = subprocess.run(
            ["apt-get", "download", *packages], cwd=downloads, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            pytest.skip(f"no sshd here, and apt-get cannot fetch one: {done.stderr.strip()[-200:]}")
        for package in downloads.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(downloads / "root")], check=True, timeout=60)
        with contextlib.suppress(OSError):  # another test process was first
            (downloads / "root").rename(root)
    finally:
        shutil.rmtree(downloads, ignore_errors=True)


@dataclass
class SshServer:
    """A running server, and how to reach it.

    Args:
        folder: Of keys, config and log; outside of home folders.
        port: On 127.0.0.1.
        process: The server.
    """

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    made: list[Path] = field(default_factory=list)

    @property
    def user(self) -> str:
        return pwd.getpwuid(os.getuid()).pw_name

    def device(self, **changes: object) -> Device:
        """Return this server as a device; files go to ``work`` beside the keys."""
        values = {
            "address": f"ssh://{self.user}@127.0.0.1:{self.port}",
            "ssh_options": ("-F", str(self.folder / "client")),
            "folder": str(self.folder / "work"),
            "timeout_s": 60.0,
            "python": shutil.which("python3") if "python" not in changes else None,
        }
        return Device(**{**values, **changes})  # type: ignore[arg-type]

    def left(self) -> list[str]:
        """Return what lies in the work folder."""
        return sorted(path.name for path in (self.folder / "work").iterdir())

    def sessions(self) -> list[int]:
        """Return the processes that serve connections."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def script(self, name: str, text: str) -> str:
        """Write an executable; return its path."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    if not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("no OpenSSH client here")
    sshd, libraries = find_sshd()
    folder = tmp_path_factory.mktemp("sshd")
    port = free_port()
    write_keys_and_configs(folder, port)
    process = start(sshd, libraries, folder)
    server = SshServer(folder, port, process)
    try:
        wait_for(server)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_keys_and_configs(folder: Path, port: int) -> None:
    for name in ("host", "user", "stranger"):
        subprocess.run([*KEYGEN, "-f", str(folder / name)], check=True, timeout=30)
    (folder / "work").mkdir()
    shutil.copy(folder / "user.pub", folder / "authorized")
    host_key = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "server").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        "PidFile none\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nStrictModes no\n"
        "PermitRootLogin yes\nMaxStartups 100\n"
    )
    for name in ("user", "stranger"):
        (folder / f"client{'' if name == 'user' else '-stranger'}").write_text(
            f"IdentityFile {folder}/{name}\nIdentitiesOnly yes\nIdentityAgent none\nUserKnownHostsFile {folder}/known\n"
            "GlobalKnownHostsFile none\nStrictHostKeyChecking yes\n"
            f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {pwd.getpwuid(os.getuid()).pw_name}\n"
        )


def start(sshd: Path, libraries: Path | None, folder: Path) -> subprocess.Popen[bytes]:
    command = [str(sshd), "-D", "-e", "-f", str(folder / "server")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    if os.getuid() == 0:
        command = in_own_mounts(command, folder)
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stderr=log, stdout=log, start_new_session=True)


def in_own_mounts(command: list[str], folder: Path) -> list[str]:
    """Give a server that runs as root the user and the folder it wants, in a mount namespace of its own."""
    users = Path("/etc/passwd").read_text()
    if not any(line.startswith("sshd:") for line in users.splitlines()):
        users += "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
    (folder / "passwd").write_text(users)
    script = (
        f"mount --bind {folder}/passwd /etc/passwd && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && "
        f"exec {' '.join(command)}"
    )
    return ["unshare", "--mount", "sh", "-c", script]


def wait_for(server: SshServer) -> None:
    for _ in range(100):
        if server.process.poll() is not None:
            pytest.skip(f"sshd does not run here: {(server.folder / 'log').read_text()[-300:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
            return
        time.sleep(0.05)
    pytest.skip("sshd does not answer here")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def cache_folder() -> Path:
    """Where fetched things are kept between runs of the tests."""
    return CACHE


@pytest.fixture(scope="session")
def here() -> str:
    """The interpreter of the tests, as a device's Python."""
    import sys

    return sys.executable


@pytest.fixture
def packed(residual, tmp_path: Path) -> Path:
    """A file with INT2 and INT4 weights."""
    return write_view(residual, [(1, 3, 15, 15)], tmp_path / "packed.onnx", pack="packed").path


@pytest.fixture
def plain(residual, tmp_path: Path) -> Path:
    """The same net with INT8 weights."""
    return write_view(residual, [(1, 3, 15, 15)], tmp_path / "plain.onnx", pack="int8").path


@pytest.fixture
def sample(plain: Path, packed: Path) -> Sample:
    images = np.random.default_rng(0).standard_normal((20, 3, 15, 15), dtype=np.float32)
    known = expect(Sample(images), {"packed": packed})
    return expect(Sample(images, known.logits["packed"].argmax(1)), {"packed": packed, "plain": plain})
