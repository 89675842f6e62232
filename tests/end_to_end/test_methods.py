"""Every method's config: it learns, resumes bit for bit after an interruption, and leaves no trace in the file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from export import export_onnx
from qkd.config import RunConfig
from qkd.config.binding import load_config, read_config, shipped_configs
from qkd.files import read_safetensors
from qkd.pipeline import run_stages
from qkd.pipeline.dryrun import dry_run
from qkd.progress import Silent
from qkd.roles.nets import load_student
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.terms import LOSSES
from qkd.training.loop import Trainer

SHIPPED = shipped_configs()
METHODS = sorted(name for name in SHIPPED if name.startswith(("digits/methods/", "digits/domains/")))
PLAIN = "digits/methods/plain"
HEAVY = 100


class Interrupted(Exception):
    """Stands for a kill; tests/qkd/stages/test_kill_and_resume.py kills processes."""


def short(name: str, bits: int = 2) -> RunConfig:
    """Return a method's config with few images and short trainings; one with phases keeps its epochs."""
    words = ["data.train_limit=640", "data.batch_size=64", f"student.quant.weight_bits={bits}"]
    words.append(f"student.quant.act_bits={bits}")
    config = read_config(SHIPPED[name])
    sections = [(("teacher", "train"), 5), (("student", "float_train"), 2)]
    # a term with a large weight (attention transfer: 500) comes first: the labels take longer
    is_heavy = any(term.get("weight", 1) > HEAVY for term in config["student"].get("terms", []))
    sections += [] if "phases" in config["student"] else [(("student", "train"), 10 if is_heavy else 5)]
    for section, epochs in sections:
        values: Any = config
        for key in section:
            values = (values or {}).get(key)
        if values:
            epochs = min(epochs, values["epochs"])
            words += [f"{'.'.join(section)}.epochs={epochs}", f"{'.'.join(section)}.warmup_epochs=0.5"]
    return load_config(name, words)


def run(config: RunConfig, folder: Path, teacher: Path) -> Path:
    """Run a config up to its student, with the teacher of another run, and return its folder."""
    with RunFolder.open(config, runs_dir=folder) as opened:
        if not opened.is_complete("teacher"):
            opened.adopt("teacher", teacher)
        run_stages(opened, ("teacher", "search", "distill"), Silent())
        return opened.path


def operators(folder: Path) -> Counter[tuple[str, tuple[int, ...]]]:
    """Export a run's student; return the file's operators with the shapes of their constants."""
    path = folder / "student.onnx"
    export_onnx(load_student(RunFolder(stored_config(folder), folder)), torch.zeros(1, 1, 8, 8), path)
    model = onnx.load(path)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return Counter(
        (node.op_type, tuple(size for name in node.input for size in shapes.get(name, ()))) for node in model.graph.node
    )


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], Path]:
    """Return what gives the folder of a run with a config's teacher, trained once for all that share it."""
    folder, known = tmp_path_factory.mktemp("teachers"), {}

    def of(config: RunConfig) -> Path:
        key = json.dumps([part.model_dump(mode="json") for part in (config.data, config.teacher)])
        key += f"{config.seed} {config.student.rotations}"  # branches may learn with the teacher
        if key not in known:
            with RunFolder.open(config.model_copy(update={"name": f"teacher-{len(known)}"}), folder) as opened:
                run_stages(opened, ("teacher",), Silent())
                known[key] = opened.path
        return known[key]

    return of


@pytest.fixture(scope="module")
def plain_operators(
    teachers: Callable[[RunConfig], Path], tmp_path_factory: pytest.TempPathFactory
) -> Counter[tuple[str, tuple[int, ...]]]:
    config = short(PLAIN)
    return operators(run(config, tmp_path_factory.mktemp("plain"), teachers(config)))


def test_every_loss_has_a_config() -> None:
    data_free = [name for name in SHIPPED if name.startswith("digits/data-free/")]
    text = "\n".join(SHIPPED[name].read_text() for name in [*METHODS, *data_free])
    assert sorted(set(LOSSES) - set(re.findall(r"loss: (\w+)", text))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_resumes_and_leaves_no_trace(
    name: str,
    tmp_path: Path,
    teachers: Callable[[RunConfig], Path],
    plain_operators: Counter[tuple[str, tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    config = short(name)
    teacher = teachers(config)
    whole = run(config, tmp_path / "whole", teacher)
    rows = [json.loads(line) for line in (whole / "student" / "metrics.jsonl").read_text().splitlines()]
    # a phase that trains modules alone has the student as it began
    start, end = rows[0]["train_accuracy"], rows[-1]["train_accuracy"]
    assert end > start, f"{name}: {start} -> {end}"
    values = [value for row in rows for value in row["terms"].values()]
    assert all(math.isfinite(value) for value in values)
    for term in {term for row in rows for term in row["terms"]}:
        course = [row["terms"][term] for row in rows if term in row["terms"]]
        assert len(course) == 1 or len(set(course)) > 1, f"{term} did not move"
    assert operators(whole) == plain_operators

    if not has_state(config):
        return  # the student's own state is the same for all of these; `soft_targets` stands for them
    cut = tmp_path / "cut"
    stop_inside_the_students_training(config, monkeypatch, at=29)
    with pytest.raises(Interrupted):
        run(config, cut, teacher)
    monkeypatch.undo()
    again = run(config, cut, teacher)
    expected = read_safetensors(whole / "student" / "weights.safetensors")
    found = read_safetensors(again / "student" / "weights.safetensors")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def has_state(config: RunConfig) -> bool:
    """Whether a method keeps more than the student's weights: nets beside it, phases, modules of terms."""
    own = config.student
    modules = any(LOSSES[term.loss].module is not None for term in own.terms)
    beside = own.peers or own.rotations or own.auxiliary or own.adaptation or own.phases or config.teacher.members > 1
    return modules or bool(beside) or config.name.endswith("soft_targets")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_works_with_a_w4a4_student(name: str) -> None:
    report = dry_run(short(name, bits=4), Silent())
    assert any(check.name.startswith("phase") for check in report.checks)


def stop_inside_the_students_training(config: RunConfig, monkeypatch: pytest.MonkeyPatch, *, at: int) -> None:
    """Let the student's training end with an exception at a step, with a checkpoint after each of the two before it."""
    step, done = Trainer._step, 0

    def counting(self: Trainer, *arguments: Any) -> Any:
        nonlocal done
        if self.job.role != "student":
            return step(self, *arguments)
        if done == at:
            raise Interrupted
        done += 1
        if done >= at - 1:
            self.saved_at = -math.inf  # a checkpoint after this step
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", counting)
