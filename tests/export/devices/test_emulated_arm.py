"""A trained student on emulated Arm processors, reached through ssh: the same figures as here.

Debian's arm64 packages, its user-mode qemu and the aarch64 wheels are unpacked into a cache folder; nothing of the
system is changed. How long anything takes there means nothing, and is not looked at.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export import Sample, expect, read_sample
from export.devices import Device, DeviceError, Settings, measure_on, probe_device

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PYTHON = ("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "python3.11-minimal",
          "libpython3.11-minimal", "libpython3.11-stdlib")  # fmt: skip
SYSTEM = (*PYTHON, "dropbear-bin", "libtomcrypt1", "libtommath1", "libgmp10", "libcrypt1", "busybox-static")
NEW = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
OLD = ("manylinux2014_aarch64",)  # the platform decides the version: 1.16, which knows neither INT4 nor INT2
SETTINGS = Settings(warmup=0, rounds=2, memory=False)


# Run as root of a separate user namespace: only there does the kernel hand aarch64 programs to the emulator.
START = r"""set -e
root=$1 qemu=$2 site=$3 port=$4
mount -t proc proc $root/proc
mount -t binfmt_misc binfmt_misc $root/proc/sys/fs/binfmt_misc
magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
printf '%s' ":qemu-aarch64:M::$magic:$mask:$qemu:PF" > $root/proc/sys/fs/binfmt_misc/register
mount --rbind /dev $root/dev
mount --rbind /sys $root/sys
mount --bind $site $root/site
export PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root
chroot $root /bin/busybox --install -s /bin || true
chroot $root /usr/bin/dropbearkey -t ed25519 -f /etc/dropbear/key
exec chroot $root /usr/sbin/dropbear -F -E -e -s -r /etc/dropbear/key -p 127.0.0.1:$port
"""
SCRIPT = '#!/bin/sh\nPYTHONPATH=/site PYTHONDONTWRITEBYTECODE=1 exec /usr/bin/python3.11 "$@"\n'


class Arm:
    """An aarch64 user space.

    Args:
        root: Debian's Python and what it needs.
        qemu: The emulator.
    """

    def __init__(self, root: Path, qemu: Path) -> None:
        self.root, self.qemu = root, qemu

    def python(self, cpu: str, site: Path) -> str:
        """Return the text of a script that is this user space's Python on a processor."""
        return (
            f"#!/bin/sh\nPYTHONPATH={site} PYTHONDONTWRITEBYTECODE=1 "
            f'exec {self.qemu} -cpu {cpu} -L {self.root} {self.root}/usr/bin/python3.11 "$@"\n'
        )


@pytest.fixture(scope="module")
def arm(fetcher) -> Arm:
    if platform.machine() != "x86_64":
        pytest.skip("the emulator is fetched for x86-64")
    root = fetcher.debian("aarch64-python", "arm64", "bookworm", PYTHON)
    emulator = "usr/bin/qemu-aarch64"
    return Arm(root, fetcher.debian("qemu-aarch64", "amd64", "trixie", ("qemu-user",), only=emulator) / emulator)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export folder of a student trained on digits for some epochs."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["student.train.epochs=6", "student.phases.0.epochs=5", "teacher.train.epochs=6", "data.train_limit=null"]
    for stage in ("teacher", "search", "distill", "export"):
        command = [sys.executable, "-m", "qkd.cli", stage, "digits/smoke", *words, "--runs-dir", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder / "digits-smoke" / "export"


def few(sample: Sample, count: int = 64) -> Sample:
    logits = {name: values[:count] for name, values in sample.logits.items()}
    return Sample(sample.images[:count], sample.labels[:count], logits)


@pytest.mark.parametrize(("cpu", "has_dotprod"), [("cortex-a72", False), ("cortex-a76", True)])
def test_a_trained_student_computes_the_same_on_arm(ssh_server, fetcher, arm, trained, cpu, has_dotprod):
    site = fetcher.wheels("aarch64-site-new", "3.11", NEW, ("onnxruntime", "numpy"))
    device = ssh_server.device(python=ssh_server.script(f"python-{cpu}", arm.python(cpu, site)), timeout_s=600.0)
    probe = probe_device(device)
    assert probe.machine["architecture"] == "aarch64"
    assert ("asimddp" in probe.machine["cpu_flags"]) == has_dotprod
    assert probe.loads[:3] == ("int2", "int4", "int8")
    paths = {"student": trained / "student.onnx", "teacher": trained / "teacher.onnx"}
    sample = few(read_sample(trained / "sample.npz"))
    assert len(np.unique(sample.logits["student"].argmax(1))) > 3, "a collapsed student proves nothing"
    reports = measure_on(device, paths, SETTINGS, sample=sample)
    student, teacher = reports["student"], reports["teacher"]
    assert student.images == 64 and student.machine["cpu"].startswith(cpu.title())
    assert student.agreement == 1.0 and teacher.agreement == 1.0
    here = measure_on(ssh_server.device(python=sys.executable), paths, SETTINGS, sample=sample)["student"]
    assert student.accuracy == here.accuracy > 0.2
    assert student.max_difference == pytest.approx(here.max_difference, abs=1e-4)
    assert ssh_server.left() == []


def test_an_old_runtime_on_arm_gets_int8_weights(ssh_server, fetcher, arm, trained):
    site = fetcher.wheels("aarch64-site-old", "3.11", OLD, ("onnxruntime", "numpy<2"))
    device = ssh_server.device(python=ssh_server.script("python-old", arm.python("cortex-a72", site)), timeout_s=600.0)
    probe = probe_device(device)
    assert probe.machine["onnxruntime"].startswith("1.16") and probe.loads == ("int8",)
    paths = {"student": trained / "student.onnx"}
    sample = few(expect(read_sample(trained / "sample.npz"), paths))
    report = measure_on(device, paths, SETTINGS, sample=sample)["student"]
    assert report.repacked == ("int8",) and report.agreement == 1.0
    assert report.size_bytes > paths["student"].stat().st_size
    assert ssh_server.left() == []


@pytest.fixture(scope="module")
def arm_system(fetcher, arm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """A whole aarch64 system behind its own ssh server, which runs emulated, too."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a separate system needs root and unshare")
    site = fetcher.wheels("aarch64-site-new", "3.11", NEW, ("onnxruntime", "numpy"))
    folder = tmp_path_factory.mktemp("arm")
    root = lay_out(folder, fetcher.debian("aarch64-system", "arm64", "bookworm", SYSTEM))
    port, log = free_port(), folder / "log"
    words = [str(root), str(arm.qemu), str(site), str(port)]
    command = ["unshare", "--user", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", f"read go; {START}", "sh"]
    environment = {**os.environ, "QEMU_CPU": "cortex-a76"}
    with log.open("wb") as out:
        system = subprocess.Popen([*command, *words], stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment)
    try:
        admit(system)
        device = Device(
            f"ssh://root@127.0.0.1:{port}", ssh_options=("-F", str(folder / "client")), folder="/tmp",
            python="/usr/bin/python-site", timeout_s=600.0,
        )  # fmt: skip
        wait_for(device, system, log)
        yield device
    finally:
        system.kill()
        system.wait()
        system.stdin.close()  # type: ignore[union-attr]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def lay_out(folder: Path, packages: Path) -> Path:
    """Copy the packages and add what a system needs; return its root."""
    root = folder / "root"
    shutil.copytree(packages, root, symlinks=True)
    for name in ("proc", "sys", "dev", "tmp", "site", "root/.ssh", "etc/dropbear"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/shells").write_text("/bin/sh\n")
    (root / "usr/bin/python-site").write_text(SCRIPT)
    (root / "usr/bin/python-site").chmod(0o755)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True, timeout=60)
    shutil.copy(folder / "key.pub", root / "root/.ssh/authorized_keys")
    for name, mode in (("root", 0o700), ("root/.ssh", 0o700), ("root/.ssh/authorized_keys", 0o600)):
        (root / name).chmod(mode)
    (folder / "client").write_text(
        f"IdentityFile {folder / 'key'}\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
        "UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    return root


def admit(system: subprocess.Popen[bytes]) -> None:
    """Make root of this system root of the new one, and let it start."""
    ours, deadline = os.readlink("/proc/self/ns/user"), time.monotonic() + 10
    while os.readlink(f"/proc/{system.pid}/ns/user") == ours:
        if system.poll() is not None or time.monotonic() > deadline:
            pytest.skip("this kernel gives no user namespace")
        time.sleep(0.05)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{system.pid}/{name}").write_text("0 0 1\n")
    assert system.stdin is not None
    system.stdin.write(b"go\n")
    system.stdin.flush()


def wait_for(device: Device, system: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the system answers; skip where the kernel does not let it start."""
    deadline = time.monotonic() + 120
    while True:
        if system.poll() is not None:
            pytest.skip(f"this kernel does not run an aarch64 system: {log.read_text()[-300:]}")
        try:
            probe_device(device)
        except DeviceError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        else:
            return


def test_ssh_into_an_emulated_system(arm_system, trained):
    before = names_of(arm_system, "/tmp")
    probe = probe_device(arm_system)
    assert probe.machine["architecture"] == "aarch64" and "asimddp" in probe.machine["cpu_flags"]
    paths = {"student": trained / "student.onnx", "teacher": trained / "teacher.onnx"}
    sample = few(read_sample(trained / "sample.npz"))
    reports = measure_on(arm_system, paths, SETTINGS, sample=sample)
    assert {name: report.agreement for name, report in reports.items()} == {"student": 1.0, "teacher": 1.0}
    assert reports["student"].images == 64 and reports["student"].accuracy > 0.2
    assert names_of(arm_system, "/tmp") == before, "nothing stays behind"


def names_of(device: Device, folder: str) -> set[str]:
    words = ["ssh", *device.ssh_options, "-p", device.address.rpartition(":")[2], "root@127.0.0.1", f"ls -A {folder}"]
    return set(subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.split())
