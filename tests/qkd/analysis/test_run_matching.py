"""`qkd match`: layers of a run's nets, pairs as a config takes them, runs that cannot be matched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qkd.analysis.matching import class_information
from qkd.cli import main
from qkd.config.binding import bind
from qkd.data import load_splits, normalize
from qkd.roles.nets import load_student, load_teacher
from qkd.run.folder import RunFolder
from qkd.terms.taps import Taps
from qkd.testing import run_tiny, tiny_config, write_npz_set
from qkd.training.assembly import WEIGHTS

pytestmark = pytest.mark.usefixtures("unfused")
NETS = {"teacher.net": "wrn_16_1", "student.net": "resnet8", "student.float_train": {"epochs": 1, "lr": 0.05}}


@pytest.fixture(scope="module")
def folder(unfused: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a data set and runs: a whole one, one with a teacher only, one of other nets, none."""
    folder = tmp_path_factory.mktemp("match")
    data = write_npz_set(folder / "data")
    run_tiny(tiny_config(data, NETS), folder / "runs", "teacher", "search", "distill").close()
    run_tiny(tiny_config(data, NETS | {"name": "half"}), folder / "runs", "teacher").close()
    RunFolder.open(tiny_config(data, {"name": "early"}), folder / "runs").close()
    return folder


@pytest.fixture
def match(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main(["match", *arguments, "--runs-dir", str(folder / "runs"), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return ask


def test_layers_are_measured_on_training_images(folder: Path, match: Any) -> None:
    report = match("tiny")
    config = tiny_config(folder / "data", NETS)
    run, splits = RunFolder(config, folder / "runs" / "tiny"), load_splits(config.data, config.seed)
    images, labels = splits.train.batch(torch.arange(len(splits.train)), "cpu")
    assert report["images"] == len(labels) == 48 and report["student"] == "low-bit"
    for role, net in (("student", load_student(run)), ("teacher", load_teacher(run))):
        taps = ["layer1", "layer2", "layer3", "flatten"]
        with Taps(net, taps, translate=getattr(net, "tap_paths", None)) as hooks, torch.no_grad():
            net(normalize(images, splits.mean, splits.std))
            expected = {tap: class_information(value, labels) for tap, value in hooks.take().items()}
        assert report["information"][role] == pytest.approx(expected, abs=1 / 48)  # a tie may fall either way
    assert report["taps"][-1] == ["flatten", "flatten"] and len(report["taps"]) == 4


def test_the_pairs_fit_a_config(folder: Path, match: Any) -> None:
    pairs = match("tiny", "--limit", "24")["taps"]
    values = tiny_config(folder / "data", NETS).model_dump(mode="json")
    values["student"]["terms"] = [{"loss": "information_flow", "taps": pairs}]
    assert [list(pair) for pair in bind(values).student.terms[0].taps] == pairs


def test_layers_can_be_named_and_text_says_what_they_are(folder: Path, match: Any, capsys: Any) -> None:
    words = ["--student-taps", "layer2", "flatten", "--teacher-taps", "conv1", "layer3"]
    report = match("tiny", *words)
    assert [list(flow) for flow in report["information"].values()] == [["layer2", "flatten"], ["conv1", "layer3"]]
    assert report["taps"][-1] == ["flatten", "layer3"]
    assert main(["match", "tiny", "--runs-dir", str(folder / "runs"), *words]) == 0
    text = capsys.readouterr().out
    assert "48 training images" in text and "taps: [[layer2, " in text and "conv1" in text


def test_a_float_student_is_enough(folder: Path, match: Any) -> None:
    (folder / "runs" / "tiny" / "student" / WEIGHTS).rename(folder / "kept")
    try:
        assert match("tiny")["student"] == "float"
    finally:
        (folder / "kept").rename(folder / "runs" / "tiny" / "student" / WEIGHTS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "--student-taps", "layer9"], "the student has no module 'layer9'; did you mean"),
        (["half"], "has no student yet: run `qkd distill`"),
        (["early"], "has no teacher yet: run `qkd teacher`"),
        (["nowhere"], "nowhere is neither a run folder nor the name of a run"),
    ],
)
def test_what_cannot_be_matched(match: Any, arguments: list[str], words: str) -> None:
    assert words in match(*arguments, code=2)["error"]


def test_nets_without_stages_need_their_layers_named(match: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkd.analysis.run_matching.stage_names", lambda _net: ())
    error = match("tiny", "--teacher-taps", "layer1", code=2)["error"]
    assert "name the student's layers, from input to output (--student-taps); resnet8 has conv1, " in error


def test_a_student_with_an_auxiliary_is_matched_with_it(folder: Path, match: Any) -> None:
    own = {"train": {"epochs": 1, "lr": 0.01}, "terms": [{"loss": "soft_target"}]}
    changes = NETS | {"name": "by_way", "student.auxiliary": own}
    run = run_tiny(tiny_config(folder / "data", changes), folder / "runs", "teacher")
    run.close()
    assert "no student yet" in match("by_way", code=2)["error"]
    run_tiny(tiny_config(folder / "data", changes), folder / "runs", "search", "distill").close()
    report = match("by_way")
    assert report["teacher"] == "resnet8, an auxiliary that learned from wrn_16_1" and report["note"] == ""
    shutil.rmtree(folder / "runs" / "by_way" / "student" / "auxiliary")
    assert "the teacher it will learn from" in match("by_way")["note"]


def test_an_ensemble_has_no_layers_to_follow(folder: Path, match: Any) -> None:
    changes = NETS | {"name": "many", "teacher.members": 2, "teacher.train.epochs": 1}
    run_tiny(tiny_config(folder / "data", changes), folder / "runs", "teacher", "search", "distill").close()
    assert "an ensemble of 2, has no layers to follow" in match("many", code=2)["error"]
