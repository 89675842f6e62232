"""Modules of loss terms: adapters are built where shapes differ, seeded, and shared by phases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qkd.config import TermConfig
from qkd.losses.features import Adapter, build_adapter
from qkd.terms import Outputs, build_terms
from qkd.terms.loss_table import ADAPTER
from qkd.terms.modules import build_bank

IMAGES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
HINT = TermConfig(loss="hint", taps=(("0", "0"),))


def narrow() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 3))


def wide() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3, stride=2), nn.Flatten(), nn.Linear(54, 3))


def test_a_hint_of_other_shape_gets_an_adapter_that_learns() -> None:
    student, teacher = narrow(), wide()
    bank = build_bank(student, teacher, [HINT], IMAGES)
    terms = build_terms([HINT], bank=bank)
    assert [type(module) for module in bank.modules.values()] == [Adapter]
    features = {"0": student[0](IMAGES)}
    outputs = Outputs(torch.zeros(3, 3), torch.zeros(3).long(), torch.zeros(3, 3), features, {"0": teacher[0](IMAGES)})
    loss, _ = terms(outputs)
    loss.backward()
    adapter = bank.modules["adapter_0"]
    assert isinstance(adapter, Adapter)
    mapped = nn.functional.adaptive_avg_pool2d(adapter.map(features["0"]), (3, 3))
    assert torch.allclose(loss, (mapped - teacher[0](IMAGES)).square().mean())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    assert student[0].weight.grad is not None
    assert teacher[0].weight.grad is None


def test_equal_shapes_need_none() -> None:
    bank = build_bank(narrow(), narrow(), [HINT], IMAGES)
    build_terms([HINT], bank=bank)
    assert len(bank.modules) == 0


def test_phases_share_a_module_and_a_seed_gives_it_again() -> None:
    banks = [build_bank(narrow(), wide(), [HINT], IMAGES, seed=5) for _ in range(2)]
    for bank in banks:
        build_terms([HINT], bank=bank)
        build_terms([HINT.model_copy(update={"weight": 3.0})], bank=bank)
    assert [len(bank.modules) for bank in banks] == [1, 1]
    states = [bank.modules.state_dict() for bank in banks]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_vectors_have_a_linear_adapter_and_planes_do_not_meet_vectors() -> None:
    assert isinstance(build_adapter((4,), (6,)).map, nn.Linear)
    with pytest.raises(ValueError, match="no adapter from a student's feature"):
        build_adapter((4, 3, 3), (6,))


def test_an_unknown_tap_is_named_before_training() -> None:
    wrong = HINT.model_copy(update={"taps": (("0", "nowhere"),)})
    with pytest.raises(ValueError, match="the teacher has no module 'nowhere'"):
        build_bank(narrow(), wide(), [wrong], IMAGES)


def test_a_bank_knows_only_the_taps_it_was_made_for() -> None:
    bank = build_bank(narrow(), wide(), [HINT], IMAGES)
    with pytest.raises(KeyError):
        bank.take(ADAPTER, (("1", "1"),), {})
