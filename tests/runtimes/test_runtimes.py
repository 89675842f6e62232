"""Every target is executed: its runtime, fetched into a folder, computes every student's codes and logits.

``QKD_RUNTIMES`` names a folder that keeps the packages; without it they are fetched again. Where the registry does not
answer, the test is skipped and says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from export.targets import TARGETS
from export.targets.sessions import SESSIONS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

HERE = Path(__file__).parent
STUDENTS = 18
CLOSE = 1e-5  # float32 rounding of logits below 4; one step of them is 1e-4 at least
PACKAGES = {
    "iree": ("iree-base-compiler==3.13.*", "iree-base-runtime==3.13.*"),
    "opencv": ("opencv-python-headless==5.0.*",),
    "openvino": ("openvino==2026.4.*",),
    "tvm": ("apache-tvm==0.27.*", "apache-tvm-ffi"),
}
OLD_RUNTIMES = {
    "onnxruntime>=1.15": ("onnxruntime==1.15.1", "numpy==1.26.4", "coloredlogs", "humanfriendly", "packaging"),
    "onnxruntime>=1.23": ("onnxruntime==1.23.2", "packaging"),
}
# Its package `quantizers` is another than ours, so it is never in one process with the toolkit
HLS4ML = ("hls4ml==1.3.*", "h5py", "pydigitalwavetools==1.1", "quantizers==1.2.*")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that packages are fetched into."""
    kept = os.environ.get("QKD_RUNTIMES")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("runtimes")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetched(folder: Path, command: list[str], name: str) -> Path:
    """Return the folder once the command has filled it; skip where it cannot."""
    done = folder / ".complete"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tried = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if tried.returncode:
            shutil.rmtree(folder)
            pytest.skip(f"{name} cannot be fetched: {tried.stderr.strip()[-300:]}")
        done.touch()
    return folder


def packages(store: Path, name: str, wanted: tuple[str, ...]) -> Path:
    folder = store / name.replace(">=", "-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
    return fetched(folder, command, name)


def output(command: list[str], path: Path | None = None) -> str:
    """Return what a program prints, run with the packages of a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def lines(command: list[str], path: Path | None = None) -> list[dict[str, Any]]:
    """Return what a program says, a JSON object a line."""
    return [json.loads(line) for line in output(command, path).splitlines() if line.startswith("{")]


@pytest.mark.parametrize("target", sorted(SESSIONS))
def test_a_runtime_computes_every_student(store: Path, target: str) -> None:
    found = lines([sys.executable, str(HERE / "judge.py"), "parity", target], packages(store, target, PACKAGES[target]))
    assert len(found) == STUDENTS and len({entry["name"] for entry in found}) == STUDENTS
    for entry in found:
        assert entry["faults"] == [], entry
        assert entry["apart"] < CLOSE and (entry["quantizers"] >= 3 or "w4a4" not in entry["name"]), entry
    assert TARGETS[target].tried.split()[-1] in found[0]["runtime"]


def test_a_student_is_measured_in_openvino(store: Path, tmp_path: Path) -> None:
    lines([sys.executable, str(HERE / "judge.py"), "write", "openvino", str(tmp_path)])
    program = "import sys; from qkd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "bench", str(tmp_path / "residual-w4a4.onnx"), "--runtime", "openvino"]
    found = output(
        [*command, "--rounds", "5", "--warmup", "1", "--json"], packages(store, "openvino", PACKAGES["openvino"])
    )
    assert "residual-w4a4, OpenVINO" in json.dumps(json.loads(found))


@pytest.mark.parametrize("target", sorted(OLD_RUNTIMES))
def test_an_older_onnxruntime_computes_every_student(store: Path, target: str, tmp_path: Path) -> None:
    lines([sys.executable, str(HERE / "judge.py"), "write", target, str(tmp_path)])
    folder = packages(store, target, OLD_RUNTIMES[target])
    found = lines([sys.executable, str(HERE / "run_file.py"), str(tmp_path)], folder)
    assert len(found) == STUDENTS and all(entry["apart"] < CLOSE for entry in found), found
    assert found[0]["version"].startswith(target.removeprefix("onnxruntime>="))


def test_webassembly_computes_every_student(store: Path, tmp_path: Path) -> None:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("onnxruntime-web is run by node, which is not installed here")
    folder = store / "onnxruntime-web"
    fetched(
        folder, ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), "onnxruntime-web@1.30"], "npm"
    )
    lines([sys.executable, str(HERE / "judge.py"), "write", "onnxruntime-web", str(tmp_path)])
    found = lines(["node", str(HERE / "run_web.js"), str(folder), str(tmp_path)])
    assert len(found) == STUDENTS and all(entry["apart"] < CLOSE for entry in found), found


def test_hls4ml_computes_every_student(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("qonnx", reason="qonnx prepares files for hls4ml; it is in the extra [qonnx]")
    if shutil.which("g++") is None:
        pytest.skip("hls4ml's C simulation is compiled by g++, which is not installed here")
    lines([sys.executable, str(HERE / "judge.py"), "write", "hls4ml", str(tmp_path)])
    found = lines([sys.executable, str(HERE / "run_hls4ml.py"), str(tmp_path)], packages(store, "hls4ml", HLS4ML))
    assert len(found) == STUDENTS and all(entry["apart"] < CLOSE for entry in found), found
    assert found[0]["version"].startswith("1.3")


def test_every_target_is_executed() -> None:
    """In this file, but FINN's: ``tests/export/targets/test_targets.py`` runs its file in qonnx's executor."""
    assert PACKAGES.keys() == SESSIONS.keys()
    in_onnxruntime = {name.partition(">=")[0] for name in OLD_RUNTIMES}
    executed = {*PACKAGES, *in_onnxruntime, "onnxruntime-web", "hls4ml", "finn"}
    assert {name for name, target in TARGETS.items() if not target.refusal} == executed
