"""`qkd cost`: a config before training, a run, a file, and targets that are none of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qkd.cli import main
from qkd.data import DATASETS, image_shape, load_splits
from qkd.data.loading.shapes import PUBLISHED, ImageShape
from qkd.progress import Silent
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import tiny_config

pytestmark = pytest.mark.usefixtures("unfused")


@pytest.fixture
def cost(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main(["cost", *arguments, "--runs-dir", str(folder / "runs"), "--json"]) == code
        captured = capsys.readouterr()
        assert code == 0 or captured.err.startswith("qkd: ")
        return json.loads(captured.out)

    return ask


def test_config_run_and_file_agree(folder: Path, cost: Any) -> None:
    from_config = cost(str(folder / "tiny.yaml"))
    assert from_config["name"] == "tiny" and from_config["file_bytes"] is None
    trained = cost("tiny")
    assert trained["student"] == from_config["student"] and trained["layers"] == from_config["layers"]
    run = folder / "runs" / "tiny"
    with RunFolder.open(tiny_config(folder / "data"), folder / "runs") as opened:
        STAGES["export"](opened, Silent())
    exported = cost(str(run))
    assert exported["student"] == from_config["student"] and exported["layers"] == from_config["layers"]
    assert exported["file_bytes"] == (run / "export" / "student.onnx").stat().st_size
    assert cost(str(run / "export" / "student.onnx")) == exported
    teacher = cost(str(run / "export" / "teacher.onnx"))
    assert teacher["student"]["macs"] == exported["student"]["macs"]
    assert {layer["weight_bits"] for layer in teacher["layers"]} == {32}


def test_overrides_change_a_config(folder: Path, cost: Any) -> None:
    four = cost(str(folder / "tiny.yaml"))["student"]
    two = cost(str(folder / "tiny.yaml"), "student.quant.weight_bits=2", "student.quant.act_bits=2")["student"]
    assert two["macs"] == four["macs"] and two["bops"] < four["bops"] and two["weight_bytes"] < four["weight_bytes"]


def test_a_config_whose_data_set_is_not_there(tmp_path: Path, cost: Any) -> None:
    config = {"name": "c", "data": {"name": "cifar100", "root": str(tmp_path / "none"), "download": False},
              "teacher": {"net": "resnet20", "train": {"epochs": 1}},
              "student": {"quant": {"weight_bits": 2, "act_bits": 2}, "train": {"epochs": 1}}}  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    report = cost(str(tmp_path / "c.yaml"))
    assert report["layers"][0]["output_shape"] == [16, 32, 32] and report["layers"][-1]["output_shape"] == [100]
    assert report["layers"][0]["macs"] == 16 * 32 * 32 * 3 * 9
    # the usual count of ResNet-20 on 32x32 images, 40.55 million, beside 1x1 shortcuts and 90 more classes
    assert 40.55e6 < report["student"]["macs"] < 41.2e6


def test_the_tables_are_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", str(folder / "tiny.yaml"), "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny, one image" and lines[1].split() == ["student", "FP32", "twin", "ratio"]
    assert lines[3].startswith("multiply-accumulates") and lines[3].endswith("1.00")
    head = next(number for number, line in enumerate(lines) if line.startswith("layer "))
    assert lines[head + 1].startswith("conv1") and lines[-1].startswith("fc")
    main(["cost", str(folder / "tiny.yaml")])
    assert "conv1" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such config file"),
        (["nowhere.onnx"], "no model file at nowhere.onnx"),
        (["tiny", "student.quant.act_bits=2"], "has nothing to change; name a config instead"),
        (["digits/w2a2", "student.quant.act_bits=1"], "config.student.quant.act_bits"),
    ],
)
def test_bad_targets(cost: Any, arguments: list[str], message: str) -> None:
    answer = cost(*arguments, code=2)
    assert message in answer["error"] and answer["exit_code"] == 2


def test_a_run_without_a_student_and_a_damaged_file(tmp_path: Path, folder: Path, cost: Any) -> None:
    with RunFolder.open(tiny_config(folder / "data", {"name": "early"}), tmp_path):
        pass
    assert "has no student yet (run `qkd distill`)" in cost(str(tmp_path / "early"), code=2)["error"]
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 40)
    assert "bad.onnx: it is not an ONNX file, or it is damaged" in cost(str(tmp_path / "bad.onnx"), code=2)["error"]


def test_published_shapes_are_those_of_the_sets() -> None:
    assert set(PUBLISHED) | {"npz", "folder"} == set(DATASETS)
    from qkd.config import DataConfig

    for size in (None, 16):  # digits may be enlarged
        config = DataConfig(name="digits", image_size=size)
        splits = load_splits(config, seed=0)
        assert image_shape(config) == ImageShape(len(splits.classes), splits.channels, splits.image_size)


def test_other_sets_are_looked_into(folder: Path) -> None:
    assert image_shape(tiny_config(folder / "data").data) == ImageShape(4, 1, 8)
