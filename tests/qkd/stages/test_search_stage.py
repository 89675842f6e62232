"""The search of both agents within a run: order, files, reproduction, interruption, and what it refuses."""

from __future__ import annotations

import copy
import html
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import qkd.data.loading.load
from qkd.agents import Op, Policy, Schedule, Segment, load_schedule, read_schedule_file, save_schedule
from qkd.cli import main
from qkd.failures import UsageError
from qkd.files import sha256_of
from qkd.pipeline import run_stages as run_in_order
from qkd.progress import Progress, Silent
from qkd.report import render_page, summarize
from qkd.roles.agents import role_agent, unsearched_agent
from qkd.roles.learner import stretched_phases, stretched_train
from qkd.roles.stored import changed_sources
from qkd.run.folder import RunFolder
from qkd.search.board import table, turns_done
from qkd.search.role_search import config_mark, open_journal, search_agent
from qkd.stages import STAGES
from qkd.stages.report import gather, read_search
from qkd.testing import run_tiny, tiny_config

pytestmark = pytest.mark.usefixtures("unfused")

SEARCHED = {"policy": "search", "crop_padding": 1, "flip": False}
SEARCH = {"members": 4, "epochs": 5, "interval_epochs": 2, "train_images": 32, "val_images": 24}
BOTH = {"teacher.agent": SEARCHED, "student.agent": SEARCHED, "search": SEARCH}
FILES = ("teacher.schedule.yaml", "teacher.population.jsonl", "student.schedule.yaml", "student.population.jsonl")


def config_of(data: Path, changes: dict[str, Any] | None = None, **search: Any) -> Any:
    return tiny_config(data, copy.deepcopy({**BOTH, **(changes or {}), "search": {**SEARCH, **search}}))


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run with both searches, through the stages in order."""
    run = RunFolder.open(config_of(data), tmp_path_factory.mktemp("runs"))
    run_in_order(run, ("teacher", "search", "distill"), Silent())
    return run


def steady(run: RunFolder) -> dict[str, str]:
    return {name: (run.path / "search" / name).read_text() for name in FILES if (run.path / "search" / name).is_file()}


def _moved(content: bytes) -> bytes:
    """Return a safetensors file with the last byte of its last tensor changed."""
    return content[:-1] + bytes([content[-1] ^ 1])


def population(run: RunFolder, role: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "search" / f"{role}.population.jsonl").read_text().splitlines()]


def test_both_agents_are_found_and_used(done: RunFolder) -> None:
    result = json.loads((done.path / "search" / "result.json").read_text())
    assert result["searched"] is True and result["note"] == "searched: teacher and student"
    for role in ("teacher", "student"):
        found = read_schedule_file(done.path / "search" / f"{role}.schedule.yaml")
        assert found.role == role and found.schedule.epochs == 5
        facts = found.provenance
        assert facts["seed"] == 0 and facts["searched"] is True and facts["settings"]["members"] == 4
        assert facts["made_from"]["config"] == config_mark(done.config, role)
        assert len(facts["made_from"]["data"]) > 8
        assert len(facts["lineage"]) == len(facts["best_val_accuracy"]) == len(facts["epochs_of_rounds"]) == 3
        assert facts["val_accuracy"] == facts["lineage_val_accuracy"][-1] == result[role]["search"]["val_accuracy"]
        log = population(done, role)
        assert [(row["round"], row["member"]) for row in log[:8]] == [(n, m) for n in (0, 1) for m in range(4)]
        assert {row["epoch"] for row in log} == {2, 4, 5} and len(log) == 9
        assert sum(row["copied"] for row in log) == 1 and all(len(row["ops"]) == 30 for row in log)
        cost = json.loads((done.path / "search" / f"{role}.cost.json").read_text())
        assert cost["run"] == {"trained_images": (4 * 4 + 1) * 32, "validated_images": 9 * 24}
        assert cost["published_validates_more_by"] >= 3 and cost["seconds"] > 0
        agent = role_agent(done, role)
        assert agent.policy == "file" and agent.crop_padding == 1 and not agent.flip
        assert agent.schedule is not None and load_schedule(agent.schedule) == found.schedule
        assert sorted(path.name for path in (done.path / "search" / role).iterdir()) == ["journal.json"]
    weights = sha256_of(done.path / "teacher" / "weights.safetensors")
    assert found.provenance["made_from"]["teacher/weights.safetensors"] == weights  # the student's: from that teacher
    assert len({json.dumps(row["ops"]) for row in population(done, "student")}) > 1


def test_the_same_seed_finds_the_same_and_another_one_something_else(
    done: RunFolder, data: Path, tmp_path: Path
) -> None:
    again = RunFolder.open(config_of(data, {"name": "again"}), tmp_path)
    run_in_order(again, ("teacher", "search"), Silent())
    assert steady(again) == steady(done) and len(steady(done)) == 4
    other = RunFolder.open(config_of(data, {"name": "other", "seed": 1}), tmp_path)
    search_agent(other, "teacher", Silent())
    assert steady(other)["teacher.population.jsonl"] != steady(done)["teacher.population.jsonl"]


def test_a_changed_schedule_undoes_what_was_made_from_it(data: Path, tmp_path: Path) -> None:
    run = RunFolder.open(config_of(data, {"student.agent": {"policy": "none"}}), tmp_path)
    run_in_order(run, ("teacher", "search"), Silent())
    file = run.path / "search" / "teacher.schedule.yaml"
    text = file.read_text()
    file.write_text(text + "\n")
    assert run.why_incomplete("teacher") == run.why_incomplete("search_teacher") == f"search/{file.name} has changed"
    run_in_order(run, ("teacher", "search"), Silent())  # written again from the journal
    assert file.read_text() == text and run.is_complete("teacher")


def test_a_schedule_file_that_changes_between_the_stages_is_never_recorded_falsely(data: Path, tmp_path: Path) -> None:
    """The student trains by the user's file, which may have changed since the search stage described it."""

    def write(name: str, *, role: str = "student") -> Path:
        save_schedule(Schedule((Segment(1, Policy((Op(name, 0.5, 3),))),)), tmp_path / f"{role}.yaml", role="student")
        return tmp_path / f"{role}.yaml"

    def drawn(run: RunFolder, role: str) -> str:
        segment = load_schedule(run.path / "search" / f"{role}.schedule.yaml").segments[0]
        return segment.policy.ops[0].name

    files = {
        f"{role}.agent": {"policy": "file", "schedule": str(write("Rotate", role=role))}
        for role in ("teacher", "student")
    }
    config = tiny_config(data, files)
    run_tiny(config, tmp_path, "teacher", "search").close()
    write("Invert")
    with RunFolder.open(config, runs_dir=tmp_path) as run:
        with pytest.raises(UsageError, match=r"search \(student\.agent\.schedule: .*student\.yaml has changed\)"):
            run_in_order(run, ("distill",), Silent())
        run_in_order(run, ("search", "distill"), Silent())
        assert drawn(run, "student") == "Invert" and changed_sources(run.path, config) == ""
        write("Solarize")
        assert "student.agent.schedule" in changed_sources(run.path, config), "a complete run keeps what it made"
        run_in_order(run, ("search", "distill"), Silent())
        assert drawn(run, "student") == "Invert"
    other = config.model_copy(update={"name": "other"})
    run_tiny(other, tmp_path, "teacher").close()
    write("Solarize", role="teacher")
    with (
        RunFolder.open(other, runs_dir=tmp_path) as run,
        pytest.raises(UsageError, match=r"teacher\.agent\.schedule: .* changed since this run's teacher was trained"),
    ):
        run_in_order(run, ("teacher", "search"), Silent())


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_are_replaced_after_the_search_are_refused(
    role: str, done: RunFolder, data: Path, tmp_path: Path
) -> None:
    """What the search found is for the weights that its members started from."""
    given = tmp_path / "given.safetensors"
    given.write_bytes((done.path / "teacher" / "weights.safetensors").read_bytes())
    same = {"student.net": done.config.teacher_net} if role == "student" else {}
    config = config_of(data, {f"{role}.weights": str(given), **same}, epochs=3)
    with RunFolder.open(config, runs_dir=tmp_path) as run:
        for each in ("teacher", "student")[: 1 if role == "teacher" else 2]:
            search_agent(run, each, Silent())  # type: ignore[arg-type]
            if each != role:
                STAGES[each](run, Silent())
        found = read_schedule_file(run.path / "search" / f"{role}.schedule.yaml").provenance
        assert found["weights_sha256"] == sha256_of(given)
        good = given.read_bytes()
        given.write_bytes(_moved(good))
        order = ("teacher",) if role == "teacher" else ("search", "distill")
        with pytest.raises(
            ValueError, match=rf"{role}\.weights: .* has changed since the search for this run's {role}"
        ):
            run_in_order(run, order, Silent())
        given.write_bytes(good)
        run_in_order(run, order, Silent())


def test_search_alone_does_what_it_can_and_says_what_is_missing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.open(config_of(data), tmp_path)
    with pytest.raises(UsageError, match=r"the teacher's agent is found, but the student's search distills .*qkd tea"):
        STAGES["search"](run, Silent())
    assert run.is_complete("search_teacher") and not run.is_complete("search")
    run.close()
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    assert main(["search", str(path), "--runs-dir", str(tmp_path)]) == 2
    assert "run `qkd teacher` with the same config first" in capsys.readouterr().err
    for stage in ("teacher", "search"):
        assert main([stage, str(path), "--runs-dir", str(tmp_path)]) == 0


def test_a_shared_schedule(data: Path, tmp_path: Path) -> None:
    run = RunFolder.open(config_of(data, {"student.agent": {"policy": "teacher", "crop_padding": 2}}), tmp_path)
    run_in_order(run, ("teacher", "search"), Silent())
    shared = role_agent(run, "student")
    assert shared.schedule == run.path / "search" / "teacher.schedule.yaml" and shared.crop_padding == 2
    found = read_schedule_file(run.path / "search" / "student.schedule.yaml")
    original = load_schedule(run.path / "search" / "teacher.schedule.yaml")
    assert found.schedule == original.stretched(run.config.student.train.epochs)
    assert found.provenance == {"policy": "teacher", "searched": True}
    assert not (run.path / "search" / "student").exists()
    plain = tiny_config(
        data, {"teacher.agent.policy": "trivial", "student.agent": {"policy": "teacher", "flip": False}}
    )
    agent = role_agent(RunFolder(plain, tmp_path), "student")
    assert (agent.policy, agent.flip) == ("trivial", False)


def test_a_student_of_another_net_gets_its_own_start_first(data: Path, tmp_path: Path) -> None:
    changes = {
        "student.init": "float", "student.float_train": {"epochs": 1, "lr": 0.05}, "student.view": "own",
        "student.terms": [{"loss": "cross_entropy"}, {"loss": "similarity_preserving", "taps": [["layer3", "layer3"]]}],
    }  # fmt: skip
    run = RunFolder.open(config_of(data, changes, compat="weights_only"), tmp_path)
    run_in_order(run, ("teacher", "search", "distill"), Silent())
    made_from = read_schedule_file(run.path / "search" / "student.schedule.yaml").provenance["made_from"]
    assert {"student/float/weights.safetensors", "search/teacher.schedule.yaml"} <= set(made_from)


def test_no_test_image_is_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.open(config_of(data), tmp_path)
    reads: list[str] = []
    load = qkd.data.loading.load.DATASETS["npz"]

    def poisoned(config: Any) -> Any:
        parts = load(config)

        def refuse(*_: Any) -> Any:
            reads.append("test")
            raise AssertionError("a test image was read")

        parts.test.batch = refuse
        return parts

    monkeypatch.setitem(qkd.data.loading.load.DATASETS, "npz", poisoned)
    search_agent(run, "teacher", Silent())
    assert reads == []
    with pytest.raises(AssertionError, match="a test image was read"):  # the poison works: the stage's last step scores
        STAGES["teacher"](run, Silent())
    monkeypatch.undo()
    STAGES["teacher"](run, Silent())
    monkeypatch.setitem(qkd.data.loading.load.DATASETS, "npz", poisoned)
    reads.clear()
    search_agent(run, "student", Silent())
    assert reads == [] and run.is_complete("search_student")


class Stop(BaseException):
    """What stands for a kill within a test's process."""


def test_stopped_between_any_two_file_operations_it_ends_with_the_same_bits(
    done: RunFolder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: text for name, text in steady(done).items() if name.startswith("teacher")}
    real, stops = {name: getattr(os, name) for name in ("write", "fsync", "replace", "unlink")}, 0
    for die_at in range(3, 60, 14):  # a search has about 90 operations; a new one begins after each stop
        run = RunFolder.open(config_of(data, {"name": f"stopped{die_at}"}), tmp_path)
        while not run.is_complete("search_teacher"):
            count = [0]

            def counted(function: Any, count: list[int] = count, die_at: int = die_at) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    count[0] += 1
                    if count[0] == die_at:
                        raise Stop
                    return function(*args, **kwargs)

                return call

            for name, function in real.items():
                monkeypatch.setattr(os, name, counted(function))
            try:
                search_agent(run, "teacher", Silent())
            except Stop:
                stops += 1
            finally:
                monkeypatch.undo()
            die_at += 5  # so that it gets on, and stops elsewhere
        assert steady(run) == expected
        assert [path.name for path in (run.path / "search" / "teacher").iterdir()] == ["journal.json"]
    assert stops > 8


def test_images_are_refused_that_are_not_there(data: Path, tmp_path: Path) -> None:
    run = RunFolder.open(config_of(data, val_images=33), tmp_path)
    with pytest.raises(ValueError, match=r"search\.val_images: 33 are requested, but there are 32"):
        search_agent(run, "teacher", Silent())


def test_another_teacher_is_another_search(data: Path, tmp_path: Path) -> None:
    run = RunFolder.open(config_of(data, {"teacher.agent": {"policy": "none"}}), tmp_path)
    STAGES["teacher"](run, Silent())
    from qkd.data import load_splits

    splits = load_splits(run.config.data, seed=0)
    weights = run.path / "teacher" / "weights.safetensors"
    open_journal(run, "student", splits, [weights])._write()
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"started with other inputs \(teacher/weights\.safetensors changed since\)"):
        open_journal(run, "student", splits, [weights])


@pytest.mark.parametrize(("changes", "message"), [
    ({"teacher.agent.policy": "teacher"}, r"`teacher` is for the student"),
    ({"teacher.train": None, "teacher.weights": "w.safetensors"}, r"`search` needs teacher\.train"),
    ({"search.members": 1}, r"greater than or equal to 2"),
    ({"search.interval_epochs": 5}, r"`interval_epochs` must be less than `epochs`, .* got 5 of 5"),
    ({"search.interval_epochs": 0}, r"greater than or equal to 1"),
    ({"search.engine": "dask"}, r"'local' or 'ray'"),
])  # fmt: skip
def test_configs_that_make_no_sense(data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(data, copy.deepcopy({**BOTH, **changes}))


def test_a_config_may_name_the_new_policies(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    values = config_of(data).model_dump(mode="json")
    path.write_text(yaml.safe_dump(values))
    assert main(["validate", str(path)]) == 0
    assert main(["validate", str(path), "teacher.agent.policy=serch"]) == 2
    assert "did you mean `search`" in capsys.readouterr().err
    assert main(["ls", "policies"]) == 0
    assert "population search" in capsys.readouterr().out
    assert main(["run", str(path), "--dry-run", "--runs-dir", str(tmp_path)]) == 0


def test_lengths_follow_the_search(data: Path) -> None:
    changes = {
        "student.train": {"epochs": 10, "lr": 0.1, "warmup_epochs": 2},
        "student.phases": [
            {"name": "a", "epochs": 3},
            {"name": "b", "epochs": 6},
            {"name": "c", "epochs": 1, "freeze_batch_norm": True},
        ],
    }
    config = config_of(data, changes)
    assert [(p.name, p.epochs) for p in stretched_phases(config, 25)] == [("a", 7), ("b", 15), ("c", 3)]
    assert [(p.name, p.epochs) for p in stretched_phases(config, 5)] == [("a", 1), ("b", 3), ("c", 1)]
    assert stretched_train(config.student.train, 5).warmup_epochs == 1.0
    plain = config_of(data)
    assert [(p.epochs, p.freeze_batch_norm) for p in stretched_phases(plain, 20)] == [(18, False), (2, True)]
    assert (
        unsearched_agent(plain.student.agent).policy == "crop_flip" and not unsearched_agent(plain.student.agent).flip
    )


def test_the_report_draws_both_searches_and_both_schedules(done: RunFolder) -> None:
    record = gather(done)
    assert list(record.searches) == ["teacher", "student"] and list(record.schedules) == ["teacher", "student"]
    found = record.searches["student"]
    assert list(found.epochs) == [2, 4, 5] and len(found.best) == len(found.mean) == len(found.chosen) == 3
    assert all(mean <= best for mean, best in zip(found.mean, found.best, strict=True))
    page = html.unescape(render_page(summarize(done.path), record))
    for text in ("student's search: validation accuracy", "teacher's agent", "found by the teacher's"):
        assert text in page
    assert "validated 216 in" in page and "it is 3.02 times" in page
    assert read_search(done.path, "nobody") is None


def test_the_table_tells_where_members_come_from(done: RunFolder) -> None:
    from qkd.data import load_splits

    journal = open_journal(done, "teacher", load_splits(done.config.data, seed=0), [])
    lines = table(journal)
    assert lines[0].split() == ["member", "epoch", "accuracy", "before", "lineage"] and len(lines) == 5
    assert sum("(rests)" in line for line in lines) == 3
    (finalist,) = (line for line in lines[1:] if "(rests)" not in line)
    assert finalist.split()[1] == "5" and finalist.count(" > ") == 2 and turns_done(journal) == 9


def test_progress_says_how_far_it_is(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.open(config_of(data), tmp_path)
    search_agent(run, "teacher", Progress())
    lines = [line for line in capsys.readouterr().err.splitlines() if "turn" in line]
    assert "teacher's search: turn 0/9, epoch 0/5" in lines[0] and "turn 9/9" in lines[-1]
    assert any("epoch 2/5, best " in line and " left" in line for line in lines)
    assert len(lines) <= 9


def test_a_search_of_an_older_version_goes_on() -> None:
    """Keys that are newer than a run and keep their default do not count as a change of its search."""
    changes = {"teacher.agent.policy": "search", "student.agent.policy": "search", "data.val_fraction": 0.25}
    config = tiny_config(Path("/nowhere/set.npz"), changes)
    assert config_mark(config, "teacher") == "e34d33c0fee79acb2751e78682c8ad0e3ff1c9e11d2a8a79571fb6173cfe86d3"
    assert config_mark(config, "student") == "afe039ecbd4d4a8997a4498466f8ca9fcdb101842aa52ad3b00961b8d6142c7e"


def test_imagenet_weights_are_part_of_a_search_by_their_content(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.pth"
    monkeypatch.setattr("qkd.nets.imagenet.imagenet_file", lambda _: file)
    net = {"net": "torchvision/resnet18", "weights": "imagenet", "head": "new"}
    config = config_of(data, {"teacher": {**net, "train": {"epochs": 2}, "agent": SEARCHED}, "student": {
        **net, "quant": {"weight_bits": 4, "act_bits": 4}, "train": {"epochs": 2}, "agent": SEARCHED,
    }})  # fmt: skip
    marks = []
    for content in (b"a", b"b", b"a"):
        file.write_bytes(content)
        marks.append([config_mark(config, "teacher"), config_mark(config, "student")])
    assert marks[0] == marks[2] and not set(marks[0]) & set(marks[1])


def test_a_search_continues_where_its_run_folder_has_moved(data: Path) -> None:
    """Its own nets are copies in the run folder, whose place is not part of what is searched."""
    marks = [
        config_mark(config_of(data, {"teacher.net": net}), "teacher")
        for net in (f"{place}/nets/mine-0123456789ab/mine.py:build" for place in ("/a/run", "/b/moved"))
    ]
    assert marks[0] == marks[1]
