"""`qkd retrieve`: teacher and student of a run, taps, the released form, runs that cannot be scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qkd.analysis.retrieval import score_retrieval
from qkd.cli import main
from qkd.data import load_splits, normalize
from qkd.progress import Silent
from qkd.roles.nets import load_teacher
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import tiny_config, write_npz_set

pytestmark = pytest.mark.usefixtures("unfused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a data set, a run with a student, and one with a teacher only."""
    folder = tmp_path_factory.mktemp("retrieve")
    data = write_npz_set(folder / "data")
    for name, stages in (("tiny", ("teacher", "search", "distill")), ("half", ("teacher",)), ("early", ())):
        with RunFolder.open(tiny_config(data, {"name": name}), folder / "runs") as run:
            for stage in stages:
                STAGES[stage](run, Silent())
    return folder


@pytest.fixture
def retrieve(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main(["retrieve", *arguments, "--runs-dir", str(folder / "runs"), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return ask


def test_test_images_look_for_training_images(folder: Path, retrieve: Any) -> None:
    report = retrieve("tiny")
    assert (report["database"], report["queries"], report["tap"]) == (48, 32, None)
    assert set(report["roles"]) == {"teacher", "student"} and report["roles"]["student"]["features"] == 64
    config = tiny_config(folder / "data")
    splits = load_splits(config.data, config.seed)
    teacher = load_teacher(RunFolder(config, folder / "runs" / "tiny"))
    teacher.fc = torch.nn.Identity()
    rows = []
    for split in (splits.train, splits.test):
        images, labels = split.batch(torch.arange(len(split)), "cpu")
        with torch.no_grad():
            rows += [teacher(normalize(images, splits.mean, splits.std)), labels]
    for metric in ("l2", "cosine"):
        expected = score_retrieval(*rows, metric=metric).to_json()  # type: ignore[arg-type]
        assert report["roles"]["teacher"][metric] == pytest.approx(expected, abs=1e-6)


def test_roles_taps_limits_and_the_released_form(retrieve: Any) -> None:
    both = retrieve("tiny")
    assert list(retrieve("half")["roles"]) == ["teacher"]
    student = retrieve("tiny", "--role", "student")
    assert student["roles"] == {"student": both["roles"]["student"]}
    tapped = retrieve("tiny", "--tap", "layer3")
    assert {role: row["features"] for role, row in tapped["roles"].items()} == {"teacher": 256, "student": 256}
    pooled = retrieve("tiny", "--tap", "flatten")
    assert pooled["roles"]["teacher"] == both["roles"]["teacher"]
    small = retrieve("tiny", "--limit", "20", "--queries", "8")
    assert (small["database"], small["queries"]) == (20, 8)
    released = retrieve("tiny", "--compat", "released")
    assert released["compat"] == "released"
    assert released["roles"]["teacher"]["l2"] != both["roles"]["teacher"]["l2"]  # 31 of 48 ranks are interpolated


def test_the_table_is_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "runs" / "tiny")
    assert main(["retrieve", run, "--compat", "released"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: 32 test images are matched against 48 training images")
    assert [line.split()[:2] for line in lines[2:6]] == [
        [role, metric] for role in ("teacher", "student") for metric in ("l2", "cosine")
    ]
    assert lines[6] == "note: top-48 covers the whole database, so it only shows the classes' shares of it"
    assert lines[7].startswith("scored as the released program does")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is neither a run folder nor the name of a run"),
        (["early"], "early has no trained net yet: run `qkd teacher`"),
        (["half", "--role", "student"], "half has no student yet, only a teacher: run `qkd distill`"),
        (["tiny", "--tap", "layer9"], "no module 'layer9'; did you mean"),
    ],
)
def test_bad_targets(retrieve: Any, arguments: list[str], message: str) -> None:
    answer = retrieve(*arguments, code=2)
    assert message in answer["error"] and answer["exit_code"] == 2


@pytest.mark.parametrize("words", [["--limit", "0"], ["--queries", "x"], ["--compat", "old"], ["--role", "aux"]])
def test_bad_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["retrieve", "tiny", *words])
    assert stopped.value.code == 2 and words[0] in capsys.readouterr().err
