"""A trained student on emulated Arm processors, reached through ssh: the same figures as here.

Debian's arm64 packages, its user-mode qemu and the aarch64 wheels are unpacked into a cache folder; nothing of the
system is changed. How long anything takes there means nothing, and is not looked at.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export import Sample, expect, read_sample
from export.devices import Settings, measure_on, probe_device

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PYTHON = ("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "python3.11-minimal",
          "libpython3.11-minimal", "libpython3.11-stdlib")  # fmt: skip
NEW = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
OLD = ("manylinux2014_aarch64",)  # the platform decides the version: 1.16, which knows neither INT4 nor INT2
SETTINGS = Settings(warmup=0, rounds=2, memory=False)


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
