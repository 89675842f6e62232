"""The comparison of augmentation agents: arms, paired tests, the table, and what is computed only once."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from qkd.agents import Op, Policy, Schedule, Segment, save_schedule
from qkd.cli import main as qkd
from qkd.config.binding import config_text, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "fashion-mnist" / "role_agents.yaml")
STORED = ROOT / "benchmarks" / "results" / "role_agents.json"
MODULES = ("stage_runs", "role_agents_table", "role_agents_reasons", "role_agents")


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    """Return the program's modules by name; it is a script beside them, so its folder is on the path while it loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            patch.delitem(sys.modules, name)


def row(arm: str, seed: int, student: float, **more: Any) -> dict[str, Any]:
    return {
        "arm": arm, "seed": seed, "teacher_accuracy": 0.9, "teacher_val_accuracy": 0.9, "student_accuracy": student,
        "student_val_accuracy": student, "teacher_seconds": 1.0, "student_seconds": 2.0, "search_seconds": 0.0,
        "search_trained_images": 0, "search_validated_images": 0, **more,
    }  # fmt: skip


def test_every_arm_binds_and_differs_in_its_agents_alone(program: Any, tmp_path: Path) -> None:
    runs = program.role_agents.Runs(CONFIG, tmp_path, ())
    arms = program.role_agents.ARMS
    assert len(arms) == 12
    plain = load_config(CONFIG, runs.arm_words(arms["crop_flip"], 1)).model_dump()
    for name, arm in arms.items():
        config = load_config(CONFIG, runs.arm_words(arm, 1))
        assert config.teacher.train is None and config.seed == 1
        assert (
            config.student.view == arm.view == (name.rpartition("_")[2] if name.endswith(("own", "clean")) else "same")
        )
        policy = {"found": "file"}.get(arm.student, arm.student)
        assert config.student.agent.policy == policy
        assert config.teacher.agent.policy == {"search": "file"}.get(arm.teacher, arm.teacher)
        same = config.model_dump()
        for role in ("teacher", "student"):
            for values in (same, plain):
                values[role] = {
                    key: value for key, value in values[role].items() if key not in ("agent", "view", "weights")
                }
        assert same == plain, name
    agents = load_config(CONFIG, runs.arm_words(arms["shared_own"], 1))
    assert agents.teacher.agent.schedule == tmp_path / "teacher-search-seed1" / "search" / "teacher.schedule.yaml"
    agents = load_config(CONFIG, runs.arm_words(arms["role_wise_clean"], 1))
    assert agents.student.agent.schedule == tmp_path / "role_wise-seed1" / "search" / "student.schedule.yaml"
    assert agents.teacher.weights == tmp_path / "teacher-search-seed1" / "teacher" / "weights.safetensors"


def test_the_shipped_config_is_the_role_wise_arm() -> None:
    config = load_config(CONFIG)
    assert config.searched_roles == ("teacher", "student") and config.student.view == "same"
    assert config.student.quant.weight_bits == config.student.quant.act_bits == 2
    head = Path(CONFIG).read_text().split("\nname:")[0]
    assert [
        arm for arm in ("crop_flip", "trivial", "randaugment", "cutmix", "shared", "role_wise") if arm not in head
    ] == []


def test_tasks_come_after_what_they_need(program: Any) -> None:
    waves, arms = program.role_agents.waves, program.role_agents.ARMS
    teachers, first, second = waves(list(arms), [4, 7])
    assert {name for _, name, _ in teachers} == {arm.teacher for arm in arms.values()} and len(teachers) == 10
    assert teachers[0] == ("teacher", "search", 4), "the longest come first"
    assert {name for _, name, _ in second} == {"role_wise_own", "role_wise_clean"} and len(first) == 20
    assert first[0] == ("arm", "role_wise", 4)
    teachers, first, second = waves(["role_wise_own"], [0])
    assert (teachers, first, second) == (
        [("teacher", "search", 0)], [("arm", "role_wise", 0)], [("arm", "role_wise_own", 0)]
    )  # fmt: skip
    assert waves(["trivial_own"], [0])[1:] == [[("arm", "trivial_own", 0)], []]


def test_a_paired_test_is_what_the_formula_says(program: Any) -> None:
    test = program.role_agents_table.paired({0: 0.51, 1: 0.62, 2: 0.73, 9: 1.0}, {0: 0.5, 1: 0.6, 2: 0.7})
    # differences 1, 2, 3 points: mean 2, deviation 1, t = 2 sqrt(3); two degrees of freedom: p = 1 - t / sqrt(2 + t^2)
    assert test["n"] == 3 and test["difference"] == pytest.approx(0.02) and test["stdev"] == pytest.approx(0.01)
    assert test["p"] == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-5)
    assert test["half_width"] == pytest.approx(4.302653 * 0.01 / math.sqrt(3), abs=1e-6)
    swapped = program.role_agents_table.paired({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.51, 1: 0.62, 2: 0.73})
    assert swapped["difference"] == -test["difference"] and swapped["p"] == test["p"]


def test_a_paired_test_of_too_little_has_no_p(program: Any) -> None:
    paired = program.role_agents_table.paired
    assert paired({}, {1: 0.5}) == {"n": 0, "difference": None, "stdev": None, "half_width": None, "p": None}
    assert paired({1: 0.75}, {1: 0.5}) == {"n": 1, "difference": 0.25, "stdev": None, "half_width": None, "p": None}
    same = paired({1: 0.7, 2: 0.8}, {1: 0.5, 2: 0.6})
    assert same["n"] == 2 and same["difference"] == pytest.approx(0.2) and same["p"] is None


def record_of(program: Any, rows: list[dict[str, Any]], arms: list[str]) -> dict[str, Any]:
    table = program.role_agents_table.summarize(rows, arms, plain="crop_flip", fixed=("trivial", "cutmix"))
    search = {"members": 8, "epochs": 4, "interval_epochs": 2, "train_images": 9, "val_images": 5}
    settings = {"teacher_net": "resnet8", "student_net": "resnet8", "weight_bits": 2, "act_bits": 2, "batch_size": 64,
                "train_images": 2000, "teacher_epochs": 3, "student_epochs": 2, "search": search}  # fmt: skip
    return {
        "config": "c.yaml", "overrides": [], "seeds": [0, 1], "jobs": 2, "wall_seconds": 60, "task_seconds": 100.0,
        "settings": settings, "environment": {"cpu": "a processor", "torch": "2", "brevitas": "1", "date": "today"},
        "arms": {name: vars(program.role_agents.ARMS[name]) for name in arms}, **table, "searches": [], "rows": rows,
        "reasons": program.role_agents_reasons.reasons(rows, []),
    }  # fmt: skip


def test_failed_rows_stay_in_the_table(program: Any) -> None:
    rows = [row("crop_flip", 0, 0.80), row("crop_flip", 1, 0.82), row("trivial", 0, 0.70), row("trivial", 1, 0.74),
            row("cutmix", 0, 0.75), {"arm": "cutmix", "seed": 1, "failed": "distill: loss is nan"},
            {"arm": "shared", "seed": 0, "failed": "teacher: gone"}]  # fmt: skip
    record = record_of(program, rows, ["crop_flip", "trivial", "cutmix", "shared"])
    summary = record["summary"]
    assert record["best_fixed"] == "cutmix", "0.75 of one seed is more than 0.72"
    assert (summary["cutmix"]["seeds"], summary["cutmix"]["failed"]) == (1, 1)
    assert (summary["shared"]["seeds"], summary["shared"]["failed"]) == (0, 1)
    assert summary["trivial"]["mean"] == pytest.approx(0.72) and summary["trivial"]["against"]["crop_flip"]["n"] == 2
    assert summary["trivial"]["against"]["cutmix"]["n"] == 1
    assert list(summary["crop_flip"]["against"]) == ["cutmix"], "nothing is compared with itself"
    text = program.role_agents_table.render(record)
    assert "distill: loss is nan" in text and "| cutmix | same | 1 (1 failed) | 75.00 %" in text
    assert "| shared | same | 0 (1 failed) | - | - | - | - | - | - | - |" in text
    assert "-9.00 +- 12.71 (p 0.070)" in text, "t = 9 with one degree of freedom: p = 2/pi atan(1/9)"
    assert (
        json.loads(json.dumps(record)) == record
        and program.role_agents_table.render(json.loads(json.dumps(record))) == text
    )
    picture = ElementTree.fromstring(program.role_agents_table.draw(record))
    notes = [element.text or "" for element in picture.iter() if element.tag.endswith("title")]
    means = [text for text in notes if ", mean: " in text]
    assert len(means) == 3 and len(notes) == 5 + 3 and "cutmix, mean: 75.00 %" in means


def test_a_table_without_any_result_can_be_drawn(program: Any) -> None:
    record = record_of(program, [{"arm": "trivial", "seed": 0, "failed": "x"}], ["trivial"])
    assert record["best_fixed"] is None and "x" in program.role_agents_table.render(record)
    ElementTree.fromstring(program.role_agents_table.draw(record))


def test_strength_of_a_schedule(program: Any) -> None:
    why = program.role_agents_reasons
    policy = Policy((Op("Rotate", 0.5, 9), Op("Invert", 1.0, 0), Op("Color", 1.0, 3)))
    assert why.strength(policy) == pytest.approx((0.5 + 0 + 1 / 3) / 3) and why.strength(Policy()) == 0
    found = why.epoch_strengths(Schedule((Segment(2, Policy()), Segment(1, policy))))
    assert found == [0, 0, why.strength(policy)]
    assert why.thirds(found) == pytest.approx(found)
    assert why.thirds([0, 1, 2, 3]) == pytest.approx([0.25, 1.5, 2.75]), "4/3 epochs each: 1 + 1/3, 2/3 + 2/3, 1/3 + 1"
    assert why.thirds([2.0]) == pytest.approx([2.0] * 3)


def turn(number: int, member: int, accuracy: float | None, *, copied: bool = False) -> dict[str, Any]:
    return {"round": number, "member": member, "val_accuracy": accuracy, "copied": copied, "diverged": accuracy is None}


def test_search_noise_is_that_of_the_last_full_round(program: Any) -> None:
    first = [turn(0, index, value) for index, value in enumerate((0.1, 0.2, 0.3, 0.4, 0.5))]
    second = [turn(1, index, value) for index, value in enumerate((0.4, 0.5, 0.6, 0.5, 0.5))]
    second[4] = turn(1, 4, 0.1, copied=True)
    second[3] = turn(1, 3, 0.3)
    found = program.role_agents_reasons.search_noise([*first, *second, turn(2, 1, 0.9)], val_images=100)
    assert found["last_scores"] == [0.4, 0.5, 0.6, 0.3, 0.1], "the last round had one member only"
    assert found["spread"] == pytest.approx(0.19235, abs=1e-5)
    assert found["chance"] == pytest.approx(math.sqrt(0.38 * 0.62 / 100), abs=1e-5)
    # members 0 to 3 continued: ranks 1 2 3 4 and 2 3 4 1: 1 - 6 * 12 / (4 * 15)
    assert found["kept_rank"] == pytest.approx(-0.2)
    lost = program.role_agents_reasons.search_noise([turn(0, 0, None), turn(0, 1, 0.5)], val_images=4)
    assert lost["last_scores"] == [0.5] and lost["spread"] is None and lost["chance"] == 0.25


def test_what_validation_is_worth(program: Any) -> None:
    arms = ("crop_flip", "trivial", "role_wise")
    rows = [row(arm, seed, 0.5 + 0.1 * index + seed, student_val_accuracy=0.5 - 0.1 * index)
            for index, arm in enumerate(arms) for seed in (0, 1, 2)]  # fmt: skip
    searches = [{"role": "student", "seed": seed, "val_accuracy": 0.1 * seed} for seed in (0, 1, 2)]
    found = program.role_agents_reasons.reasons(rows, searches)
    assert found["student_search"] == {"rank_correlation": 1.0, "n": 3}
    assert found["teacher_search"] == {"rank_correlation": None, "n": 0}
    assert found["validation"] == {"rank_correlation": -1.0, "n": 9}


class FakeRuns:
    """Stands for `run_stages`: leaves the files that the stages leave, and counts."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[str, str]] = []
        self.words: dict[str, list[str]] = {}
        self.failing = failing

    def __call__(self, config: str, name: str, words: list[str], folder: Path, *, until: str) -> str:
        self.calls.append((name, until))
        self.words[name] = words
        if self.failing and name.startswith(self.failing):
            return "teacher: no luck"
        role = "teacher" if until == "teacher" else "student"
        (folder / name / role).mkdir(parents=True)
        seed, letters = int(name[-1]), sum(map(ord, name)) / 1e6
        result = {
            "test_accuracy": 0.5 + letters + 0.001 * seed * letters,
            "val_accuracy": 0.5 + letters,
            "seconds": 3.0,
        }
        own = load_config(config, [f"name={name}", *words])
        (folder / name / "config.yaml").write_text(config_text(own))
        (folder / name / "environment.json").write_text(json.dumps({"commit": "abc"}))
        (folder / name / role / "result.json").write_text(json.dumps(result))
        if name.startswith(("teacher-search", "role_wise-")):
            self.leave_search(folder / name / "search", role)
        return ""

    def leave_search(self, folder: Path, role: str) -> None:
        folder.mkdir()
        lines = [turn(0, index, 0.5 + 0.1 * index) for index in range(3)]
        (folder / f"{role}.population.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        cost = {"seconds": 7.0, "run": {"trained_images": 1000, "validated_images": 500}}
        (folder / f"{role}.cost.json").write_text(json.dumps(cost))
        schedule = Schedule((Segment(2, Policy((Op("Rotate", 0.5, 9),))),))
        provenance = {"val_accuracy": 0.7, "settings": {"val_images": 100}}
        save_schedule(schedule, folder / f"{role}.schedule.yaml", role=role, provenance=provenance)


def compare(program: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, fake: FakeRuns, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(program.role_agents, "run_stages", fake)
    where = ["--runs-dir", str(folder / "runs"), "--out", str(folder / "out")]
    monkeypatch.setattr(sys, "argv", ["role_agents.py", CONFIG, *where, *words])
    program.role_agents.main()
    record: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert (folder / "out.md").read_text() == program.role_agents_table.render(record)
    return record


def test_nothing_is_computed_twice(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeRuns()
    record = compare(program, monkeypatch, tmp_path, fake, "--jobs", "2", "data.name=npz", "data.path=/x", "threads=2")
    assert len(fake.calls) == len(set(fake.calls)) == 3 * (5 + 12)
    assert sum(name.startswith("teacher-") for name, _ in fake.calls) == 15
    assert len(record["rows"]) == 36 and not [one for one in record["rows"] if "failed" in one]
    assert record["overrides"] == ["threads=2"], "this machine's folders stay out"
    assert [(one["role"], one["seed"]) for one in record["searches"]] == [
        (role, seed) for role in ("teacher", "student") for seed in (0, 1, 2)
    ]
    cost = {name: one["search_seconds"] for name, one in record["summary"].items()}
    assert cost["trivial_own"] == 0 and cost["shared"] == cost["shared_clean"] == 7
    assert cost["role_wise"] == cost["role_wise_own"] == 14
    assert record["summary"]["role_wise"]["search_trained_images"] == 2000
    again = compare(
        program, monkeypatch, tmp_path, FakeRuns(), "--collect", "data.name=npz", "data.path=/x", "threads=2"
    )
    assert again["summary"] == record["summary"] and again["searches"] == record["searches"]


def test_collected_runs_are_those_of_the_settings(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The table would otherwise say that they had the settings of today's words."""
    fake = FakeRuns(failing="teacher-search-seed1")
    compare(program, monkeypatch, tmp_path, fake, "student.train.epochs=4", "--seeds", "0", "1")
    kept = compare(program, monkeypatch, tmp_path, fake, "student.train.epochs=4", "--collect", "--seeds", "0", "1")
    failed = [one["failed"] for one in kept["rows"] if "failed" in one]
    assert failed and set(failed) == {"teacher: no luck"}, "messages of failed runs are kept"
    other = compare(program, monkeypatch, tmp_path, fake, "--collect", "--seeds", "0")
    assert all("student.train.epochs was 4, now" in one["failed"] for one in other["rows"])


def test_no_override_trains_a_teacher_again(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeRuns()
    words = ("teacher.train.epochs=3", "teacher.agent.policy=pba", "student.train.epochs=4")
    compare(program, monkeypatch, tmp_path, fake, *words, "--seeds", "0")
    for name, own in fake.words.items():
        config = load_config(CONFIG, own)
        assert config.student.train.epochs == 4 and config.teacher.agent.policy != "pba"
        assert (config.teacher.train is not None) == name.startswith("teacher-")


def test_a_failed_teacher_fails_its_arms_alone(program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeRuns(failing="teacher-search-seed1")
    record = compare(program, monkeypatch, tmp_path, fake, "--seeds", "0", "1")
    failed = [(one["arm"], one["failed"]) for one in record["rows"] if "failed" in one]
    searched = [name for name, arm in program.role_agents.ARMS.items() if arm.teacher == "search"]
    assert failed == [(name, "teacher: no luck") for name in searched]
    assert record["summary"]["role_wise"]["seeds"] == 1 and record["summary"]["trivial"]["seeds"] == 2
    assert "teacher: no luck" in (tmp_path / "out.md").read_text()


def test_a_config_that_cannot_be_used_fails_with_its_fault(program: Any, tmp_path: Path) -> None:
    why = program.stage_runs.run_stages(CONFIG, "x", ["teacher.net=resnet9"], tmp_path, until="teacher")
    assert why.startswith("config: ") and "resnet9" in why
    assert "resnet9" in (tmp_path / "x.log").read_text()
    assert program.stage_runs.public(["data.path=/home", "data.root=x", "data.name=npz", "threads=1"]) == ["threads=1"]


def test_the_stored_table_is_what_the_stored_figures_say(program: Any) -> None:
    if not STORED.is_file():
        pytest.skip(f"no {STORED.relative_to(ROOT)} yet")
    record = json.loads(STORED.read_text())
    assert STORED.with_suffix(".md").read_text() == program.role_agents_table.render(record)
    assert STORED.with_suffix(".svg").read_text() == program.role_agents_table.draw(record)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_arm_of_shared_parts_is_the_arm_that_runs_alone(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = ["data.name=digits", "data.train_limit=256", "data.val_fraction=0.05", "teacher.train.epochs=2",
             "student.train.epochs=2", "search.members=4", "search.epochs=3", "search.interval_epochs=1",
             "search.train_images=128", "search.val_images=128", "student.calibration_batches=2"]  # fmt: skip
    where = ["--runs-dir", str(tmp_path / "shared"), "--out", str(tmp_path / "out"), "--seeds", "3"]
    arms = ["--arms", "crop_flip", "role_wise", "role_wise_own"]
    monkeypatch.setattr(sys, "argv", ["role_agents.py", CONFIG, *small, *where, *arms])
    program.role_agents.main()
    record = json.loads((tmp_path / "out.json").read_text())
    assert [one.get("failed") for one in record["rows"]] == [None] * 3 and len(record["searches"]) == 2
    assert qkd(["run", CONFIG, *small, "seed=3", "name=alone", "--runs-dir", str(tmp_path), "--until", "distill"]) == 0
    shared, alone = tmp_path / "shared" / "role_wise-seed3", tmp_path / "alone"
    for name in ("search/student.population.jsonl", "student/weights.safetensors"):
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
