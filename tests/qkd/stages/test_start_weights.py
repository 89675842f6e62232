"""A student that starts from a file of float weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qkd.checking import file_faults
from qkd.config import RunConfig
from qkd.files import read_json, read_safetensors, write_safetensors
from qkd.methods.auxiliary.method import load_auxiliary
from qkd.nets import build_net
from qkd.pipeline import run_stages
from qkd.progress import Silent
from qkd.roles.nets import load_float_twin, load_student
from qkd.roles.stored import changed_sources
from qkd.run.folder import RunFolder
from qkd.search.role_search import config_mark
from qkd.testing import tiny_config

NARROW = {"student.net": "lenet5", "teacher.train.epochs": 1, "student.train.epochs": 1}


def run(config: RunConfig, folder: Path) -> RunFolder:
    with RunFolder.open(config, runs_dir=folder) as opened:
        run_stages(opened, ("teacher", "search", "distill"), Silent())
        return opened


def test_it_ends_where_the_one_with_its_own_float_training_ends(data: Path, tmp_path: Path) -> None:
    own = run(tiny_config(data, {**NARROW, "student.float_train": {"epochs": 1, "lr": 0.01}}), tmp_path / "own")
    weights = own.path / "student" / "float" / "weights.safetensors"
    given = run(tiny_config(data, {**NARROW, "student.weights": str(weights)}), tmp_path / "given")
    states = [load_student(one).state_dict() for one in (own, given)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert changed_sources(given.path, given.config) == ""
    weights.write_bytes(weights.read_bytes() + b" ")
    assert f"student.weights: {weights} has changed since" in changed_sources(given.path, given.config)
    weights.write_bytes(weights.read_bytes()[:-1])
    twins = [load_float_twin(one) for one in (own, given)]
    assert twins[0] is not None and twins[1] is not None
    assert all(
        torch.equal(a, b) for a, b in zip(twins[0].state_dict().values(), twins[1].state_dict().values(), strict=True)
    )


def test_two_starts_are_refused(data: Path) -> None:
    with pytest.raises(ValidationError, match="and init `random` both set what the student starts from"):
        tiny_config(data, {**NARROW, "student.init": "random", "student.weights": "some.safetensors"})


@pytest.fixture(scope="module")
def weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of lenet5's float weights, outside every run folder of these tests."""
    path = tmp_path_factory.mktemp("weights") / "given.safetensors"
    net = build_net("lenet5", classes=4, channels=1, image_size=8)
    write_safetensors(path, net.state_dict())
    return path


@pytest.mark.parametrize(
    ("auxiliary", "is_given"), [({}, True), ({"init": "random"}, False), ({"net": "resnet8"}, False)]
)
def test_an_auxiliary_starts_from_them_where_the_net_is_the_students(
    data: Path, tmp_path: Path, weights: Path, auxiliary: dict[str, Any], is_given: bool
) -> None:
    section = {"train": {"epochs": 1, "lr": 1e-9}, "terms": [{"loss": "soft_target"}], **auxiliary}
    done = run(tiny_config(data, {**NARROW, "student.weights": str(weights), "student.auxiliary": section}), tmp_path)
    assert done.is_complete("auxiliary") and done.is_complete("distill")
    found, given = load_auxiliary(done).state_dict(), read_safetensors(weights)
    name = next(name for name in given if name.endswith("weight"))
    near = (
        name in found and found[name].shape == given[name].shape and torch.allclose(found[name], given[name], atol=1e-6)
    )
    assert near == is_given
    assert not any("given" in name for name in read_json(done.path / "manifests" / "auxiliary.json")["inputs"])


def test_an_auxiliary_with_a_float_training_has_it(data: Path, tmp_path: Path, weights: Path) -> None:
    section = {
        "train": {"epochs": 1},
        "float_train": {"epochs": 1, "lr": 0.01},
        "terms": [{"loss": "soft_target"}],
    }
    done = run(tiny_config(data, {**NARROW, "student.weights": str(weights), "student.auxiliary": section}), tmp_path)
    assert (done.path / "student" / "auxiliary" / "float" / "weights.safetensors").is_file()


def test_the_students_search_starts_from_them_and_notices_others(data: Path, tmp_path: Path, weights: Path) -> None:
    search = {"members": 4, "epochs": 2, "interval_epochs": 1, "train_images": 32, "val_images": 12}
    agent = {"policy": "search", "crop_padding": 1, "flip": False}
    changes = {**NARROW, "student.weights": str(weights), "student.agent": agent, "search": search}
    config = tiny_config(data, changes)
    done = run(config, tmp_path)
    assert done.is_complete("search_student") and done.is_complete("distill")
    assert not any("given" in name for name in read_json(done.path / "manifests" / "search_student.json")["inputs"])
    before, kept = config_mark(config, "student"), weights.read_bytes()
    try:
        weights.write_bytes(kept + b" ")
        assert config_mark(config, "student") != before
    finally:
        weights.write_bytes(kept)


def test_a_missing_file_is_told_before_training() -> None:
    faults = dict(file_faults({"student": {"weights": "nowhere.safetensors"}}))
    where = f" in {Path.cwd()} (paths are relative to the current folder)"
    assert faults[("student", "weights")] == f"no such file: nowhere.safetensors{where}"
