"""The teacher's side of every loss: a constant, but where a gradient into it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qkd.config import TermConfig
from qkd.losses.given import given, teacher_in_graph
from qkd.terms import LOSSES, Outputs, build_terms

TEACHERS = sorted(
    name
    for name, entry in LOSSES.items()
    if entry.teaches and (entry.needs_teacher or "class_weights" in entry.inputs)
)  # fmt: skip


def outputs() -> tuple[Outputs, list[Tensor], list[Tensor]]:
    """Return random outputs of one shape for both nets, and the leaves of the student's and the teacher's side."""
    generator = torch.Generator().manual_seed(5)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    student, teacher = ([leaf(6, 5), leaf(6, 4, 3, 3), leaf(6, 4, 3, 3)] for _ in range(2))
    weights = leaf(5, 7)
    features = ({"a": side[1], "b": side[2]} for side in (student, teacher))
    made = Outputs(student[0], torch.arange(6) % 5, teacher[0], *features, weights)
    return made, student, [*teacher, weights]


def loss_of(name: str, values: Outputs) -> Tensor:
    taps = (("a", "a"), ("b", "b")) if LOSSES[name].needs_taps else ()
    return build_terms([TermConfig(loss=name, taps=taps)])(values)[0]


def test_there_are_losses() -> None:
    assert len(TEACHERS) >= 10
    constant = {name for name, entry in LOSSES.items() if not entry.teaches}
    assert constant == {"graph_attention", "multi_head_graph", "singular_vector", "logit_distance"}  # vectors, L1


@pytest.mark.parametrize("name", TEACHERS)
def test_a_gradient_reaches_the_teacher_only_where_asked_for(name: str) -> None:
    values, student, teacher = outputs()
    plain = torch.autograd.grad(loss_of(name, values), (*student, *teacher), allow_unused=True)
    assert any(one is not None for one in plain[: len(student)])
    assert all(one is None for one in plain[len(student) :])
    with teacher_in_graph():
        opened = loss_of(name, values)
    mixed = torch.autograd.grad(opened, tuple(student), create_graph=True, allow_unused=True)
    found = [one for one in mixed if one is not None and one.requires_grad]
    by_teacher = torch.autograd.grad([one.square().sum() for one in found], tuple(teacher), allow_unused=True)
    assert any(one is not None and float(one.abs().max()) > 0 for one in by_teacher)
    assert all(one is None or bool(torch.isfinite(one).all()) for one in by_teacher)


def test_the_block_ends_with_an_error_too() -> None:
    tensor = nn.Parameter(torch.ones(1))
    with pytest.raises(KeyError), teacher_in_graph():
        assert given(tensor) is tensor
        raise KeyError
    assert not given(tensor).requires_grad
