"""What a run is: which settings may change in a run folder, and what that undoes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qkd.config import RunConfig
from qkd.run.folder import RunFolder
from qkd.run.identity import changes, differences, identity, leaves, stage_settings
from qkd.testing import tiny_config

STAGES = ("teacher", "search", "distill", "export", "bench", "report")


def completed(tmp_path: Path) -> RunFolder:
    """Return a run folder whose stages are complete, each with a file."""
    with RunFolder.open(tiny_config(tmp_path / "data"), tmp_path) as run:
        for stage in STAGES:
            file = run.folder(stage) / "file"
            file.write_text(stage)
            run.complete(stage, [file], [run.path / "config.yaml"] if stage == "report" else [])
    return run


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({"threads": 3}, ["report"]),
        ({"device": "cuda"}, ["report"]),
        ({"data.workers": 5, "data.path": "moved", "data.eval_batch_size": 7, "data.download": False}, ["report"]),
        ({"student.train.checkpoint_every_s": 7.0, "teacher.train.checkpoint_every_s": 0.0}, ["report"]),
        ({"search.engine": "ray", "search.workers": 9, "search.address": "auto"}, ["report"]),
        ({"export.flavor": "qcdq"}, ["export", "report"]),
        ({"export.strict": True, "export.pack": "int8"}, ["export", "report"]),
        ({"bench.threads": 2}, ["bench", "report"]),
        ({"bench.on": ["local", "ssh://board"]}, ["bench", "report"]),
    ],
    ids=str,
)
def test_what_changes_no_training_redoes_the_stages_behind_it(
    tmp_path: Path, changes: dict[str, object], redone: list[str]
) -> None:
    completed(tmp_path)
    other = tiny_config(tmp_path / "data", changes)
    with RunFolder.open(other, tmp_path) as run:
        assert [stage for stage in STAGES if not run.is_complete(stage)] == redone
        assert RunConfig.model_validate(yaml.safe_load((run.path / "config.yaml").read_text())) == other


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"teacher.train.lr": 0.2}, {"student.quant.weight_bits": 2}, {"data.batch_size": 8},
     {"data.val_fraction": 0.5}, {"search.members": 3}, {"student.calibration_batches": 3}],
    ids=str,
)  # fmt: skip
def test_what_changes_a_training_is_another_run(tmp_path: Path, changes: dict[str, object]) -> None:
    run = completed(tmp_path)
    before = (run.path / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match="holds a run with another config") as caught:
        RunFolder.open(tiny_config(tmp_path / "data", {**changes, "bench.threads": 2}), tmp_path)
    assert str(list(changes)[0]) in str(caught.value) and "bench" not in str(caught.value)
    assert ("teacher.run=" in str(caught.value)) == all(key.startswith("student.") for key in changes)
    assert (run.path / "config.yaml").read_bytes() == before


def test_a_reason_names_the_setting(tmp_path: Path) -> None:
    completed(tmp_path)
    with RunFolder.open(tiny_config(tmp_path / "data", {"bench.threads": 2}), tmp_path) as run:
        assert run.why_incomplete("bench") == "bench.threads was 1, is 2"


def test_a_folder_with_another_name_is_the_same_run(tmp_path: Path) -> None:
    run = completed(tmp_path)
    moved = run.path.rename(run.path.with_name("moved"))
    with RunFolder.open(tiny_config(tmp_path / "data", {"name": "moved"}), tmp_path) as again:
        assert again.path == moved and again.is_complete("bench")


def test_reopening_takes_the_config_that_is_there(tmp_path: Path) -> None:
    run = completed(tmp_path)
    with RunFolder.reopen(run.path) as again:
        assert again.config == run.config and again.is_complete("report")
    with pytest.raises(FileNotFoundError):
        RunFolder.reopen(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_extending_keeps_a_stage_complete(tmp_path: Path) -> None:
    with RunFolder.reopen(completed(tmp_path).path) as run:
        more = run.path / "bench" / "more"
        more.write_text("x")
        run.extend("bench", [more])
        assert run.is_complete("bench")
        more.write_text("y")
        assert run.why_incomplete("bench") == "bench/more has changed"


def test_a_setting_that_a_manifest_does_not_know_is_passed_over(tmp_path: Path) -> None:
    run = completed(tmp_path)
    manifest = run.manifest_file("bench")
    manifest.write_text(manifest.read_text().replace('"threads"', '"of_older_versions"'))
    assert run.is_complete("bench")


def test_identity_and_differences() -> None:
    values = {"name": "x", "seed": 1, "bench": {"on": ["local"]}, "student": {"terms": [{"weight": 1}], "empty": []}}
    assert identity(values) == {"seed": 1, "student.terms[0].weight": 1, "student.empty": []}
    own = {"seed": 1, "student": values["student"]}
    assert stage_settings("bench", values) == {**own, "bench": {"on": ["local"]}}
    assert stage_settings("export", values) == own
    assert changes({"a": [1, {"b": 2}], "c": 3}, {"a": [1, {"b": 4}], "d": 5}) == {"a[1].b": ("2", "4")}
    assert changes({"a": [1]}, {"a": [1, 2]}) == {"a": ("[1]", "[1, 2]")} and changes([], {}) == {"": ("[]", "{}")}
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == {"b": ("2", "3"), "c": ("absent", "None")}
    assert dict(leaves([])) == {"": []}
