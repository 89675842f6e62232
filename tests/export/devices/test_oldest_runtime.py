"""The oldest runtime that is supported, and an old Python, behind ssh: everything but packed weights works."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch
from torch import nn

from export import Sample, expect, export_float, export_int8_baseline
from export.devices import Settings, measure_on, probe_device

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PYTHON = ("python3.9-minimal", "libpython3.9-minimal", "libpython3.9-stdlib", "libffi7", "libexpat1", "libssl1.1",
          "zlib1g", "libmpdec3", "libbz2-1.0", "liblzma5")  # fmt: skip


@pytest.fixture
def old(ssh_server, fetcher):
    """Python 3.9 of Debian 11 with onnxruntime 1.14, from the PyPI."""
    if platform.machine() != "x86_64":
        pytest.skip("the old Python is fetched for x86-64")
    root = fetcher.debian("python3.9", "amd64", "bullseye", PYTHON)
    site = fetcher.wheels("site-1.14", "3.9", ("manylinux2014_x86_64",), ("onnxruntime==1.14.1", "numpy==1.24.4"))
    libraries = f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"
    script = (
        f"#!/bin/sh\nPYTHONHOME={root}/usr LD_LIBRARY_PATH={libraries} PYTHONPATH={site} PYTHONDONTWRITEBYTECODE=1 "
        f'exec {root}/usr/bin/python3.9 "$@"\n'
    )
    return ssh_server.device(python=ssh_server.script("python3.9", script))


def test_it_is_probed_and_measured(ssh_server, old, packed, plain, sample):
    probe = probe_device(old)
    assert probe.machine["onnxruntime"] == "1.14.1" and probe.machine["python"].startswith("3.9.")
    assert probe.loads == ("int8",)
    reports = measure_on(old, {"packed": packed, "plain": plain}, Settings(warmup=1, rounds=20), sample=sample)
    assert reports["packed"].repacked == ("int8",) and reports["plain"].repacked == ()
    assert all(report.agreement == 1.0 and report.max_difference == 0 for report in reports.values())
    assert reports["packed"].peak_memory_bytes > reports["packed"].runtime_memory_bytes > 1e6
    assert ssh_server.left() == []


def test_it_takes_the_float_twin_and_its_static_int8(old, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    images = np.random.default_rng(0).standard_normal((16, 3, 8, 8), dtype=np.float32)
    twin = export_float(net, torch.zeros(2, 3, 8, 8), tmp_path / "float.onnx").path
    paths = {"float": twin, "int8": export_int8_baseline(twin, images, tmp_path / "int8.onnx")}
    sample = expect(Sample(images), paths)
    reports = measure_on(old, paths, Settings(warmup=0, rounds=2, memory=False), sample=sample)
    assert reports["float"].agreement == 1.0 and reports["float"].max_difference < 1e-5
    assert reports["int8"].median_ms > 0 and reports["int8"].agreement > 0.8
