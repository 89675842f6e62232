"""The tables that are read without PyTorch: complete, and each row has something behind it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qkd import losses
from qkd.agents import POLICIES
from qkd.checking import term_use_faults
from qkd.checking.names import DATASET_NOTES, POLICY_NOTES, table
from qkd.cli import main
from qkd.config.binding import bind, config_text
from qkd.data import DATASETS
from qkd.failures import ConfigError
from qkd.nets.build import registered_names
from qkd.nets.torchvision_nets import torchvision_names
from qkd.terms import LOSSES
from qkd.terms.method_losses import METHOD_LOSSES
from qkd.testing import tiny_config


def test_notes_are_of_the_data_sets_and_policies_that_there_are() -> None:
    assert sorted(DATASET_NOTES) == sorted(DATASETS)
    assert sorted(POLICY_NOTES) == sorted({*POLICIES, "search", "teacher"})  # a run resolves these two
    assert table("datasets") == dict(sorted(DATASET_NOTES.items()))


def test_every_loss_of_a_method_has_a_function_and_is_listed() -> None:
    listed = table("losses")
    assert len(METHOD_LOSSES) > 20 and not set(METHOD_LOSSES) & set(LOSSES)
    for name, row in METHOD_LOSSES.items():
        assert callable(getattr(losses, row.name)) and name in listed


def test_every_loss_has_a_function_of_its_name() -> None:
    for name, row in LOSSES.items():
        assert callable(row.function) and row.function.__name__ == f"{name}_loss"


def test_torchvisions_nets_are_told_from_its_source() -> None:
    assert registered_names() == torchvision_names()
    assert len(registered_names()) > 70


def test_what_is_our_reading_is_called_so() -> None:
    methods, listed = table("methods"), table("losses")
    for name in ("filtered_soft_target", "lipschitz"):
        assert "our reading" in methods[f"student.terms: {name}"] and "our reading" in listed[name]
    assert "our reading" in listed["mskd"]
    assert {"student.adaptation", "student.data_free", "student.peers", "student.phases: meta"} <= set(methods)


BATCH_OF_TWO = {"data.batch_size": 2}
USELESS = {
    "similarities of one image": (
        {"data.batch_size": 1, "student.terms": [{"loss": "similarity_preserving", "taps": [["conv1", "conv1"]]}]},
        "student.terms.0.loss: similarity_preserving compares the images of a batch, and is 0 for fewer than 2",
    ),
    "angles of two": (
        {**BATCH_OF_TWO, "student.terms": [{"loss": "logit_relation"}]},
        "student.terms.0.loss: logit_relation compares the images of a batch, and is 0 for fewer than 3",
    ),
    "in a phase": (
        {
            **BATCH_OF_TWO,
            "student.train.epochs": 2,
            "student.phases": [{"epochs": 2, "terms": [{"loss": "cross_entropy"}, {"loss": "logit_relation"}]}],
        },
        "student.phases.0.terms.1.loss: logit_relation compares",
    ),
    "a width that no kernel reads": (
        {"student.terms": [{"loss": "information_flow", "taps": [["conv1", "conv1"]], "options": {"sigma": 2.0}}]},
        "student.terms.0.options.sigma: information_flow reads it with kernel rbf or cauchy only, got its default",
    ),
    "a threshold that no criterion reads": (
        {"student.terms": [{"loss": "filtered_soft_target", "options": {"threshold": 0.1, "criterion": "all"}}]},
        "options.threshold: filtered_soft_target reads it with criterion close only, got all",
    ),
    "mixed images": (
        {"student.agent": {"policy": "cutmix"}, "student.view": "same", "student.terms": [{"loss": "decoupled"}]},
        "student.terms.0.loss: decoupled reads one label per image",
    ),
    "a member's temperature": (
        {"teacher.members": 2, "teacher.ensemble": "logit", "teacher.ensemble_temperature": 2.0},
        "teacher.ensemble_temperature: is for `ensemble: probability`, got `logit`",
    ),
    "peers without soft targets": (
        {"student.peers": {"nets": [{}], "ensemble_weight": 0, "temperature": 5.0}},
        "student.peers.temperature: is of soft targets, but `ensemble_weight` is 0",
    ),
    "turned images without soft targets": (
        {"student.rotations": {"mode": "online", "branch_weight": 0, "logit_weight": 0, "temperature": 5.0}},
        "student.rotations.temperature: is of soft targets, but `branch_weight` and `logit_weight` are 0",
    ),
}


@pytest.mark.parametrize("name", USELESS)
def test_what_has_no_effect_is_refused_in_new_configs_and_read_in_those_of_runs(name: str, tmp_path: Path) -> None:
    changes, message = USELESS[name]
    config = tiny_config(tmp_path, changes)
    values = config.model_dump(mode="json")
    with pytest.raises(ConfigError, match=re.escape(message)):
        bind(values, new=(term_use_faults,))
    assert bind(values, new=(term_use_faults,), is_stored=True) == config
    file = tmp_path / "one.yaml"
    file.write_text(config_text(config))
    assert main(["validate", str(file)]) == 2


def test_terms_that_have_an_effect_pass(tmp_path: Path) -> None:
    taps = [["conv1", "conv1"]]
    terms = [
        {"loss": "information_flow", "taps": taps, "options": {"sigma": 2.0, "kernel": "rbf"}},
        {"loss": "filtered_soft_target", "options": {"threshold": 0.1, "criterion": "close"}},
        {"loss": "logit_relation"},
        {"loss": "similarity_preserving", "taps": taps, "weight": 0},
    ]
    values = tiny_config(tmp_path, {"data.batch_size": 3, "student.terms": terms}).model_dump(mode="json")
    bind(values, new=(term_use_faults,))
