"""A second student of a teacher that another run has trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from qkd.cli import main
from qkd.config import RunConfig
from qkd.config.binding import config_text, load_config
from qkd.data import DataError, load_splits
from qkd.failures import ConfigError
from qkd.files import sha256_of
from qkd.progress import Silent
from qkd.roles.images import run_images, stored_images
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import run_tiny, tiny_config, write_npz_set

TINY = {"teacher.train.epochs": 1, "student.train.epochs": 1}


@pytest.fixture(scope="module")
def first(unfused: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher is complete."""
    run = run_tiny(tiny_config(data, TINY), tmp_path_factory.mktemp("runs"), "teacher")
    run.close()
    return run.path


def second(first: Path, data: Path, name: str = "second", **changes: object) -> RunConfig:
    """Return the config of another student of the first run's teacher."""
    return tiny_config(data, {**TINY, "name": name, "teacher.run": str(first), **changes})


def test_the_teacher_is_copied_and_the_student_learns_from_it(first: Path, data: Path, tmp_path: Path) -> None:
    config = second(first, data, **{"student.quant.weight_bits": 2, "seed": 4})
    with run_tiny(config, tmp_path, "teacher", "search", "distill") as run:
        for name in ("weights.safetensors", "metrics.jsonl", "result.json"):
            assert sha256_of(run.path / "teacher" / name) == sha256_of(first / "teacher" / name)
        assert not (run.path / "teacher" / "checkpoint").exists()
        assert run.is_complete("distill") and (run.path / "data.json").is_file()


def test_it_needs_the_other_run_no_longer(first: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(first, tmp_path / "copy")
    config = second(copy, data)
    run_tiny(config, tmp_path, "teacher").close()
    shutil.rmtree(copy)
    with RunFolder.open(config, tmp_path) as run:
        assert run.is_complete("teacher")
    assert load_config(run.path / "config.yaml") == config


def test_a_copy_that_was_interrupted_begins_anew(
    first: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkd.run import folder

    done, whole = [], folder.write_bytes

    def killed_at_the_second(path: Path, content: bytes) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(path)
        whole(path, content)

    monkeypatch.setattr(folder, "write_bytes", killed_at_the_second)
    with RunFolder.open(second(first, data), tmp_path) as run:
        with pytest.raises(KeyboardInterrupt):
            STAGES["teacher"](run, Silent())
        assert run.why_incomplete("teacher") == "not run" and done
        monkeypatch.setattr(folder, "write_bytes", whole)
        STAGES["teacher"](run, Silent())
        assert run.is_complete("teacher")


def test_a_searched_agent_comes_with_its_teacher(unfused: None, data: Path, tmp_path: Path) -> None:
    search = {"teacher.agent.policy": "search", "search.members": 2, "search.epochs": 2, "search.interval_epochs": 1}
    searched = {**search, "search.train_images": 16, "search.val_images": 8}
    one = run_tiny(tiny_config(data, {**TINY, **searched}), tmp_path, "teacher")
    one.close()
    with run_tiny(second(one.path, data, **searched), tmp_path, "teacher", "search") as two:
        assert two.is_complete("search_teacher")
        for name in ("teacher.schedule.yaml", "teacher.population.jsonl", "teacher.cost.json"):
            assert sha256_of(two.path / "search" / name) == sha256_of(one.path / "search" / name)


def test_other_images_are_refused(first: Path, tmp_path: Path) -> None:
    other = write_npz_set(tmp_path / "other", train=80)
    with (
        RunFolder.open(second(first, other), tmp_path) as run,
        pytest.raises(DataError, match="was trained on other images"),
    ):
        STAGES["teacher"](run, Silent())
    assert not (run.path / "teacher").exists()


@pytest.mark.parametrize("change", [{"image_size": 12}, {"channels": 3}, {"mean": [0.5], "std": [0.5]}])
def test_images_in_another_form_are_refused(first: Path, data: Path, tmp_path: Path, change: dict[str, object]) -> None:
    """A teacher that normalizes or resizes otherwise would be another teacher, and nothing would say so."""
    config = second(first, data, **{f"data.{key}": value for key, value in change.items()})
    key = next(iter(change))
    with pytest.raises(
        DataError, match=rf"config.data.{key}: .* but the teacher of .* has learned from images with null"
    ):
        run_tiny(config, tmp_path, "teacher")
    (tmp_path / "config.yaml").write_text(config_text(config))
    with pytest.raises(ConfigError, match=rf"config.data.{key}: .*train a teacher without teacher.run"):
        load_config(tmp_path / "config.yaml")


def test_a_resize_rule_that_nothing_uses_is_no_other_form(first: Path, data: Path, tmp_path: Path) -> None:
    run_tiny(second(first, data, **{"data.resize": "pad"}), tmp_path, "teacher").close()


def test_a_teacher_that_has_seen_the_unseen_domain_is_refused(first: Path, data: Path, tmp_path: Path) -> None:
    domains = {"data.domains": {"a": {}, "b": {"invert": True}}, "data.unseen_domain": "b"}
    with pytest.raises(DataError, match=r"on other domains \(unseen: none\) than this run's \(unseen: b\)"):
        run_tiny(second(first, data, **domains), tmp_path, "teacher")


def test_a_run_without_a_record_of_its_images_is_refused(first: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(first, tmp_path / "copy")
    (copy / "data.json").unlink()
    with RunFolder.open(second(copy, data), tmp_path) as run, pytest.raises(DataError, match="no record of its images"):
        STAGES["teacher"](run, Silent())


def test_a_teacher_that_is_damaged_is_refused(first: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(first, tmp_path / "copy")
    (copy / "teacher" / "result.json").write_text("{}")
    config, message = second(copy, data), r"stage teacher is not complete \(teacher/result.json has changed\)"
    with RunFolder.open(config, tmp_path) as run, pytest.raises(ValueError, match=message):
        STAGES["teacher"](run, Silent())


def test_the_teachers_settings_are_those_of_its_run(first: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "second.yaml"
    values = yaml.safe_load(config_text(tiny_config(data, {**TINY, "name": "second"})))
    file.write_text(yaml.safe_dump({**values, "teacher": {"run": str(first)}}))
    assert load_config(file) == second(first, data)
    file.write_text(yaml.safe_dump(values))
    assert load_config(file, [f"teacher.run={first}"]) == second(first, data)
    there = r"config.teacher.train.lr: 0.3 on the command line, but the teacher of .* has 0.05; leave it out, or write "
    with pytest.raises(ConfigError, match=there + "teacher.train.lr=0.05$"):
        load_config(file, [f"teacher.run={first}", "teacher.train.lr=0.3"])
    longer = {**values["teacher"], "train": {**values["teacher"]["train"], "epochs": 30}}
    file.write_text(yaml.safe_dump({**values, "teacher": longer}))
    here = r"config.teacher.train.epochs: 30 in .*second.yaml, but the teacher of .* has 1; remove it from the file, "
    with pytest.raises(ConfigError, match=rf"{here}or add to the command teacher.train.epochs=1$"):
        load_config(file, [f"teacher.run={first}"])
    assert load_config(file, [f"teacher.run={first}", "teacher.train.epochs=1"]) == second(first, data)
    with pytest.raises(ConfigError, match=r"config.teacher.nte: unknown key"):
        load_config(file, [f"teacher.run={first}", "teacher.train.epochs=1", "teacher.nte=3"])
    file.write_text(yaml.safe_dump({**values, "teacher": {"run": str(tmp_path)}}))
    with pytest.raises(ConfigError, match=r"config.teacher.run: .* is not a run folder"):
        load_config(file)


def test_validate_says_that_the_teacher_is_not_there_yet(
    first: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "second.yaml"
    file.write_text(config_text(second(tmp_path / "none", data)))
    assert main(["validate", str(file)]) == 2
    assert "has no complete teacher: run `qkd teacher` with its config first" in capsys.readouterr().err
    file.write_text(config_text(second(first, data)))
    assert main(["validate", str(file)]) == 0


def test_the_refusal_of_another_student_says_the_way(
    first: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(config_text(tiny_config(data, {**TINY, "student.quant.weight_bits": 2})))
    assert main(["teacher", str(file), "--runs-dir", str(first.parent)]) == 2
    assert f"add `teacher.run={first}` to take its teacher instead" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "teacher.run=runs/first" in capsys.readouterr().out


def test_images_are_normalized_as_the_teacher_has_learned(first: Path, data: Path, tmp_path: Path) -> None:
    """Of another part of the set, mean and standard deviation would be others, and the teacher another function."""
    whole = run_images(RunFolder(load_config(first / "config.yaml"), first))
    config = second(first, data, **{"data.train_limit": 8, "seed": 4})
    assert load_splits(config.data, seed=4).mean != whole.mean
    with run_tiny(config, tmp_path, "teacher") as run:
        assert (run_images(run).mean, run_images(run).std) == (whole.mean, whole.std)
        assert stored_images(config, run.path).mean == whole.mean
    third = second(tmp_path / "second", data, name="third", **{"seed": 5})
    shutil.move(first, tmp_path / "elsewhere")
    try:
        with run_tiny(third, tmp_path, "teacher") as run:
            assert run_images(run).mean == whole.mean
            (run.path / "teacher" / "normalization.json").write_text("{}")
            with pytest.raises(DataError, match="does not hold a mean"):
                run_images(run)
    finally:
        shutil.move(tmp_path / "elsewhere", first)
