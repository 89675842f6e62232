"""`~` is the home folder wherever a config, an override or an argument names a path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qkd import config
from qkd.checking import file_faults
from qkd.cli import main, parse
from qkd.config.binding import apply_overrides, bind
from qkd.files.user_paths import user_path
from qkd.files.yaml_text import parse_yaml
from qkd.testing import write_npz_set

CONFIG = """
name: small
data: {name: npz, path: ~/set}
teacher: {net: resnet8, weights: ~/w.pth}
student: {quant: {weight_bits: 2, act_bits: 2}, train: {epochs: 1}}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_configs_and_overrides_name_the_home_folder(home: Path) -> None:
    raw = apply_overrides(parse_yaml(CONFIG), ["data.root=~/sets", "student.weights=~/s.pth", "bench.devices=~/d.yaml"])
    bound = bind(raw)
    assert (bound.data.path, bound.data.root) == (home / "set", home / "sets")
    assert (bound.teacher.weights, bound.student.weights) == (home / "w.pth", home / "s.pth")
    assert bound.bench.devices == home / "d.yaml"


def test_files_are_looked_for_there(home: Path) -> None:
    assert len(list(file_faults(parse_yaml(CONFIG)))) == 2
    write_npz_set(home / "set")
    (home / "w.pth").write_bytes(b"")
    assert list(file_faults(parse_yaml(CONFIG))) == []
    (home / "c.yaml").write_text(CONFIG)
    assert main(["validate", "~/c.yaml"]) == 0


def test_every_path_of_the_schema_expands_it() -> None:
    files = list((Path(config.__file__).parent).glob("*.py"))
    fields = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()
              if re.match(r"    \w+: .*\b(User)?Path\b", line)]  # fmt: skip
    assert len(fields) >= 6
    assert [line for line in fields if "UserPath" not in line] == []


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["run", "~/x"], "config"),
        (["run", "digits/w2a2", "--runs-dir=~/x"], "runs_dir"),
        (["cost", "~/x"], "config"),
        (["match", "~/x"], "run"),
        (["diagnose", "run", "--out=~/x.svg"], "out"),
        (["bench", "a.onnx", "--sample=~/x"], "sample"),
        (["bench", "a.onnx", "--devices=~/x"], "devices"),
        (["bench", "a.onnx", "--output=~/x.json"], "output"),
        (["policy", "show", "~/x"], "policy"),
        (["policy", "import", "~/x", "--epochs", "3", "--op-order", "py2", "--out", "y.yaml"], "log"),
        (
            ["policy", "sample", "pba", "--data", "npz", "--data-path=~/x", "--epochs", "0", "--out", "y.png"],
            "data_path",
        ),
        (
            ["policy", "sample", "pba", "--data", "npz", "--data-root=~/x", "--epochs", "0", "--out", "y.png"],
            "data_root",
        ),
    ],
)
def test_every_argument_that_is_a_path_expands_it(home: Path, arguments: list[str], name: str) -> None:
    found: Any = getattr(parse(arguments), name)
    assert Path(found).with_suffix("") == home / "x"


def test_further_models_too(home: Path) -> None:
    args = parse(["bench", "~/a.onnx", "~/b.onnx"])
    assert (args.config, args.overrides) == (str(home / "a.onnx"), [str(home / "b.onnx")])


def test_what_is_no_home_folder_stays() -> None:
    assert user_path("a/~/b") == Path("a/~/b")
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
