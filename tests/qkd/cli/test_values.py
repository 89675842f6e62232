"""Files that commands write: checked before anything is computed, and never one of a run's own."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from qkd.cli.entry import main
from qkd.cli.options.values import output_file
from qkd.run.target import run_of


def run_folder(path: Path) -> Path:
    for name in ("config.yaml", "environment.json", "student/weights.safetensors", "export/student.onnx"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    return path


def contents(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_place_outside_of_runs_or_beside_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "runs" / "a")
    for free in (tmp_path / "x.png", tmp_path / "runs" / "x.png", run / "x.png"):
        assert run_of(free) is None and output_file(".png")(str(free)) == free
    for own in ("config.yaml", "report.html", "export/student.onnx", "bench/new.json"):
        assert run_of(run / own) == run.resolve()
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    for path in (tmp_path / "link" / "config.yaml", Path("config.yaml"), Path("export/../config.yaml")):
        assert run_of(path) == run.resolve(), path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x.pdf", "must end in .svg or .png, got x.pdf"),
        ("", "must end in .svg or .png, got"),
        ("none/x.png", "needs the name of a file in an existing folder"),
        ("folder.png", "needs the name of a file in an existing folder"),
    ],
)
def test_other_names_are_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        output_file(".svg", ".png")(text)


COMMANDS = {
    "html": (["compare", "RUN"], ["ls", "runs", "RUNS"]),
    "json": (["bench", "RUN"],),
    "png": (
        ["generate", "RUN"],
        ["diagnose", "RUN"],
        ["policy", "show", "randaugment"],
        ["policy", "sample", "randaugment", "--data", "digits", "--epochs", "0"],
    ),
    "yaml": (["policy", "import", "LOG", "--epochs", "1", "--op-order", "py2"], ["init", "--force"]),
    "so": (["lowbit", "build"],),
}
EVERY = [(words, ending) for ending, several in COMMANDS.items() for words in several]


@pytest.mark.parametrize(("words", "ending"), EVERY, ids=lambda value: "-".join(value[:2]) if len(value) < 9 else "")
def test_no_command_replaces_a_file_of_a_run(
    words: list[str], ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`qkd compare A B --out A/config.yaml` replaced the config with a page; the run could not be opened any more."""
    run = run_folder(tmp_path / "a")
    before = contents(tmp_path)
    places = {"RUN": str(run), "RUNS": str(tmp_path)}
    own = ("config.yaml", "student/weights.safetensors", "export/student.onnx", f"export/new.{ending}", "report.html")
    for name in own:
        with pytest.raises(SystemExit) as caught:
            main([*(places.get(word, word) for word in words), "--out", str(run / name)])
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert "must end in" in said or "would be among the files of the run" in said
    if words[0] != "init":  # which makes it
        with pytest.raises(SystemExit):
            main([*(places.get(word, word) for word in words), "--out", str(tmp_path / "none" / f"x.{ending}")])
        assert "in an existing folder" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_every_option_that_names_a_file_to_write_is_among_them() -> None:
    sources = Path(main.__code__.co_filename).parent / "commands"
    text = "\n".join(path.read_text() for path in sources.rglob("*.py"))
    assert text.count("output_file(") == len(EVERY)
    unchecked = re.findall(r'"--out(?:put)?",\s*type=user_path,\s*metavar="(\w+)"', text)
    assert unchecked == ["DIR"], "of `qkd lowbit wheel`"
