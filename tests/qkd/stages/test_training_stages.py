"""Teacher, search and distill stages on a tiny set: files, results, starts, views, and what they refuse."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qkd.files import read_metadata, read_safetensors, sha256_of
from qkd.nets import build_net, save_weights
from qkd.pipeline.running import run_stages
from qkd.progress import Silent
from qkd.roles.learner import phases_of
from qkd.roles.nets import load_float_twin, load_student, load_teacher
from qkd.roles.stored import changed_sources
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import run_tiny, tiny_config
from qkd.training import TrainingError
from quantizers import integer_view

pytestmark = pytest.mark.usefixtures("unfused")


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return a run after its three training stages."""
    changes = {"student.train.epochs": 3, "student.quant.weight_bits": 2, "student.quant.act_bits": 2}
    config = tiny_config(data, {**changes, "student.train.keep_checkpoint": True})
    return run_tiny(config, tmp_path_factory.mktemp("runs"), "teacher", "search", "distill")


def result(run: RunFolder, name: str) -> dict[str, Any]:
    return json.loads((run.path / name / "result.json").read_text())


def rows(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / name / "metrics.jsonl").read_text().splitlines()]


def test_stages_are_in_order() -> None:
    assert list(STAGES) == ["teacher", "search", "distill", "export", "bench", "report"]


def test_results_and_metrics(done: RunFolder) -> None:
    teacher, student = result(done, "teacher"), result(done, "student")
    common = {
        "role", "net", "test_accuracy", "val_accuracy", "epochs", "seconds", "images_per_second", "parameters"
    }  # fmt: skip
    assert common <= set(teacher) and common | {"weight_bits", "act_bits"} <= set(student)
    assert (teacher["role"], student["role"]) == ("teacher", "student")
    assert (student["weight_bits"], student["act_bits"]) == (2, 2)
    assert teacher["parameters"] == student["parameters"] == sum(p.numel() for p in load_teacher(done).parameters())
    assert student["start"] == "teacher"
    assert all(0 <= role[key] <= 1 for role in (teacher, student) for key in ("test_accuracy", "val_accuracy"))
    assert len(rows(done, "teacher")) == 2
    assert [row["phase"] for row in rows(done, "student")] == ["tutoring", "tutoring", "settling"]
    assert set(rows(done, "student")[0]["terms"]) == {"cross_entropy", "soft_target"}
    assert not (done.path / "student" / "float").exists()


def test_search_says_that_it_did_not_search(done: RunFolder) -> None:
    found = result(done, "search")
    assert found["searched"] is False and "no search was run" in found["note"]
    assert found["student"]["epochs"] == 3 and found["student"]["schedule"] == "student.schedule.yaml"
    assert (done.path / "search" / "teacher.schedule.yaml").exists()


def test_the_written_student_is_the_scored_one(done: RunFolder, data: Path) -> None:
    from qkd.data import load_splits
    from qkd.training import accuracy

    splits = load_splits(done.config.data, seed=0)
    cpu = torch.device("cpu")
    for name, model in (("teacher", load_teacher(done)), ("student", load_student(done))):
        assert not model.training
        assert accuracy(model, splits.test, splits, done.config.data, cpu) == result(done, name)["test_accuracy"]
        assert accuracy(model, splits.val, splits, done.config.data, cpu) == result(done, name)["val_accuracy"]
    assert integer_view(load_student(done)).nodes
    assert read_metadata(done.path / "student" / "weights.safetensors")["net"] == "resnet8"


def test_the_float_twin_of_one_net_is_the_teacher(done: RunFolder) -> None:
    twin, teacher = load_float_twin(done), load_teacher(done)
    assert twin is not None
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), teacher.parameters(), strict=True))


def test_the_teacher_is_untouched_by_the_distillation(done: RunFolder, data: Path, monkeypatch) -> None:
    import qkd.roles.learner as stage

    seen: dict[str, torch.nn.Module] = {}
    load = stage.load_guide
    monkeypatch.setattr(stage, "load_guide", lambda run: seen.setdefault("teacher", load(run)))
    before = read_safetensors(done.path / "teacher" / "weights.safetensors")
    for path in (done.path / "student" / "checkpoint").iterdir():
        path.unlink()
    STAGES["distill"](done, Silent())
    after = seen["teacher"].state_dict()  # parameters and batch-norm buffers
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not seen["teacher"].training and all(p.grad is None for p in seen["teacher"].parameters())
    assert not any(module._forward_hooks for module in seen["teacher"].modules())


def test_checkpoints_are_dropped_when_a_training_is_done_unless_they_are_to_stay(done: RunFolder) -> None:
    assert not (done.path / "teacher" / "checkpoint").exists()
    kept = sorted(path.suffix for path in (done.path / "student" / "checkpoint").iterdir())
    assert kept == [".json", ".safetensors"]


def test_altered_weights_are_brought_back_from_the_checkpoint(done: RunFolder) -> None:
    path = done.path / "student" / "weights.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    assert done.why_incomplete("distill") == "student/weights.safetensors has changed"
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_student(done)
    STAGES["distill"](done, Silent())
    assert path.read_bytes() == good and done.is_complete("distill")


def test_a_changed_teacher_asks_for_the_student_anew(done: RunFolder, tmp_path: Path) -> None:
    path = done.path / "teacher" / "weights.safetensors"
    good = path.read_bytes()
    other = build_net("resnet8", classes=4, channels=1, image_size=8)
    from qkd.roles.nets import net_facts, save_net

    save_net(path, other, net_facts("resnet8", classes=4, channels=1, image_size=8))
    try:
        assert done.why_incomplete("distill") == "teacher/weights.safetensors has changed"
        with pytest.raises(ValueError, match=r"start, teacher changed since.*delete .*student"):
            STAGES["distill"](done, Silent())
    finally:
        path.write_bytes(good)


def test_weight_zero_equals_plain_training_bit_for_bit(data: Path, tmp_path: Path) -> None:
    hashes = []
    for name, extra in (("plain", []), ("zero", [{"loss": "soft_target", "weight": 0}])):
        terms = [{"loss": "cross_entropy", "weight": 1}, *extra]
        changes = {"name": name, "teacher.train.epochs": 1, "student.terms": terms}
        run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search", "distill")
        hashes.append(sha256_of(run.path / "student" / "weights.safetensors"))
        assert set(rows(run, "student")[0]["terms"]) == {"cross_entropy"}
    assert hashes[0] == hashes[1]


def test_an_own_net_gets_an_own_float_training_and_labels_may_be_absent(data: Path, tmp_path: Path) -> None:
    phases = [
        {"name": "self_study", "epochs": 1, "terms": [{"loss": "cross_entropy"}]},
        {"name": "tutoring", "epochs": 1, "freeze_batch_norm": True},
    ]
    terms = [
        {"loss": "soft_target", "options": {"temperature": 2}},
        {"loss": "similarity_preserving", "weight": 10, "taps": [["layer3", "layer3"]]},
    ]
    changes = {
        "teacher.net": "wrn_16_1",
        "teacher.train.epochs": 1,
        "student.net": "resnet8",
        "student.float_train": {"epochs": 1, "lr": 0.05},
        "student.terms": terms,
        "student.phases": phases,
        "student.view": "own",
    }
    run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search", "distill")
    assert [set(row["terms"]) for row in rows(run, "student")] == [
        {"cross_entropy"}, {"soft_target", "similarity_preserving"}
    ]  # fmt: skip
    assert result(run, "student")["start"] == "float" and result(run, "student/float")["role"] == "student_float"
    twin = load_float_twin(run)
    assert twin is not None and type(twin) is type(build_net("resnet8", classes=4, channels=1, image_size=8))
    stored = read_safetensors(run.path / "student" / "float" / "weights.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in twin.state_dict().items())


@pytest.mark.parametrize("view", ["own", "clean"])
def test_the_view_changes_what_the_teacher_sees_only(data: Path, tmp_path: Path, view: str) -> None:
    from qkd.data import load_splits, normalize
    from qkd.roles.views import teacher_view
    from qkd.training import Batch

    config = tiny_config(data, {"student.view": view})
    splits = load_splits(config.data, seed=0)
    raw, labels = splits.train.batch(torch.arange(8), "cpu")
    give = teacher_view(config, splits)
    assert give is not None
    first = give(Batch(raw.float(), labels, raw, 0, 0))
    clean = normalize(raw, splits.mean, splits.std)
    assert torch.equal(first, give(Batch(raw.float(), labels, raw, 0, 0)))
    assert torch.equal(first, clean) == (view == "clean")
    assert torch.equal(first, give(Batch(raw.float(), labels, raw, 0, 1))) == (view == "clean")
    assert teacher_view(tiny_config(data), splits) is None


def test_weights_from_a_file_are_used_as_they_are(data: Path, tmp_path: Path) -> None:
    net = build_net("resnet8", classes=4, channels=1, image_size=8)
    save_weights(net, tmp_path / "given.safetensors")
    changes = {"teacher.weights": str(tmp_path / "given.safetensors"), "teacher.train": None}
    run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search")
    assert result(run, "teacher")["epochs"] == 0 and rows(run, "teacher") == []
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), load_teacher(run).parameters(), strict=True))
    assert changed_sources(run.path, run.config) == ""
    save_weights(build_net("resnet8", classes=4, channels=1, image_size=8), tmp_path / "given.safetensors")
    told: list[str] = []

    class Told(Silent):
        def _print(self, text: str) -> None:
            told.append(text)

    run_stages(run, ("teacher",), Told())
    (line,) = (one for one in told if "has changed since this run started from it" in one)
    assert "teacher.weights: " in line and "name=... makes others" in line
    (tmp_path / "given.safetensors").unlink()
    assert changed_sources(run.path, run.config) == "", "a file that is gone is no longer needed"


@pytest.mark.parametrize(
    ("net", "classes", "match"),
    [("resnet8", 5, "5 classes, but this net has 4"), ("wrn_16_1", 4, "not for this net")],
)
def test_a_mismatched_teacher_file_is_refused(data: Path, tmp_path: Path, net: str, classes: int, match: str) -> None:
    save_weights(build_net(net, classes=classes, channels=1, image_size=8), tmp_path / "given.safetensors")
    changes = {"teacher.weights": str(tmp_path / "given.safetensors"), "teacher.train": None}
    with pytest.raises(ValueError, match=match):
        run_tiny(tiny_config(data, changes), tmp_path, "teacher")


def test_a_run_without_a_teacher_says_which_stage_is_missing(data: Path, tmp_path: Path) -> None:
    run = RunFolder.open(tiny_config(data), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"teacher.weights\.safetensors is missing: run the stage"):
        load_teacher(run)
    with pytest.raises(FileNotFoundError, match="qkd distill"):
        load_student(run)


def test_an_unknown_tap_is_told_before_training(data: Path, tmp_path: Path) -> None:
    terms = [{"loss": "cross_entropy"}, {"loss": "similarity_preserving", "taps": [["layer3", "layer33"]]}]
    run = run_tiny(tiny_config(data, {"student.terms": terms}), tmp_path, "teacher", "search")
    with pytest.raises(ValueError, match="the teacher has no module 'layer33'; did you mean .*`layer3`"):
        STAGES["distill"](run, Silent())


def test_starts() -> None:
    def start(**student: Any) -> str:
        return tiny_config(Path("data"), {f"student.{key}": value for key, value in student.items()}).student_start

    float_train = {"epochs": 1}
    assert start() == "teacher" and start(net="resnet8") == "teacher" and start(init="random") == "random"
    assert start(net="wrn_16_1", float_train=float_train) == "float" == start(init="float", float_train=float_train)
    with pytest.raises(ValueError, match=r"student\.init `teacher` needs the same net for both roles"):
        start(init="teacher", net="wrn_16_1")
    with pytest.raises(ValueError, match=r"student\.float_train is missing"):
        start(net="wrn_16_1")


def test_phases_by_default_end_with_the_deployed_arithmetic() -> None:
    def phases(epochs: int) -> list[tuple[str, int, bool]]:
        student = tiny_config(Path("data"), {"student.train.epochs": epochs}).student
        return [(phase.name, phase.epochs, phase.freeze_batch_norm) for phase in phases_of(student)]

    assert phases(30) == [("tutoring", 27, False), ("settling", 3, True)]
    assert phases(5) == [("tutoring", 4, False), ("settling", 1, True)]
    assert phases(1) == [("settling", 1, True)]


def test_a_diverging_student_stops_and_names_the_layer(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data)
    train = config.student.train.model_copy(update={"lr": 1e36})  # no config file may ask for so much
    config = config.model_copy(update={"student": config.student.model_copy(update={"train": train})})
    run = run_tiny(config, tmp_path, "teacher", "search")
    with pytest.raises(TrainingError) as caught:
        STAGES["distill"](run, Silent())
    assert "student" in str(caught.value) and caught.value.layer
    assert not run.is_complete("distill")


def test_a_full_disk_loses_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    whole = run_tiny(tiny_config(data, {"name": "whole"}), tmp_path, "teacher")
    run = RunFolder.open(tiny_config(data, {"name": "full", "teacher.train.checkpoint_every_s": 0}), tmp_path)
    write, count = os.write, [0]

    def full(handle: int, content: bytes) -> int:
        count[0] += 1
        if count[0] > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device; free some space"):
        STAGES["teacher"](run, Silent())
    monkeypatch.undo()
    assert list((run.path / "teacher" / "checkpoint").glob("*.json"))
    STAGES["teacher"](run, Silent())
    assert sha256_of(run.path / "teacher" / "weights.safetensors") == sha256_of(
        whole.path / "teacher" / "weights.safetensors"
    )


def test_threads_are_set_for_the_stage_only(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qkd.stages.search as search
    import qkd.stages.teacher as teacher

    seen: list[int] = []
    before = torch.get_num_threads()
    monkeypatch.setattr(teacher, "_run", lambda run, progress: seen.append(torch.get_num_threads()))
    run = RunFolder.open(tiny_config(data, {"threads": 3}), tmp_path)
    teacher.run(run, Silent())
    assert seen == [3] and torch.get_num_threads() == before
    assert search.NOTE


def test_stages_are_quiet(caplog: pytest.LogCaptureFixture, data: Path, tmp_path: Path, capsys) -> None:
    with caplog.at_level(logging.WARNING):
        run_tiny(tiny_config(data, {"teacher.train.epochs": 1}), tmp_path, "teacher", "search")
    assert capsys.readouterr().out == "" and not caplog.records


@pytest.mark.parametrize("net", ["resnet8", "wrn_16_1"])
def test_a_term_that_reads_before_the_grid_trains_and_reads_something_else(
    data: Path, tmp_path: Path, net: str
) -> None:
    found = []
    for tap in ("quantized", "pre_quant"):
        terms = [{"loss": "cross_entropy"}, {"loss": "hint", "taps": [["layer3", "layer3"]], "tap": tap}]
        changes = {"name": tap, "teacher.net": net, "student.net": net, "student.terms": terms}
        with run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search", "distill") as run:
            lines = (run.path / "student" / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["terms"]["hint"] for line in lines])
    assert all(math.isfinite(value) for row in found for value in row) and found[0] != found[1]
