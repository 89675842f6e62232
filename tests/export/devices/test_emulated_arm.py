"""A trained student on emulated Arm processors, reached through ssh: the same figures as here.

Debian's arm64 packages, its user-mode qemu and the aarch64 wheels are unpacked into a cache folder; nothing of the
system is changed. How long anything takes there means nothing, and is not looked at.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from export import Sample, expect, read_sample
from export.devices import Settings, measure_on, probe_device

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"
PYTHON = ("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "python3.11-minimal",
          "libpython3.11-minimal", "libpython3.11-stdlib")  # fmt: skip
NEW = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
OLD = ("manylinux2014_aarch64",)  # the platform decides the version: 1.16, which knows neither INT4 nor INT2
SETTINGS = Settings(warmup=0, rounds=2, memory=False)


class Arm:
    """An aarch64 user space in a folder.

    Args:
        folder: Where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.qemu = folder / "qemu/root/usr/bin/qemu-aarch64"
        self.root = folder / "python/root"

    def set_up(self) -> None:
        """Fetch what is missing."""
        if not self.root.exists():
            fetch(self.folder / "python", "arm64", "bookworm", PYTHON)
        if not self.qemu.exists():
            fetch(self.folder / "qemu", "amd64", "trixie", ("qemu-user",))

    def site(self, name: str, platforms: tuple[str, ...], packages: tuple[str, ...]) -> Path:
        """Return a folder of unpacked wheels."""
        site = self.folder / name
        if not site.exists():
            wheels = self.folder / f"{name}-wheels"
            tags = [word for tag in platforms for word in ("--platform", tag)]
            call(
                sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *tags,
                "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "abi3",
                "--abi", "none", "--dest", str(wheels), *packages,
            )  # fmt: skip
            part = self.folder / f"{name}.part"
            for wheel in wheels.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(part)
            part.rename(site)
            shutil.rmtree(wheels)
        return site

    def python(self, cpu: str, site: Path) -> str:
        """Return the text of a script that is this user space's Python on a processor."""
        return (
            f"#!/bin/sh\nPYTHONPATH={site} PYTHONDONTWRITEBYTECODE=1 "
            f'exec {self.qemu} -cpu {cpu} -L {self.root} {self.root}/usr/bin/python3.11 "$@"\n'
        )


def fetch(place: Path, architecture: str, suite: str, packages: tuple[str, ...]) -> None:
    """Unpack Debian packages of any suite and architecture, with an apt that keeps to its own folder."""
    shutil.rmtree(place, ignore_errors=True)
    for name in ("state/lists/partial", "cache/archives/partial", "debs"):
        (place / name).mkdir(parents=True)
    (place / "status").touch()
    lines = [f"deb [signed-by={KEYRING}] {MIRROR} {suite} main"]
    (place / "sources.list").write_text("\n".join(lines) + "\n")
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
    shutil.rmtree(place / "debs")
    shutil.rmtree(place / "state")
    (place / "part").rename(place / "root")


def call(*command: str, cwd: Path | None = None, **environment: str) -> None:
    """Run a command of the set-up; skip the tests where it cannot be done."""
    import os

    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        pytest.skip(f"no aarch64 user space: {' '.join(command[:4])} failed: {done.stderr.strip()[-300:]}")


@pytest.fixture(scope="module")
def arm(cache_folder: Path) -> Arm:
    missing = [name for name in ("apt-get", "dpkg") if shutil.which(name) is None]
    if missing or not KEYRING.exists():
        pytest.skip(f"no aarch64 user space: {', '.join([*missing, '' if KEYRING.exists() else str(KEYRING)])} missing")
    user_space = Arm(cache_folder / "aarch64")
    user_space.set_up()
    return user_space


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
def test_a_trained_student_computes_the_same_on_arm(ssh_server, arm, trained, cpu, has_dotprod):
    site = arm.site("site-new", NEW, ("onnxruntime", "numpy"))
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


def test_an_old_runtime_on_arm_gets_int8_weights(ssh_server, arm, trained):
    site = arm.site("site-old", OLD, ("onnxruntime", "numpy<2"))
    device = ssh_server.device(python=ssh_server.script("python-old", arm.python("cortex-a72", site)), timeout_s=600.0)
    probe = probe_device(device)
    assert probe.machine["onnxruntime"].startswith("1.16") and probe.loads == ("int8",)
    paths = {"student": trained / "student.onnx"}
    sample = few(expect(read_sample(trained / "sample.npz"), paths))
    report = measure_on(device, paths, SETTINGS, sample=sample)["student"]
    assert report.repacked == ("int8",) and report.agreement == 1.0
    assert report.size_bytes > paths["student"].stat().st_size
    assert ssh_server.left() == []
