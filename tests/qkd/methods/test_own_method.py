"""A method that is not of this package: named in a config, trained, resumed and reported, no file of ours touched."""

from __future__ import annotations

import json
import re
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from qkd.checking.config_names import name_faults
from qkd.config import RunConfig
from qkd.files import sha256_of
from qkd.methods import table
from qkd.methods.method import Method
from qkd.methods.table import METHODS, methods_of, own_method
from qkd.pipeline.dryrun import check_distillation
from qkd.progress import Silent
from qkd.roles.stored import changed_sources
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import run_tiny, tiny_config, write_npz_set
from qkd.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("unfused")

TOY = '''
"""Mean squared error between logits, and a head that learns along."""

from contextlib import nullcontext

import torch
from torch import nn

from qkd.methods.method import Method
from qkd.training import Partner, StepResult


class Step:
    def __init__(self, lesson, head, weight):
        self.lesson, self.head, self.weight = lesson, head, weight

    def tapped(self):
        return nullcontext()

    def __call__(self, batch):
        logits = self.lesson.student(batch.images)
        with torch.no_grad():
            goal = self.lesson.teacher(batch.images)
        apart = nn.functional.mse_loss(self.head(logits), goal)
        return StepResult(self.weight * apart, {"apart": apart}, logits)


class Toy(Method):
    option_names = ("weight",)

    def faults(self):
        if self.config.student.method_options.get("weight", 1.0) <= 0:
            yield "student.method_options.weight: must be positive"

    def takes(self, phase):
        return True

    def prepare(self, lesson):
        torch.manual_seed(0)
        self.head = nn.Linear(len(lesson.splits.classes), len(lesson.splits.classes))
        self.partners = (Partner("toy_head", self.head),)

    def step(self, lesson, phase, terms, first_epoch):
        return Step(lesson, self.head, self.config.student.method_options.get("weight", 1.0))

    def results(self, context, role, model):
        if role != "student":
            return {}
        row = {"role": "toy head", "net": "linear", "test_accuracy": 0.5, "teaches": True}
        return {"toy": float(self.head.weight.detach().norm()), "rows": [row]}


NOTHING = 3
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz_set(tmp_path_factory.mktemp("own_method"))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return path


def config(data: Path, toy: Path, name: str = "own", *, keeps: bool = False, **options: Any) -> RunConfig:
    changes: dict[str, Any] = {"name": name, "student.method": f"{toy}:Toy", "student.method_options": options}
    changes["student.train.keep_checkpoint"] = keeps
    return tiny_config(data, {**changes, "student.train.epochs": 2, "teacher.train.epochs": 1})


def test_it_trains_and_resumes_and_is_reported_with_its_own_rows(
    data: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = ("teacher", "search", "distill")
    whole = run_tiny(config(data, toy, weight=0.5), tmp_path, *stages)
    rows = [json.loads(line) for line in (whole.path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [(set(row["terms"]), row["train_loss"] / row["terms"]["apart"]) for row in rows] == [
        ({"apart"}, pytest.approx(0.5))
    ] * 2
    result = json.loads((whole.path / "student" / "result.json").read_text())
    assert result["toy"] > 0 and 0 < result["test_accuracy"] <= 1

    killed = config(data, toy, "killed", weight=0.5)
    run_tiny(killed, tmp_path, *stages[:2])
    steps, take = [0], Trainer._step

    def stop(trainer: Trainer, *given: Any) -> Any:
        steps[0] += 1
        if steps[0] == 2 + trainer.steps:  # in the second epoch
            raise KeyboardInterrupt
        return take(trainer, *given)

    monkeypatch.setattr(Trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(killed, tmp_path, "distill")
    monkeypatch.undo()
    resumed = run_tiny(killed, tmp_path, "distill")
    assert sha256_of(resumed.path / "student/weights.safetensors") == sha256_of(
        whole.path / "student/weights.safetensors"
    )
    STAGES["report"](resumed, Silent())
    text = (resumed.path / "report.md").read_text()
    assert "student w" in text and re.search(r"toy head *\| linear *\| 50", text)


def test_it_is_tried_before_the_first_stage(data: Path, toy: Path) -> None:
    check_distillation(config(data, toy), Silent())
    toy.write_text(TOY.replace("self.head(logits)", "self.head(batch.images)"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        check_distillation(config(data, toy), Silent())
    toy.write_text(TOY.replace("return StepResult(", "return (")[: -len("\n")] + "\n")
    with pytest.raises(TypeError, match=r"a step must return a qkd\.training\.StepResult, got tuple"):
        check_distillation(config(data, toy), Silent())
    toy.write_text(TOY.replace("self.weight * apart,", "self.weight * apart.detach(),"))
    with pytest.raises(RuntimeError, match=r"the loss has no gradient.*detached"):
        check_distillation(config(data, toy), Silent())


def test_validate_asks_it_for_faults(data: Path, toy: Path) -> None:
    """Only a config that can be bound is shown to the method; a fault is at its key."""
    raw = config(data, toy, weight=-1).model_dump(mode="json")
    assert list(name_faults(raw)) == [(("student", "method_options", "weight"), "must be positive")]
    raw["student"]["method_options"] = {"wieght": 1}
    assert list(name_faults(raw)) == [
        (("student", "method_options", "wieght"), "Toy has no such option; did you mean `weight`?")
    ]
    plain = toy.with_name("plain.py")
    plain.write_text(TOY.replace('yield "student', 'return "student').replace("weight: must be", "weight: it must be"))
    one = config(data, plain, weight=-1).model_dump(mode="json")
    assert list(name_faults(one)) == [(("student", "method_options", "weight"), "it must be positive")], "one text"
    raw["student"]["method_options"] = {"weight": "heavy"}
    ((where, what),) = name_faults(raw)
    assert where == ("student", "method") and "fails to look at the config: TypeError" in what
    other = toy.with_name("other.py")
    other.write_text(
        TOY.replace('yield "student.method_options.weight: must be', "raise ValueError('must be").replace(
            'must be positive"', "must be positive')"
        )
    )
    raw["student"] |= {"method": f"{other}:Toy", "method_options": {"weight": -1}}
    assert list(name_faults(raw)) == [(("student", "method_options"), "must be positive")]
    raw["seed"] = -1
    assert list(name_faults(raw)) == [], "the schema comes first"


def test_one_without_images_and_a_baseline_that_needs_them(data: Path, toy: Path) -> None:
    """The bench stage would find out, after all trainings."""
    blind = toy.with_name("blind.py")
    blind.write_text(TOY.replace("class Toy(Method):", "class Toy(Method):\n    reads_images = False\n"))
    raw = config(data, blind).model_dump(mode="json")
    assert list(name_faults(raw)) == []
    raw["bench"]["int8_baseline"] = True
    ((where, what),) = name_faults(raw)
    assert where == ("bench", "int8_baseline") and "does not read (reads_images)" in what


def test_one_that_leaves_no_phase_to_another_is_refused(data: Path, toy: Path) -> None:
    """It would be reported as taught without a single step."""
    taught = {"student.phases": [{"epochs": 2, "teacher_terms": [{"loss": "cross_entropy"}]}]}
    changes = {"student.method": f"{toy}:Toy", "student.train.epochs": 2, **taught}
    with pytest.raises(ValueError, match="Toy takes every phase that CoStudy would train, which then does nothing"):
        check_distillation(tiny_config(data, changes), Silent())


def test_a_changed_method_is_another_training(data: Path, toy: Path, tmp_path: Path) -> None:
    run = run_tiny(config(data, toy, keeps=True), tmp_path, "teacher", "search", "distill")
    (run.path / "student" / "weights.safetensors").unlink()
    toy.write_text(TOY.replace("mse_loss", "l1_loss"))
    with pytest.raises(ValueError, match=r"made from other inputs \(method changed since\)"):
        STAGES["distill"](RunFolder(run.config, run.path), Silent())


def test_a_complete_run_keeps_what_a_changed_method_made_and_says_so(data: Path, toy: Path, tmp_path: Path) -> None:
    run = run_tiny(config(data, toy), tmp_path, "teacher", "search", "distill")
    assert changed_sources(run.path, run.config) == ""
    toy.write_text(TOY.replace("mse_loss", "l1_loss"))
    assert f"student.method: {toy}:Toy has changed since this run trained by it" in changed_sources(
        run.path, run.config
    )
    toy.unlink()  # nothing needs it any more
    assert changed_sources(run.path, run.config) == ""


def test_a_method_that_changes_after_the_search_is_refused(data: Path, toy: Path, tmp_path: Path) -> None:
    search = {"members": 2, "epochs": 2, "interval_epochs": 1, "train_images": 32, "val_images": 24}
    searched = config(data, toy).model_dump(mode="json")
    searched["student"]["agent"] = {"policy": "search"}
    searched["search"] = search
    run = run_tiny(RunConfig.model_validate(searched), tmp_path, "teacher", "search")
    toy.write_text(TOY.replace("mse_loss", "l1_loss"))
    with pytest.raises(ValueError, match=r"student\.method: .* has changed since the search for this run's student"):
        STAGES["distill"](run, Silent())
    toy.write_text(TOY)
    STAGES["distill"](run, Silent())


def test_what_is_no_method_is_refused(data: Path, toy: Path, tmp_path: Path) -> None:
    refused = {
        f"{toy}:NOTHING": "is not a class derived from qkd.methods.method.Method",
        f"{toy}:Missing": "cannot be loaded: module .* has no attribute 'Missing'",
        f"{tmp_path}/none.py:Toy": "cannot be loaded: .*none.py",
        "no_such_package.methods:Toy": "cannot be loaded: No module named 'no_such_package'",
        f"{tmp_path}/broken.py:Toy": "cannot be loaded: name 'nobody' is not defined",
        "unheard_of": "no installed package has an entry point 'unheard_of' in group qkd.methods",
        "qkd.config:RunConfig": "is not a class derived from",
    }
    (tmp_path / "broken.py").write_text("nobody")
    for name, message in refused.items():
        assert [where for where, _ in name_faults({"student": {"method": name}})] == [("student", "method")]
        with pytest.raises(ValueError, match=f"student.method: .*{message}"):
            own_method(name)
    with pytest.raises(ValueError, match="student.method_options.weight: must be positive"):
        methods_of(config(data, toy, weight=-1))
    with pytest.raises(ValueError, match="student.method_options.wieght: Toy has no such option"):
        methods_of(config(data, toy, wieght=1))
    with pytest.raises(ValueError, match="`method_options` are for `method`, which is missing"):
        tiny_config(data, {"student.method_options": {"weight": 1}})


def test_a_package_brings_one_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("mine", "qkd.methods.plain.method:Plain", table.GROUP)
    monkeypatch.setattr(
        table, "metadata", types.SimpleNamespace(entry_points=lambda group: {table.GROUP: [entry]}[group])
    )
    assert issubclass(own_method("mine"), Method)
    with pytest.raises(ValueError, match="there are mine"):
        own_method("yours")


def test_every_row_of_the_table_is_a_method_and_is_asked_for_by_its_key_alone(data: Path) -> None:
    assert list(METHODS)[-1] == "plain"
    assert all(issubclass(own_method(entry.place), Method) for entry in METHODS.values())
    assert [type(method).__name__ for method in methods_of(tiny_config(data))] == ["Plain"]
    average = methods_of(tiny_config(data, {"teacher.members": 2}))
    assert [type(method).__name__ for method in average] == ["Ensemble", "Plain"]
    quiz = tiny_config(
        data, {"student.train.epochs": 2, "student.phases": [{"epochs": 2, "meta": {"quiz_images": 12}}]}
    )
    assert [type(method).__name__ for method in methods_of(quiz)] == ["MetaDistil", "Plain"]
    assert all(callable(rows) for rows in table.report_rows())


def test_a_run_without_one_says_nothing_of_it(data: Path, toy: Path) -> None:
    """Hashes of configs of older versions do not change."""
    assert "method" not in tiny_config(data).model_dump(mode="json")["student"]
    assert config(data, toy).model_dump(mode="json")["student"]["method"] == f"{toy}:Toy"
