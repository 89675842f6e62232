"""The distribution: what it lists, and that its wheel works in an empty environment, in another folder."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = ("export", "qkd", "quantizers")
DATA = ("export/lowbit/native/*/*", "qkd/report/*.j2")  # files beside the modules


def listed_packages() -> list[str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (value,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES"
    ]
    packages: list[str] = ast.literal_eval(value)
    return packages


def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def test_every_folder_with_an_init_is_listed() -> None:
    found = [path.parent.relative_to(ROOT) for name in TOP_LEVEL for path in (ROOT / name).rglob("__init__.py")]
    assert listed_packages() == sorted(".".join(folder.parts) for folder in found)
    assert len(found) >= 9


def test_every_module_lies_in_a_listed_package() -> None:
    folders = {path.parent.relative_to(ROOT) for name in TOP_LEVEL for path in (ROOT / name).rglob("*.py")}
    assert sorted(".".join(folder.parts) for folder in folders) == listed_packages()


def test_the_version_is_the_changelogs_latest() -> None:
    headings = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == version()


def copy_of_the_sources(folder: Path) -> Path:
    """Copy what a build needs, so that it leaves nothing in the checkout."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*TOP_LEVEL, "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = copy_of_the_sources(tmp_path_factory.mktemp("sources"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(sources)]
    subprocess.run(command, check=True, timeout=600)
    (built,) = target.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_configs_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.startswith(f"qkd_toolkit-{version()}-py3-none-any")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = [path.relative_to(ROOT).as_posix() for name in TOP_LEVEL for path in (ROOT / name).rglob("*.py")]
    expected += [
        f"qkd/configs/{path.relative_to(ROOT / 'configs').as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")
    ]
    data = {pattern: list(ROOT.glob(pattern)) for pattern in DATA}
    assert all(data.values()), f"a pattern that finds no file checks nothing: {data}"
    expected += [path.relative_to(ROOT).as_posix() for paths in data.values() for path in paths]
    assert sorted(names) == sorted(expected)


# Others by `QKD_PYTHONS="python3.10 python3.13" make dist-check`; each needs an environment of several GB.
INTERPRETERS = os.environ.get("QKD_PYTHONS", sys.executable).split()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("interpreter", INTERPRETERS, ids=lambda path: Path(path).name)
def test_the_wheel_runs_in_an_empty_environment(interpreter: str, wheel: Path, tmp_path: Path) -> None:
    subprocess.run([interpreter, "-m", "venv", str(tmp_path / "env")], check=True, timeout=300)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(*command: str | Path) -> str:
        done = subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    call(scripts / "python", "-m", "pip", "install", "--quiet", wheel)
    doctor = json.loads(call(scripts / "qkd", "doctor", "--json"))
    assert doctor["versions"]["qkd-toolkit"] == version()
    assert all(Path(where).is_relative_to(tmp_path / "env") for where in doctor["resolves_to"].values())
    assert "digits/smoke" in json.loads(call(scripts / "qkd", "ls", "configs", "--json"))["configs"]
    result = json.loads(call(scripts / "qkd", "run", "configs/digits/smoke.yaml", "--runs-dir", "out", "--json"))
    assert [row["role"] for row in result["models"]][:2] == ["teacher (= FP32 twin)", "student w2a2"]
    assert Path(result["report"]).is_file() and Path(result["report"]).is_relative_to(tmp_path.resolve() / "out")
    assert result["models"][1]["agreement"] == 1.0
