"""The provider for other devices: cross-compiled libraries, and the wheel that holds one."""

from __future__ import annotations

import base64
import csv
import email
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import emulation
import pytest

from export.lowbit import LowBitUnavailableError, build, cross, deployed, deployment, wheel
from qkd.cli import main
from qkd.cli.commands.deployment import lowbit as command

ROOT = Path(__file__).resolve().parents[3]
Nets = Callable[[int], tuple[bytes, tuple[int, int]]]


@pytest.fixture
def without_ziglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ziglang", None)


@pytest.fixture
def with_ziglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cross-compiler, in this process and in those it starts; skips where it cannot be had."""
    place = emulation.ziglang()
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", str(place))


def test_without_the_cross_compiler_the_command_says_how_to_get_it(
    without_ziglang: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LowBitUnavailableError, match="pip install ziglang"):
        cross.cross_toolchain("aarch64-linux")
    for action in ("build", "wheel"):
        assert main(["lowbit", action, "--target", "aarch64-linux"]) == 1
        assert "qkd-toolkit[cross]" in capsys.readouterr().err


def test_an_unknown_target_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="unknown target 'mips'; use one of aarch64-linux, x86_64-linux"):
        cross.cross_toolchain("mips")
    with pytest.raises(SystemExit):
        main(["lowbit", "build", "--target", "mips"])
    assert "aarch64-linux" in capsys.readouterr().err


def test_the_command_offers_the_targets_there_are() -> None:
    assert sorted(command.TARGETS) == sorted(cross.TARGETS)


def test_no_instruction_set_of_the_host_leaks_into_another_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ziglang", type(sys)("ziglang"))
    sys.modules["ziglang"].__spec__ = importlib_spec()
    for target, (machine, spelled) in cross.TARGETS.items():
        toolchain = cross.cross_toolchain(target)
        assert toolchain.machine == machine and spelled in toolchain.command
        flags = {flag for source in build.SOURCES.rglob("*.cc") for flag in build._command(toolchain, source)}
        assert any(flag.startswith("-mavx") for flag in flags) == (machine == "x86_64")
        assert not any(flag.startswith(("-march", "-mcpu")) for flag in flags)


def importlib_spec() -> object:
    from importlib.machinery import ModuleSpec

    return ModuleSpec("ziglang", None)


def test_a_library_is_written_where_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made.so"
    made.write_bytes(b"library")
    monkeypatch.setattr(deployment, "built_library", lambda toolchain: made)
    monkeypatch.setattr(deployment, "cross_toolchain", lambda target: build.Toolchain((target,), "aarch64"))
    out = tmp_path / "out.so"
    assert main(["lowbit", "build", "--target", "aarch64-linux", "--out", str(out), "--json"]) == 0
    expected = {"target": "aarch64-linux", "path": str(out), "size_bytes": 7}
    assert json.loads(capsys.readouterr().out) == expected and out.read_bytes() == b"library"
    assert main(["lowbit", "build", "--target", "aarch64-linux"]) == 0  # stays in the cache
    assert str(made) in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["lowbit", "build", "--target", "aarch64-linux", "--out", str(tmp_path / "no" / "folder.so")])
    assert caught.value.code == 2 and "in an existing folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not exist; create it first"):
        deployment.build_library("aarch64-linux", tmp_path / "no" / "folder.so")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.so", "out.so"]


def test_the_wheel_is_one_and_holds_the_library(tmp_path: Path) -> None:
    """Names, tag, metadata and the list of files with their hashes; the same bytes each time."""
    library = tmp_path / "lib.so"
    library.write_bytes(b"library" * 1000)
    path = wheel.write_wheel(library, "manylinux_2_28_aarch64", tmp_path)
    assert path.name == f"onnxruntime_ep_lowbit-{wheel.version()}-py3-none-manylinux_2_28_aarch64.whl"
    before = path.read_bytes()
    assert wheel.write_wheel(library, "manylinux_2_28_aarch64", tmp_path).read_bytes() == before
    archive = zipfile.ZipFile(path)
    info = f"onnxruntime_ep_lowbit-{wheel.version()}.dist-info"
    about = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert about["Name"] == "onnxruntime-ep-lowbit" and about["Version"] == wheel.version()
    assert about["Requires-Dist"] is None, "onnxruntime is the user's own choice"
    assert "Tag: py3-none-manylinux_2_28_aarch64\n" in archive.read(f"{info}/WHEEL").decode()
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode()))}
    assert sorted(rows) == sorted(archive.namelist())
    for name, (digest, size) in rows.items():
        if name.endswith("/RECORD"):
            continue
        content = archive.read(name)
        assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        assert int(size) == len(content)
    assert archive.read("onnxruntime_ep_lowbit/liblowbit.so") == library.read_bytes()
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_wheels_module_needs_nothing_of_the_toolkit(tmp_path: Path) -> None:
    place = tmp_path / "onnxruntime_ep_lowbit"
    place.mkdir()
    (place / "__init__.py").write_bytes(Path(deployed.__file__).read_bytes())
    script = "import onnxruntime_ep_lowbit as e; print(e.get_ep_name(), e.get_ep_names()); e.get_library_path()"
    words = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {script}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "LowBitExecutionProvider ['LowBitExecutionProvider']"
    assert "install the package onnxruntime-ep-lowbit again" in done.stderr
    (place / "liblowbit.so").touch()
    done = subprocess.run([*words[:-1], words[-1].replace("e.get_l", "print(e.get_l") + ")"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.splitlines()[-1] == str(place / "liblowbit.so")


def test_the_provider_and_its_wheel_have_the_toolkits_version() -> None:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None and wheel.version() == found[1]


def test_the_project_of_the_wheel_has_its_name() -> None:
    text = (ROOT / "packages" / wheel.NAME / "pyproject.toml").read_text()
    assert f'name = "{wheel.NAME}"' in text and 'requires = ["ziglang"]' in text
    assert wheel.FOLDER == "onnxruntime_ep_lowbit" and (ROOT / "packages" / wheel.NAME / "backend.py").is_file()


RUN = """
import sys
import numpy, onnxruntime
import onnxruntime_ep_lowbit as lowbit
assert not any(name in sys.modules for name in ("torch", "export", "qkd"))
name = lowbit.get_ep_name()
onnxruntime.register_execution_provider_library(name, lowbit.get_library_path())
offered = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
def session(devices):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if devices:
        options.add_provider_for_devices(devices, {})
    return onnxruntime.InferenceSession("net.onnx", options)
plain, ours = session([]), session(offered)
assert (name in ours.get_providers()) == bool(offered)
shape = [side if isinstance(side, int) else 2 for side in plain.get_inputs()[0].shape]
x = {"images": numpy.random.default_rng(0).random(shape, numpy.float32)}
same = all(numpy.array_equal(a, b) for a, b in zip(plain.run(None, x), ours.run(None, x)))
print("offered" if offered else "not offered", "same" if same else "different")
"""


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path, with_ziglang: None, random_net: Nets) -> None:
    """Built as a separate project would be, installed beside onnxruntime alone."""
    made = deployment.build_wheel(None, tmp_path / "dist")
    assert made.path.parent == tmp_path / "dist" and made.size_bytes == made.path.stat().st_size
    check_library(made.path, tmp_path)
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    install = [python, "-m", "pip", "install", "--quiet", str(made.path), "onnxruntime"]
    subprocess.run(install, check=True, timeout=900, env=environment, cwd=tmp_path)
    (tmp_path / "net.onnx").write_bytes(random_net(5)[0])
    offered = deployment_is_offered()
    done = subprocess.run(
        [python, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == f"{'offered' if offered else 'not offered'} same", done.stderr[-2000:]


def deployment_is_offered() -> bool:
    from export import lowbit

    return lowbit.availability().is_offered


def check_library(path: Path, folder: Path) -> None:
    """The library in a wheel needs a C library of at most 2.28, and nothing of C++."""
    content = zipfile.ZipFile(path).read("onnxruntime_ep_lowbit/liblowbit.so")
    versions = {tuple(int(part) for part in found.split(b".")) for found in re.findall(rb"GLIBC_(\d+\.\d+)", content)}
    assert versions and max(versions) <= cross.GLIBC
    assert b"libstdc++" not in content and b"GLIBCXX" not in content


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_project_builds_the_same_wheel(tmp_path: Path, with_ziglang: None) -> None:
    """`pip wheel packages/onnxruntime-ep-lowbit`, whose build backend is the toolkit of the checkout."""
    project = ROOT / "packages" / wheel.NAME
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-C",
             "target=aarch64-linux", "--wheel-dir", str(tmp_path / "pip"), str(project)]  # fmt: skip
    subprocess.run(words, check=True, timeout=1800)
    ours = deployment.build_wheel("aarch64-linux", tmp_path / "ours").path
    (theirs,) = (tmp_path / "pip").iterdir()
    assert theirs.name == ours.name and theirs.read_bytes() == ours.read_bytes()
