"""The provider on emulated Arm processors: these tests again, there, and the wheel alone.

The library is cross-compiled; Python, onnxruntime and pytest are those of aarch64. An emulator computes what the
processor would; it says nothing of time. What is counted instead is in `benchmarks/results/lowbit_arm.json`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import beside
import emulation
import numpy as np
import pytest

from export.lowbit import build, cross, deployment

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
Nets = Callable[[int], tuple[bytes, tuple[int, int]]]


def test_the_recorded_counts_are_what_is_claimed() -> None:
    """ResNet-18 W2A2 without dot products: at most half of int8's instructions, 0.45 of FP32's, identical logits."""
    record = json.loads((ROOT / "benchmarks/results/lowbit_arm.json").read_text())
    assert {"cortex-a53", "cortex-a72"} <= record["nets"]["resnet18"].keys()
    for row in record["nets"]["resnet18"].values():
        assert not row["has_dot_product"] and row["lowbit"]["identical"]
        assert row["lowbit"]["over_int8"] <= 0.50 and row["variants"]["lowbit"]["over_fp32"] <= 0.45
    assert all(row["lowbit"]["identical"] for rows in record["nets"].values() for row in rows.values())


@pytest.fixture(scope="module")
def arm() -> emulation.Arm:
    return emulation.arm()


@pytest.fixture(scope="module")
def ziglang() -> Path:
    return emulation.ziglang()


@pytest.fixture(scope="module")
def library(ziglang: Path) -> Path:
    """The library for aarch64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ziglang))
        patch.setenv("PYTHONPATH", str(ziglang))
        return build.built_library(cross.cross_toolchain("aarch64-linux"))


def passed_there(arm: emulation.Arm, library: Path, cpu: str, words: list[str]) -> int:
    """Run tests of this folder there; return how many passed."""
    done = arm.run(
        cpu, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--confcutdir", str(HERE),
              "--rootdir", str(HERE), "-W", "ignore", *words],
        cwd=ROOT, timeout_s=3000, PYTHONPATH=f"{ROOT}:{ROOT / 'tests/support'}", QKD_LOWBIT_LIBRARY=str(library),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None and "skipped" not in done.stdout, done.stdout[-1000:]
    return int(found[1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kernels_equal_integer_references(arm: emulation.Arm, library: Path) -> None:
    """Every test of single operations, 600 random layers of each kind among them."""
    assert passed_there(arm, library, "cortex-a53", [str(HERE / "test_kernels.py"), "-k", "neon"]) >= 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_nets_are_as_without_the_provider(arm: emulation.Arm, library: Path) -> None:
    """Sums in integers, int8 that stays int8: what onnxruntime computes on Arm, bit for bit; threads, batches."""
    chosen = "(test_many_random_nets_are_identical and not other_kernels) or threads or not_taken_for"
    assert passed_there(arm, library, "cortex-a72", [str(HERE / "test_provider.py"), "-k", chosen]) >= 6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_spoiled_files_are_refused_or_left_alone(
    arm: emulation.Arm, library: Path, tmp_path: Path, random_net: Nets
) -> None:
    provider, rng = beside.load(HERE / "test_provider.py"), np.random.default_rng(3)
    for seed in range(3):
        for number in range(20):
            (tmp_path / f"{seed}-{number}.onnx").write_bytes(provider.spoiled(random_net(seed)[0], rng))
    done = arm.run(
        "cortex-a72", ["-c", provider.FUZZ], cwd=tmp_path, timeout_s=1500, PYTHONPATH=str(ROOT),
        QKD_LOWBIT_LIBRARY=str(library),
    )  # fmt: skip
    assert done.stdout.strip().endswith("same"), (done.returncode, done.stderr[-2000:])


SAY = "from export import lowbit; found = lowbit.availability(); print(found.kernels or '-', found.reason, sep='|')"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "kernels"),
    [
        ("cortex-a53", "neon"),
        ("cortex-a72", "neon"),
        ("cortex-a76", "-"),
        ("neoverse-n1", "-"),
        ("max,sve=off,sme=off", "-"),
    ],
)
def test_it_is_offered_where_there_are_no_dot_products(
    arm: emulation.Arm, library: Path, cpu: str, kernels: str
) -> None:
    words = {"PYTHONPATH": str(ROOT), "QKD_LOWBIT_LIBRARY": str(library)}
    done = arm.run(cpu, ["-c", SAY], cwd=ROOT, **words)
    found, reason = done.stdout.strip().split("|")
    assert found == kernels, done.stderr
    assert ("dot products are as fast" in reason) == (kernels == "-")
    if kernels == "-":  # sessions are the CPU provider's
        done = arm.run(cpu, ["-c", "from export import lowbit; print(lowbit.providers())"], cwd=ROOT, **words)
        assert done.stdout.strip() == "['CPUExecutionProvider']", done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("cpu", "offered"), [("cortex-a72", "offered"), ("cortex-a76", "not offered")])
def test_the_wheel_works_there(
    arm: emulation.Arm, ziglang: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_net: Nets, cpu: str,
    offered: str,
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(ziglang))
    monkeypatch.setenv("PYTHONPATH", str(ziglang))
    made = deployment.build_wheel("aarch64-linux", tmp_path)
    zipfile.ZipFile(made.path).extractall(tmp_path / "site")
    (tmp_path / "net.onnx").write_bytes(random_net(5)[0])
    script = beside.load(HERE / "test_deployment.py").RUN
    done = arm.run(cpu, ["-c", script], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout.strip() == f"{offered} same", done.stderr[-2000:]
