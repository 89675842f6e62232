"""The run folder: written first, compared, locked, and honest about what is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from qkd.config import RunConfig
from qkd.failures import UsageError
from qkd.run import folder as rundir
from qkd.run.folder import RunFolder
from qkd.run.target import OWN_FILES, require_place
from qkd.testing import tiny_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path / "data")


def test_config_and_environment_are_written_first(config: RunConfig, tmp_path: Path) -> None:
    with RunFolder.open(config, tmp_path / "runs") as run:
        assert run.path == tmp_path / "runs" / "tiny"
        assert RunConfig.model_validate(yaml.safe_load((run.path / "config.yaml").read_text())) == config
        environment = json.loads((run.path / "environment.json").read_text())
    assert environment["seed"] == config.seed
    assert environment["packages"]["torch"] and environment["python"] and environment["cpu"]
    assert run.environment_changes() == ()
    assert {path.name for path in run.path.iterdir() if path.is_file()} <= OWN_FILES


def test_the_same_config_opens_it_again(config: RunConfig, tmp_path: Path) -> None:
    RunFolder.open(config, tmp_path).close()
    RunFolder.open(config.model_copy(), tmp_path).close()


def test_another_config_is_refused_with_the_differing_keys(config: RunConfig, tmp_path: Path) -> None:
    RunFolder.open(config, tmp_path).close()
    other = tiny_config(tmp_path / "data", {"student.train.lr": 0.5, "seed": 3})
    with pytest.raises(ValueError, match="another config") as caught:
        RunFolder.open(other, tmp_path)
    text = str(caught.value)
    assert "student.train.lr: 0.01 there, 0.5 here" in text
    assert "seed: 0 there, 3 here" in text
    assert "teacher" not in text  # what is equal is not listed
    assert "name=" in text and "--runs-dir" in text and "delete" in text
    RunFolder.open(config, tmp_path).close()  # nothing was lost, and the lock was given back


def test_keys_newer_than_the_folder_take_their_default(config: RunConfig, tmp_path: Path) -> None:
    run = RunFolder.open(config, tmp_path)
    values = yaml.safe_load((run.path / "config.yaml").read_text())
    del values["student"]["train"]["ema_decay"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(values))
    run.close()
    RunFolder.open(config, tmp_path).close()


def test_a_folder_of_something_else_is_refused(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"not a run folder.*thesis\.tex"):
        RunFolder.open(config, tmp_path)


def test_a_file_in_place_of_the_folder_is_named(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("")
    with pytest.raises(FileExistsError, match="tiny.*a file is where a folder is needed.*--runs-dir"):
        RunFolder.open(config, tmp_path)
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError, match="a file is where a folder is needed"):
        RunFolder.open(config, tmp_path / "runs")


def test_what_an_interrupted_start_left_does_not_matter(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / ".config.yaml.partial-1234").write_text("half")
    with RunFolder.open(config, tmp_path) as run:
        assert not list(run.path.glob(".config*"))
        (run.path / "environment.json").unlink()
    with RunFolder.open(config, tmp_path) as run:
        assert (run.path / "environment.json").exists()


def test_a_stage_is_complete_while_its_files_stay(config: RunConfig, tmp_path: Path) -> None:
    with RunFolder.open(config, tmp_path) as run:
        assert run.why_incomplete("teacher") == "not run"
        weights, given = run.folder("teacher") / "weights", run.folder("search") / "schedule"
        weights.write_text("w")
        given.write_text("s")
        run.complete("teacher", files=[weights], inputs=[Path("search/schedule")])
        assert run.is_complete("teacher")
        weights.write_text("W")
        assert run.why_incomplete("teacher") == "teacher/weights has changed"
        weights.unlink()
        assert run.why_incomplete("teacher") == "teacher/weights is missing"
        weights.write_text("w")
        given.write_text("another")
        assert run.why_incomplete("teacher") == "search/schedule has changed"
        (run.path / "manifests" / "teacher.json").write_text('{"files"')
        assert "damaged" in run.why_incomplete("teacher")


def test_a_stage_of_another_run_is_adopted(config: RunConfig, tmp_path: Path) -> None:
    with RunFolder.open(config, tmp_path / "one") as one, RunFolder.open(config, tmp_path / "two") as two:
        weights, given = one.folder("teacher/member_1") / "weights", one.folder("search") / "schedule"
        with pytest.raises(ValueError, match=r"its stage teacher is not complete \(not run\)"):
            two.adopt("teacher", one.path)
        weights.write_bytes(b"w")
        given.write_bytes(b"s")
        one.complete("teacher", files=[weights], inputs=[given])
        two.adopt("teacher", one.path)
        assert two.is_complete("teacher")
        assert (two.path / "teacher/member_1/weights").read_bytes() == b"w"
        weights.write_bytes(b"W")
        with pytest.raises(ValueError, match="member_1/weights has changed"):
            two.adopt("teacher", one.path)
        assert two.is_complete("teacher")


def test_completing_needs_the_files(config: RunConfig, tmp_path: Path) -> None:
    with RunFolder.open(config, tmp_path) as run, pytest.raises(FileNotFoundError):
        run.complete("teacher", files=[run.path / "teacher" / "weights"])


def test_another_environment_is_told(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.open(config, tmp_path) as run:
        there = rundir.environment(0)
        monkeypatch.setattr(
            rundir, "environment", lambda seed: {**there, "packages": {**there["packages"], "torch": "9.9"}}
        )
        assert run.environment_changes() == (f"torch: {there['packages']['torch']} then, 9.9 now",)


HOLDER = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.ftruncate(handle, 0)
os.write(handle, f"{os.getpid()}\\n".encode())
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_share_a_folder_and_a_dead_one_does_not_block(config: RunConfig, tmp_path: Path) -> None:
    RunFolder.open(config, tmp_path).close()
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "tiny" / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"in use by another process .id {other.pid}."):
            RunFolder.open(config, tmp_path)
        other.kill()
        other.wait()
    RunFolder.open(config, tmp_path).close()


def test_a_lock_is_held_until_it_is_closed(config: RunConfig, tmp_path: Path) -> None:
    probe = "import fcntl, os, sys; fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", probe, str(tmp_path / "tiny" / ".lock")]
    run = RunFolder.open(config, tmp_path)
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    run.close()
    run.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- what others put into a run folder


def test_nothing_is_written_through_links_out_of_the_folder(config: RunConfig, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("precious")
    (outside / ".x.partial-1").write_text("not ours")
    run = tmp_path / "runs" / "tiny"
    RunFolder.open(config, tmp_path / "runs").close()
    (run / ".lock").unlink()
    for name in ("student", ".lock", "teacher", "environment.yaml"):
        link = run / name
        link.symlink_to(outside if name in ("student", "teacher") else outside / "victim")
        with pytest.raises(ValueError, match="leads out of"):
            RunFolder.open(config, tmp_path / "runs")
        link.unlink()
    assert sorted(path.name for path in outside.iterdir()) == [".x.partial-1", "victim"]
    assert (outside / "victim").read_text() == "precious"
    (run / ".lock").symlink_to("inner")
    with pytest.raises(ValueError, match=r"\.lock is a link or a pipe"):
        RunFolder.open(config, tmp_path / "runs")
    (run / ".lock").unlink()
    (run / ".lock").hardlink_to(outside / "victim")
    with pytest.raises(ValueError, match=r"\.lock does not belong to this folder alone"):
        RunFolder.open(config, tmp_path / "runs")
    assert (outside / "victim").read_text() == "precious"
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with pytest.raises(ValueError, match=r"\.lock does not belong to"):
        RunFolder.open(config, tmp_path / "runs")


def test_a_folder_that_becomes_a_link_while_open_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with RunFolder.open(config, tmp_path / "runs") as run:
        (run.path / "student").symlink_to(tmp_path)
        with pytest.raises(ValueError, match="leads out of"):
            run.folder("student")
        with pytest.raises(ValueError, match="leads out of"):
            run.folder("../other")


def test_links_within_the_folder_are_fine(config: RunConfig, tmp_path: Path) -> None:
    RunFolder.open(config, tmp_path).close()
    (tmp_path / "tiny" / "alias").symlink_to("config.yaml")
    RunFolder.open(config, tmp_path).close()


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        ({"files": {}, "inputs": {}}, "damaged"),
        ({"files": {"../../secret": "0" * 64}, "inputs": {}}, "leads out of"),
        ({"files": {"/etc/hostname": "0" * 64}, "inputs": {}}, "leads out of"),
        ({"files": {"a\0b": "0" * 64}, "inputs": {}}, "cannot be resolved"),
        ({"files": ["x"], "inputs": {}}, "damaged"),
        ({"files": {"x": 3}, "inputs": {}}, "damaged"),
        ({"files": {"x": "0" * 64}}, "damaged"),
        ([1], "damaged"),
        ("\ud800", "damaged"),
    ],
)
def test_a_manifest_that_is_none_completes_nothing(
    config: RunConfig, tmp_path: Path, manifest: object, why: str
) -> None:
    with RunFolder.open(config, tmp_path / "one") as run, RunFolder.open(config, tmp_path / "two") as two:
        (run.folder("manifests") / "teacher.json").write_text(json.dumps(manifest))
        assert why in run.why_incomplete("teacher") and not run.is_complete("teacher")
        with pytest.raises(ValueError, match="not complete"):
            two.adopt("teacher", run.path)


def test_a_manifest_of_another_run_or_stage_completes_nothing(config: RunConfig, tmp_path: Path) -> None:
    other = tiny_config(tmp_path / "data", {"seed": 5})
    with RunFolder.open(config, tmp_path / "one") as run, RunFolder.open(other, tmp_path / "two") as two:
        for one in (run, two):
            (one.folder("teacher") / "weights").write_text("w")
            one.complete("teacher", files=[one.path / "teacher" / "weights"])
        swapped = (two.path / "manifests" / "teacher.json").read_text()
        own = (run.path / "manifests" / "teacher.json").read_text()
        (run.path / "manifests" / "teacher.json").write_text(swapped)
        assert "belongs to another run" in run.why_incomplete("teacher")
        (run.path / "manifests" / "teacher.json").write_text(own)
        (run.path / "manifests" / "distill.json").write_text(own)
        assert run.is_complete("teacher") and "or another stage" in run.why_incomplete("distill")
        old = {key: value for key, value in json.loads(own).items() if key in ("files", "inputs")}
        (run.path / "manifests" / "teacher.json").write_text(json.dumps(old))
        assert run.is_complete("teacher")  # those of older versions say neither


@pytest.mark.parametrize("text", ["[]", '{"packages": 3}', '{"packages": []}', "3"])
def test_an_environment_that_is_none_is_told(config: RunConfig, tmp_path: Path, text: str) -> None:
    with RunFolder.open(config, tmp_path) as run:
        (run.path / "environment.json").write_text(text)
        assert "damaged" in run.environment_changes()[0]


def test_a_config_that_laughs_is_refused_in_no_time(config: RunConfig, tmp_path: Path) -> None:
    RunFolder.open(config, tmp_path).close()
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "tiny" / "config.yaml").write_text("\n".join(lines))
    started = time.monotonic()
    with pytest.raises(ValueError, match="config.yaml: not YAML .*aliases"):
        RunFolder.open(config, tmp_path)
    assert time.monotonic() - started < 1


def test_a_place_for_runs_that_cannot_be_one_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(UsageError, match="--runs-dir .*file is not a folder"):
            require_place(place, "run")
    require_place(tmp_path / "new" / "runs", "run")
    assert not (tmp_path / "new").exists()
