"""The doctor: what it sees, and clashes of names that it must find."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from export.lowbit import Availability
from qkd import machine
from qkd.cli import main
from qkd.machine import Clash, DoctorReport, examine, find_clashes


def install(
    site: Path, name: str, files: dict[str, str], *, with_hashes: bool = False
) -> importlib.metadata.Distribution:
    """Make a distribution as an installer leaves it: files, and a record of them."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    rows = []
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        rows.append(f"{path},sha256={digest},{len(text)}" if with_hashes else f"{path},,")
    (info / "RECORD").write_text("\n".join([*rows, f"{info.name}/METADATA,,"]))
    return importlib.metadata.Distribution.at(info)


def test_this_environment_is_healthy() -> None:
    report = examine()
    assert report.clashes == () and report.is_healthy
    assert report.versions["torch"] == importlib.metadata.version("torch")
    assert set(report.versions) >= {"python", "qkd-toolkit", "torchvision", "brevitas", "onnx", "onnxruntime", "numpy"}
    assert "CPUExecutionProvider" in report.providers
    assert report.cores >= 1 and report.cpu
    assert Path(report.resolves_to["qkd"]) == Path(machine.__file__).parent
    assert "all is well" in report.to_text()


def test_a_distribution_on_our_names_is_found(tmp_path: Path) -> None:
    other = install(tmp_path, "quantum-keys", {"qkd/__init__.py": "", "export.py": "", "fine/x.py": ""})
    innocent = install(tmp_path, "innocent", {"innocent/qkd/__init__.py": "", "innocent/export.py": ""})
    clashes = find_clashes([other, innocent])
    assert [clash.name for clash in clashes] == ["export", "qkd"]
    assert all("quantum-keys 1.0" in clash.what and "uninstall" in clash.what for clash in clashes)


def test_our_own_files_overwritten_are_found(tmp_path: Path) -> None:
    files = {"qkd/__init__.py": "ours", "quantizers/a.py": "ours", "export/b.py": "ours"}
    ours = install(tmp_path, "qkd_toolkit", files, with_hashes=True)
    assert find_clashes([ours]) == []
    (tmp_path / "quantizers/a.py").write_text("theirs")
    (tmp_path / "export/b.py").unlink()
    clashes = find_clashes([ours])
    assert [clash.name for clash in clashes] == ["quantizers", "export"]
    assert "quantizers/a.py" in clashes[0].what


def test_a_name_that_resolves_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = machine._resolve
    monkeypatch.setattr(machine, "_resolve", lambda name: tmp_path if name == "export" else real(name))
    (clash,) = find_clashes([])
    assert clash.name == "export" and str(tmp_path) in clash.what


def sick() -> DoctorReport:
    return DoctorReport(
        versions={"python": "3"}, cpu="x", cpu_flags=(), cores=1, memory_bytes=None, cuda_devices=(), compiler=None,
        providers=(), low_bit="not offered: no reason", resolves_to={}, clashes=(Clash("qkd", "someone else's"),),
    )  # fmt: skip


def test_exit_code_and_json_tell_of_a_clash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "examine", sick)
    assert main(["doctor", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["clashes"] == [{"name": "qkd", "what": "someone else's"}] and not printed["is_healthy"]
    assert main(["doctor"]) == 1
    assert "CLASH qkd: someone else's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (Availability("avx512", "AVX-512 with VBMI and VNNI"), "avx512 kernels (AVX-512 with VBMI and VNNI)"),
        (Availability("", "no C++ compiler: install g++"), "not offered: no C++ compiler: install g++"),
    ],
)
def test_a_line_says_what_the_low_bit_provider_offers(
    found: Availability, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.lowbit.availability", lambda: found)
    assert f"low-bit            {line}" in examine().to_text().splitlines()
