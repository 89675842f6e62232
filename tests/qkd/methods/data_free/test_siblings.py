"""A second student by the first one's own command: another run beside it, and no step of a second generator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import qkd
from qkd.cli.entry import main
from qkd.config import RunConfig
from qkd.failures import UsageError
from qkd.files import sha256_of
from qkd.methods.data_free.inverting import pooling
from qkd.methods.data_free.making import generating
from qkd.pipeline.siblings import beside
from qkd.progress import Silent
from qkd.roles.stored import stored_config
from qkd.testing import run_tiny
from qkd.training import loop

pytestmark = pytest.mark.usefixtures("eager")
FLOAT = {"student.init": "float", "student.float_train": {"epochs": 1, "optimizer": "adamw", "lr": 1e-3}}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is trained from now on: a name a step."""
    steps: list[str] = []
    real_step, real_batch, real_fit = generating.GeneratorStep.__call__, pooling.PoolRole._write, loop.Trainer._step

    def note(name: str, folder: Path) -> None:
        if "qkd-check-" not in str(folder):  # every step is tried on a few images first, in a folder that is dropped
            steps.append(name)

    monkeypatch.setattr(
        generating.GeneratorStep, "__call__", lambda of, *more: [note("maker", of.folder), real_step(of, *more)][1]
    )
    monkeypatch.setattr(
        pooling.PoolRole, "_write", lambda of, *more: [note("maker", of.place), real_batch(of, *more)][1]
    )
    monkeypatch.setattr(
        loop.Trainer, "_step", lambda of, *more: [note(of.job.role, of.job.folder), real_fit(of, *more)][1]
    )
    return steps


def written(config: RunConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return str(path)


@pytest.mark.parametrize("method", ["rdskd", "deep_inversion"])
def test_the_same_command_with_other_widths_makes_a_student_and_no_generator(
    method: str,
    config_of: Callable[..., RunConfig],
    tmp_path: Path,
    trained: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = written(config_of(method, {**FLOAT, "name": "first"}), tmp_path / "datafree.yaml")
    words = ["run", config, "--runs-dir", str(tmp_path / "runs"), "--until", "distill"]
    assert main(words) == 0 and "maker" in trained and "student_float" in trained
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "first-w2a4"
    weights = sha256_of(first / "student" / "weights.safetensors")

    trained.clear()
    assert main([*words, "student.quant.weight_bits=2"]) == 0
    assert set(trained) == {"student"}, "no step of a teacher, a generator or a float student"
    assert "first has a student of other widths; this one goes to" in capsys.readouterr().err
    assert sha256_of(first / "student" / "weights.safetensors") == weights, "the first student is there as it was"
    assert stored_config(first).student.quant.weight_bits == 4
    assert stored_config(second).student.quant.weight_bits == 2
    made = json.loads((first / "manifests" / "generator.json").read_text())["files"]
    assert made and all(sha256_of(second / name) == sha256 for name, sha256 in made.items())
    places = ("teacher", "student/float")
    assert all(len({sha256_of(run / name / "weights.safetensors") for run in (first, second)}) == 1 for name in places)

    trained.clear()
    assert main([*words, "student.quant.weight_bits=2"]) == 0 and main(words) == 0
    assert trained == [], "both are complete"


def test_a_student_of_another_net_gets_its_own_float_training(
    config_of: Callable[..., RunConfig], tmp_path: Path, trained: list[str]
) -> None:
    with run_tiny(config_of("rdskd", {**FLOAT, "name": "first"}), tmp_path, "teacher", "search", "distill") as run:
        source = str(run.path)
    trained.clear()
    changes = {**FLOAT, "name": "other", "student.net": "resnet8", "teacher.run": source}
    with run_tiny(config_of("rdskd", changes), tmp_path, "teacher", "search", "distill"):
        assert set(trained) == {"student_float", "student"}


def test_what_only_a_low_bit_student_has_may_follow_its_widths(
    config_of: Callable[..., RunConfig], tmp_path: Path, trained: list[str]
) -> None:
    copy = {"student.self_distillation": {"weight": 1.0}}
    first = config_of("rdskd", {**FLOAT, **copy, "name": "first"})
    with run_tiny(first, tmp_path, "teacher", "search", "distill"):
        assert {"student_float", "student"} <= set(trained)
    trained.clear()
    by_recipe = {"student.quant.weight_bits": 2, "student.low_bit": {"transition_rate": 0.005, "decay_by_bits": True}}
    second = beside(config_of("rdskd", {**FLOAT, **copy, **by_recipe, "name": "first"}), tmp_path, Silent())
    assert second.name.startswith("first-w2a4-")
    with run_tiny(second, tmp_path, "teacher", "search", "distill"):
        assert set(trained) == {"student"}
    alone = config_of("rdskd", {**FLOAT, **copy, "name": "first", "student.low_bit": {"dampening": 0.1}})
    assert beside(alone, tmp_path, Silent()) is alone, "of the same widths: for a person to name"


def test_a_generator_that_is_not_finished_is_not_trained_twice(
    config_of: Callable[..., RunConfig], tmp_path: Path
) -> None:
    first = config_of("rdskd", {"name": "first"})
    with run_tiny(first, tmp_path, "teacher", "search"):
        pass
    other = config_of("rdskd", {"name": "first", "student.quant.act_bits": 2})
    with pytest.raises(UsageError, match=r"they are not finished: generator \(not run\); finish them first with `qkd"):
        beside(other, tmp_path, Silent())


def test_which_run_is_meant(config_of: Callable[..., RunConfig], tmp_path: Path, data_folder: Path) -> None:
    first = config_of("noise", {"name": "first"})
    assert beside(first, tmp_path, Silent()) is first, "there is no run of that name"
    with run_tiny(first, tmp_path, "teacher"):
        pass
    assert beside(first, tmp_path, Silent()) is first, "it is that run"
    named = beside(config_of("noise", {"name": "first", "student.quant.act_bits": 2}), tmp_path, Silent())
    assert named.name == "first-w4a2" and named.teacher.run == (tmp_path / "first").resolve()
    assert named.student.quant.act_bits == 2
    coarse = {"name": "first", "student.quant.act_bits": 2, "student.quant.per_channel": False}
    others = {beside(config_of("noise", {**coarse, **more}), tmp_path, Silent()).name
              for more in ({}, {"student.quant.last_bits": 4})}  # fmt: skip
    assert len(others) == 2 and all(name.startswith("first-w4a2-") for name in others)
    recipe = {"name": "first", "student.recipe": "default", "student.quant.act_bits": 2}
    assert beside(config_of("noise", recipe), tmp_path, Silent()).name == "first", "another recipe is another training"
    longer = config_of("noise", {"name": "first", "student.quant.act_bits": 2, "student.train.lr": 0.5})
    assert beside(longer, tmp_path, Silent()) is longer, "another training is for a person to name"
    with_images = {"student.data_free": None, "student.agent": {"policy": "crop", "flip": False}}
    real = config_of("noise", {"name": "real", **with_images})
    with run_tiny(real, tmp_path, "teacher"):
        pass
    low = config_of("noise", {"name": "real", **with_images, "student.quant.act_bits": 2})
    assert beside(low, tmp_path, Silent()) is low, "no method asks for it"
    assert data_folder.is_dir()


def test_what_a_recipe_sets_is_in_no_name(config_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    with run_tiny(config_of("noise", {"name": "first", "student.recipe": "default"}), tmp_path, "teacher"):
        pass
    low = {"name": "first", "student.recipe": "default", "student.quant.weight_bits": 2}
    assert beside(config_of("noise", low), tmp_path, Silent()).name == "first-w2a4"
    by_hand = {**low, "student.low_bit": {"transition_rate": 0.01}}
    assert beside(config_of("noise", by_hand), tmp_path, Silent()).name.startswith("first-w2a4-")


def test_a_net_of_a_persons_own_is_not_trained_again(
    config_of: Callable[..., RunConfig], tmp_path: Path, trained: list[str]
) -> None:
    """Each run has its copy of the file, so that paths differ."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef build(num_classes, in_channels):\n"
        "    body = [nn.Conv2d(in_channels, 4, 3), nn.ReLU()]\n"
        "    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    own = {**FLOAT, "name": "first", "student.net": f"{tmp_path / 'net.py'}:build"}
    config = written(config_of("rdskd", own), tmp_path / "own.yaml")
    words = ["run", config, "--runs-dir", str(tmp_path / "runs"), "--until", "distill"]
    assert main(words) == 0 and "student_float" in trained
    trained.clear()
    assert main([*words, "student.quant.weight_bits=2"]) == 0
    assert set(trained) == {"student"}


def test_from_python(config_of: Callable[..., RunConfig], tmp_path: Path, trained: list[str]) -> None:
    config = config_of("rdskd", {"name": "first"})
    qkd.run(config, runs_dir=tmp_path, until="distill", progress=Silent())
    trained.clear()
    second = qkd.run(
        config, {"student.quant.weight_bits": 2}, runs_dir=tmp_path, until="distill", progress=Silent()
    )  # fmt: skip
    assert second.path.name == "first-w2a4" and set(trained) == {"student"}
