"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from qkd.checking.names import TABLES, method_notes
from qkd.cli import STAGE_NAMES, main, parse
from qkd.cli.commands.ls import TABLE_NAMES
from qkd.cli.options import completion
from qkd.config import RunConfig
from qkd.config.binding import bind, config_text, load_config, shipped_configs
from qkd.files.yaml_text import parse_yaml
from qkd.testing import tiny_config, write_npz_set

GOOD = "name: small\ndata: {name: digits}\nteacher: {net: resnet8, train: {epochs: 1}}\n" \
       "student: {quant: {weight_bits: 2, act_bits: 2}, train: {epochs: 1}}\n"  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(GOOD)
    return file


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def command(*_: Any, **__: Any) -> int:
        raise error

    for name in ("run", "validate"):
        monkeypatch.setattr(f"qkd.cli.commands.{name}.load", command)


def test_the_shell_completes_configs_and_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """argcomplete asks the parser; what is ours are the words for configs and keys."""
    (tmp_path / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
    found = list(completion.configs(f"{tmp_path}/m"))
    assert f"{tmp_path}/mine.yaml" in found and "digits/w2a2" in found
    keys = list(completion.overrides("student.train.ep"))
    assert keys == ["student.train.epochs="] and "data.image_size=" in completion.overrides("")
    asked: list[object] = []
    module: Any = types.ModuleType("argcomplete")
    module.autocomplete = asked.append
    monkeypatch.setitem(sys.modules, "argcomplete", module)
    monkeypatch.setenv(completion.ASKED, "1")
    parse(["ls"])
    assert len(asked) == 1
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(SystemExit):
        parse(["ls"])
    assert "argcomplete is missing: pip install 'qkd-toolkit[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["export", "--help"], ["ls", "--help"]])
def test_help_ends_well(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: qkd" in capsys.readouterr().out


def test_help_shows_examples_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "qkd run digits/w2a2" in text and "exit codes: 0 done" in text
    for name in (
        "run",
        "teacher",
        "search",
        "distill",
        "export",
        "bench",
        "report",
        "ls",
        "show",
        "validate",
        "cost",
        "doctor",
    ):
        assert f"\n    {name} " in text


def test_help_takes_under_half_a_second() -> None:
    seconds = []
    for _ in range(5):  # the machine may be busy: the fastest of a few counts
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "qkd.cli", "--help"], check=True, capture_output=True, timeout=60)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("module", ["qkd", "qkd.cli"])
def test_a_module_is_the_command(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "validate", "digits/smoke"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "digits/smoke: no faults in keys, names and files",
        "not checked: nets, images, export; `qkd run digits/smoke --dry-run` checks them",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "c.yaml", "--fast"],
        ["doctor", "x=1"],
        ["ls", "cars"],
        ["diagnose", "a", "--temperature", "nan"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "usage: qkd" in captured.err


def test_a_stray_word_is_no_override(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config), "stray"]) == 2
    assert "override `stray`: must be key.path=value" in capsys.readouterr().err


def test_overrides_may_stand_before_and_after_options() -> None:
    args = parse(["run", "c.yaml", "a=1", "--runs-dir", "x", "b.c=2", "--json", "d=-1"])
    assert args.overrides == ["a=1", "b.c=2", "d=-1"]
    assert args.runs_dir == Path("x") and args.json


def test_a_run_may_end_early(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("qkd.pipeline.run_stages", lambda run, names, progress: asked.append(tuple(names)))
    for words in (["--until", "distill"], ["--until", "teacher"], []):
        assert main(["run", str(config), "--runs-dir", str(tmp_path / "runs"), *words]) == 0
    assert asked == [STAGE_NAMES[:3], STAGE_NAMES[:1], STAGE_NAMES]
    with pytest.raises(SystemExit) as caught:
        main(["run", str(config), "--until", "never"])
    assert caught.value.code == 2


def test_validate_accepts_a_good_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config)]) == 0
    assert "no faults" in capsys.readouterr().out
    assert main(["validate", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "small", "faults": []}


@pytest.mark.parametrize("words", [["bench"], ["bench", "--on", "x"], ["report"], ["export"], ["run"], ["diagnose"]])
def test_a_run_that_is_not_there_is_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    assert main([words[0], "runs/missing", *words[1:]]) == 2
    message = capsys.readouterr().err
    assert "runs/missing" in message and "runs has: mine (see --runs-dir)" in message and "bench section" not in message


def test_validate_lists_all_faults(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["data.name=digitz", "student.train.lr=-1", "teacher.nte=resnet8"]
    assert main(["validate", str(config), *changes]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "qkd: 3 faults:",
        "config.teacher.nte: unknown key; did you mean `net`?",
        "config.student.train.lr: must be positive, got -1",
        "config.data.name: unknown data set 'digitz'; did you mean `digits`?",
    ]


def test_faults_are_json_where_asked_for(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config), "seed=x", "--json"]) == 2
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"error": "config.seed: must be a whole number, got 'x'", "exit_code": 2}


def test_show_prints_what_binds_to_the_same_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(config), "seed=7"]) == 0
    text = capsys.readouterr().out
    assert bind(parse_yaml(text)) == load_config(config, ["seed=7"])
    assert main(["show", str(config), "--json"]) == 0
    assert bind(json.loads(capsys.readouterr().out)) == load_config(config)


def test_ls_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert list(tables) == list(TABLES) == list(TABLE_NAMES)
    assert all(tables.values())
    assert set(tables["configs"]) == set(shipped_configs())
    for name in ("configs", "datasets", "losses", "quantizers", "devices", "policies"):
        assert all(tables[name].values()), f"every one of {name} is described"
    assert {"resnet20", "torchvision/resnet18"} <= set(tables["nets"])
    assert main(["ls", "datasets"]) == 0
    text = capsys.readouterr().out
    assert "digits" in text and "resnet20" not in text


def test_methods_are_listed_by_keys_that_a_config_has() -> None:
    for note in method_notes():
        place: Any = RunConfig
        for key in note.replace(": ", ".").split("."):
            kind = place.model_fields[key].annotation
            parts = [part for part in (kind, *get_args(kind)) if isinstance(part, type)]
            place = next((part for part in parts if issubclass(part, BaseModel)), None)


def test_a_missing_config_names_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "digits/w2a3"]) == 2
    assert "did you mean `digits/w2a2`" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["distill", "export", "bench", "report"])
def test_a_stage_says_what_is_missing(
    stage: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([stage, str(config), "--runs-dir", str(tmp_path / "runs")]) == 2
    text = capsys.readouterr().err
    assert f"stage {stage}" in text and "(not run)" in text
    before = {"distill": "search", "export": "distill", "bench": "export", "report": "bench"}[stage]
    assert f"run `qkd run {tmp_path / 'runs' / 'small'} --until {before}`" in text


def test_a_run_folder_that_cannot_be_made_is_the_users_to_mend(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["teacher", str(config), "--runs-dir", str(tmp_path / "file")]) == 2
    text = capsys.readouterr().err
    assert str(tmp_path / "file") in text and "--runs-dir" in text and "Traceback" not in text


def test_an_interrupt_says_that_the_run_can_go_on(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails_with(monkeypatch, KeyboardInterrupt())
    assert main(["run", str(config)]) == 130
    assert "the same command resumes from the last checkpoint" in capsys.readouterr().err
    assert main(["validate", str(config)]) == 130
    assert "resumes" not in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_and_a_traceback_in_a_file(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails_with(monkeypatch, ZeroDivisionError("first line\nsecond"))
    assert main(["run", str(config)]) == 1
    text = capsys.readouterr().err
    assert text.startswith("qkd: ZeroDivisionError: first line (traceback: ") and text.count("\n") == 1
    log = Path(text.split("traceback: ")[1].rstrip(")\n"))
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()
    assert main(["run", str(config), "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("qkd ")


def test_that_there_is_no_gpu_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["ls", "nets"]) == 0
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
    logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


@pytest.mark.filterwarnings("always")
def test_what_prepare_warns_of_is_a_line_for_people_and_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be said again when the student is exported, with a place in our source."""
    net = tmp_path / "own.py"
    net.write_text(
        "from torch import nn\n"
        "class Body(nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        return nn.functional.conv2d(x, self.weight.abs(), self.bias)\n"
        "def build(classes, channels, image_size):\n"
        "    return nn.Sequential(Body(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(4, classes))\n"
    )
    config, images = tmp_path / "own.yaml", write_npz_set(tmp_path / "images")
    config.write_text(config_text(tiny_config(images, {"teacher.net": f"{net}:build", "name": "warned"})))
    assert main(["run", str(config), "--runs-dir", str(tmp_path), "--until", "export"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "computes 0.weight (abs)" in line]
    assert len(told) == 1 and told[0].startswith("warning: the network computes")
