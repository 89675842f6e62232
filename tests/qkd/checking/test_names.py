"""The tables that are read without PyTorch: complete, and each row has something behind it."""

from __future__ import annotations

from qkd import losses
from qkd.agents import POLICIES
from qkd.checking.names import DATASET_NOTES, POLICY_NOTES, table
from qkd.data import DATASETS
from qkd.nets.build import registered_names
from qkd.nets.torchvision_nets import torchvision_names
from qkd.terms import LOSSES
from qkd.terms.method_losses import METHOD_LOSSES


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
