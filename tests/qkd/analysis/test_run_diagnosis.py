"""`qkd diagnose`: a run with and without student, a config, pictures, targets that cannot be diagnosed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qkd.analysis.diagnosis import geometry_agreement, teacher_knowledge
from qkd.cli import main
from qkd.data import MemorySplit, load_splits, normalize
from qkd.files import write_safetensors
from qkd.losses import gradient_rescaling
from qkd.roles.guide import load_guide
from qkd.roles.nets import load_student, load_teacher
from qkd.run.folder import RunFolder
from qkd.terms.rescaling import summarize
from qkd.testing import run_tiny, tiny_config

pytestmark = pytest.mark.usefixtures("unfused")


@pytest.fixture
def diagnose(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*arguments: str, code: int = 0, runs: Path = folder / "runs") -> Any:
        capsys.readouterr()
        assert main(["diagnose", *arguments, "--runs-dir", str(runs), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return ask


def test_a_run_is_measured_on_its_training_images(folder: Path, diagnose: Any) -> None:
    report = diagnose("tiny")
    config = tiny_config(folder / "data")
    run, splits = RunFolder(config, folder / "runs" / "tiny"), load_splits(config.data, config.seed)
    assert report["images"] == len(splits.train) == 48 and report["net"] == "resnet8"
    images, labels = splits.train.batch(torch.arange(48), "cpu")
    with torch.no_grad():
        inputs = normalize(images, splits.mean, splits.std)
        teacher, student = load_teacher(run)(inputs).double(), load_student(run)(inputs).double()
    for place, temperature in enumerate((1.0, 4.0)):
        expected = teacher_knowledge(teacher, labels, temperature=temperature).to_json()
        found = report["temperatures"][place]
        assert found.keys() == expected.keys() and found["contrast"] is expected["contrast"] is None
        measured = {name: value for name, value in expected.items() if value is not None}
        assert {name: found[name] for name in measured} == pytest.approx(measured, rel=1e-4)
    assert report["accuracy"] == pytest.approx((teacher.argmax(1) == labels).double().mean().item())
    w = gradient_rescaling(student, teacher, labels, teacher_share=0.5, temperature=4.0)
    counted = w[1 - student.softmax(1)[range(48), labels] >= 0.05]
    assert report["rescaling"]["w_share"] == pytest.approx(len(counted) / 48) and len(counted) > 8
    assert report["rescaling"]["w_mean"] == pytest.approx(counted.mean().item(), rel=1e-3)
    layer = load_student(run).fc
    weights = {"student, as deployed": layer.deployed()[0], "student, float weights": layer.weight}
    features = _features(load_student(run), inputs)
    expected = {name: geometry_agreement(features, rows.detach(), teacher, labels) for name, rows in weights.items()}
    net = load_teacher(run)
    expected["teacher"] = geometry_agreement(_features(net, inputs), net.fc.weight.detach(), teacher, labels)
    assert {name: row["as_is"] for name, row in report["geometry"].items()} == pytest.approx(expected, abs=1e-3)


def _features(net: Any, images: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    net.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(images)
    return seen[0]


def test_w_over_the_epochs_comes_from_the_training(folder: Path, diagnose: Any) -> None:
    report = diagnose("tiny")
    lines = (folder / "runs" / "tiny" / "student" / "metrics.jsonl").read_text().splitlines()
    logged = [{"epoch": row["epoch"], **summarize(row["facts"])} for row in map(json.loads, lines)]
    assert report["epochs"] == logged and [row["epoch"] for row in logged] == [1, 2]
    assert all(row["w_std"] > 0 and 0 < row["w_share"] <= 1 for row in logged)
    assert report["notes"] == []


def test_test_images_are_never_read(folder: Path, diagnose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(folder / "data")
    train = len(load_splits(config.data, config.seed).train)
    batch = MemorySplit.batch

    def watched(self: MemorySplit, *arguments: Any) -> Any:
        assert len(self) == train, "images of another split were read"
        return batch(self, *arguments)

    monkeypatch.setattr(MemorySplit, "batch", watched)
    assert diagnose("tiny")["images"] == train
    assert diagnose("tiny", "--limit", "12")["images"] == 12


def test_a_config_means_its_run_or_its_weights(folder: Path, tmp_path: Path, diagnose: Any) -> None:
    config = str(folder / "tiny.yaml")
    assert diagnose(config) == diagnose("tiny") == diagnose(str(folder / "runs" / "tiny"))
    warm = diagnose(config, "student.terms=[{loss: soft_target, options: {temperature: 2}}]")
    assert (
        warm["temperatures"][1]["temperature"] == 2
        and diagnose("tiny", "--temperature", "2")["temperatures"] == (warm["temperatures"])
    )
    weights = folder / "runs" / "tiny" / "teacher" / "weights.safetensors"
    given = diagnose(config, "name=other", "teacher.train=null", f"teacher.weights={weights}")
    assert given["temperatures"] == diagnose("tiny")["temperatures"]
    assert given["rescaling"] is None and given["epochs"] == [] and set(given["geometry"]) == {"teacher"}


def test_what_the_student_learns_from_is_measured(folder: Path, diagnose: Any) -> None:
    short = {"teacher.train.epochs": 1, "student.train.epochs": 2}
    many = tiny_config(folder / "data", {**short, "name": "many", "teacher.members": 2})
    low = {"quant": {"weight_bits": 8, "act_bits": 8}, "train": {"epochs": 1, "lr": 0.01}}
    by_way = tiny_config(folder / "data", {**short, "name": "by_way", "student.auxiliary": low})
    for config in (many, by_way):
        with run_tiny(config, folder / "runs", "teacher", "search", "distill") as run:
            found = diagnose(config.name)
        splits = load_splits(config.data, config.seed)
        images, labels = splits.train.batch(torch.arange(len(splits.train)), "cpu")
        with torch.no_grad():
            logits = load_guide(run)(normalize(images, splits.mean, splits.std)).double()
        expected = teacher_knowledge(logits, labels, temperature=1).to_json()
        measured = {name: value for name, value in expected.items() if value is not None}
        assert {name: found["temperatures"][0][name] for name in measured} == pytest.approx(measured, rel=1e-4)
        assert found["rescaling"] is not None
    ensemble, auxiliary = diagnose("many"), diagnose("by_way")
    assert ensemble["net"] == "resnet8, an ensemble of 2" and "teacher" not in ensemble["geometry"]
    assert ensemble["notes"] == ["geometry of the teacher: an ensemble has no last layer"]
    assert auxiliary["net"] == "resnet8, an auxiliary that learned from resnet8"
    assert {"teacher, as deployed", "teacher, float weights"} <= set(auxiliary["geometry"])


def test_tables_and_pictures_are_for_people(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("svg", "png"):
        words = ["diagnose", "tiny", "--runs-dir", str(folder / "runs"), "--out", str(tmp_path / f"t.{ending}")]
        assert main(words) == 0
    text = capsys.readouterr().out
    for words in ("soft targets at temperature", "p_t, std", "gradient re-scaling w_t", "epoch 2", "finished student"):
        assert words in text
    assert "found: " in text and "student, as deployed" in text and f"wrote {tmp_path / 't.png'}" in text
    svg = (tmp_path / "t.svg").read_text()
    assert svg.startswith("<svg") and "epoch 2: mean " in svg and "temperature 4, 0." in svg
    assert sum(int(part.split(" images")[0]) for part in svg.split(": ") if " images</title>" in part[:20]) == 2 * 48
    with Image.open(tmp_path / "t.png") as image:
        assert len(np.unique(np.array(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_a_run_whose_student_was_trained_before_w_was_logged(folder: Path, tmp_path: Path, diagnose: Any) -> None:
    import shutil

    shutil.copytree(folder / "runs" / "tiny", tmp_path / "old")
    file = tmp_path / "old" / "student" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "facts"}) + "\n" for row in rows))
    report = diagnose(str(tmp_path / "old"))
    assert report["epochs"] == [] and "before it was logged" in report["notes"][0]
    file.write_text("{\n")
    assert "metrics.jsonl, line 1: not JSON" in diagnose(str(tmp_path / "old"), code=2)["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such config file"),
        (["tiny", "seed=3"], "has nothing to change"),
        (["nowhere"], "nor is it a run folder: "),
        (["tiny", "--temperature", "0"], "--temperature must be positive and finite, got 0"),
        (["tiny", "--limit", "1"], "--limit must be at least 2, got 1"),
        (["CONFIG", "name=new"], "new has no trained teacher yet: run `qkd teacher` with this config first"),
        (["CONFIG", "seed=3"], "holds a run with another `seed` than this config has"),
        (["CONFIG", "teacher.net=resnet20"], "holds a run with another `teacher` than this config has"),
    ],
)
def test_bad_targets(folder: Path, diagnose: Any, arguments: list[str], message: str) -> None:
    arguments = [str(folder / "tiny.yaml") if word == "CONFIG" else word for word in arguments]
    answer = diagnose(*arguments, code=2)
    assert message in answer["error"] and answer["exit_code"] == 2


def test_a_run_without_teacher_and_damaged_or_foreign_weights(folder: Path, tmp_path: Path, diagnose: Any) -> None:
    with RunFolder.open(tiny_config(folder / "data", {"name": "early"}), tmp_path):
        pass
    assert "run the stage that writes it first (qkd teacher" in diagnose("early", code=2, runs=tmp_path)["error"]
    place = tmp_path / "early" / "teacher"
    place.mkdir()
    write_safetensors(place / "weights.safetensors", {"a": torch.zeros(2)}, metadata={"net": "resnet8"})
    assert "its header lacks classes" in diagnose("early", code=2, runs=tmp_path)["error"]
    (place / "weights.safetensors").write_bytes(b"\xff" * 40)
    assert "weights.safetensors" in diagnose("early", code=2, runs=tmp_path)["error"]
