"""A real ssh server on loopback, with its own keys and port; nothing of the system is changed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
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
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


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
        """Return the contents of the work folder."""
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
    """Give a server that runs as root the user and the folder it wants, in a separate mount namespace."""
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


def mirror() -> str:
    """Return where this machine gets Debian's packages from; skip the test where it does not say."""
    lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for path in (path for path in lists if path.is_file()):
        for line in path.read_text(errors="replace").splitlines():
            words = line.split()
            if words and words[0] in ("deb", "URIs:"):
                found = [word for word in words[1:] if "://" in word and "security" not in word]
                if found:
                    return found[0]
    pytest.skip("this machine's apt sources name no mirror of Debian")


class Fetcher:
    """Fetches Debian packages of any release and processor, and wheels, into folders that are kept between runs.

    The system is not changed: apt keeps to a separate folder. Where something cannot be had, the test is skipped.
    """

    def debian(
        self, name: str, architecture: str, suite: str, packages: tuple[str, ...], only: str | None = None
    ) -> Path:
        """Return a folder of unpacked packages; ``only`` names the one file of a large package that is kept."""
        missing = [program for program in ("apt-get", "dpkg") if shutil.which(program) is None]
        if missing or not KEYRING.exists():
            pytest.skip(f"{name}: {', '.join(missing) or KEYRING} is missing, so Debian's packages cannot be fetched")
        place = CACHE / name
        if (place / "root").exists():
            return place / "root"
        shutil.rmtree(place, ignore_errors=True)
        for folder in ("state/lists/partial", "cache/archives/partial", "debs"):
            (place / folder).mkdir(parents=True)
        (place / "status").touch()
        (place / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
        (place / "apt.conf").write_text(
            f'APT::Architecture "{architecture}";\nAPT::Architectures {{ "{architecture}"; }};\n'
            f'Dir::State "{place}/state";\nDir::State::status "{place}/status";\nDir::Cache "{place}/cache";\n'
            f'Dir::Etc::sourcelist "{place}/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
            'APT::Sandbox::User "root";\n'
        )
        call("apt-get", "update", cwd=place / "debs", APT_CONFIG=str(place / "apt.conf"))
        call("apt-get", "download", *packages, cwd=place / "debs", APT_CONFIG=str(place / "apt.conf"))
        for package in (place / "debs").glob("*.deb"):
            call("dpkg", "-x", str(package), str(place / "part"))
        if only is not None:
            (place / "all").mkdir()
            (place / "part").rename(place / "all" / "root")
            (place / "part" / only).parent.mkdir(parents=True)
            (place / "all" / "root" / only).rename(place / "part" / only)
            shutil.rmtree(place / "all")
        for folder in ("debs", "state", "cache"):
            shutil.rmtree(place / folder)
        return (place / "part").rename(place / "root")

    def wheels(self, name: str, python: str, platforms: tuple[str, ...], packages: tuple[str, ...]) -> Path:
        """Return a folder of unpacked wheels for a Python such as ``3.11``."""
        place, site = CACHE / name, CACHE / name / "site"
        if site.exists():
            return site
        shutil.rmtree(place, ignore_errors=True)
        tags = [word for tag in platforms for word in ("--platform", tag)]
        tags += [word for tag in (f"cp{python.replace('.', '')}", "abi3", "none") for word in ("--abi", tag)]
        call(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *tags,
            "--python-version", python, "--implementation", "cp", "--dest", str(place / "wheels"), *packages,
        )  # fmt: skip
        for wheel in (place / "wheels").glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(place / "part")
        shutil.rmtree(place / "wheels")
        return (place / "part").rename(site)


def call(*command: str, cwd: Path | None = None, **environment: str) -> None:
    """Run a command of a set-up; skip the test where it fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        pytest.skip(f"{' '.join(command[:4])} failed: {done.stderr.strip()[-300:]}")


@pytest.fixture(scope="session")
def fetcher() -> Fetcher:
    return Fetcher()


@pytest.fixture(scope="session")
def here() -> str:
    """The interpreter of the tests, as a device's Python."""
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
