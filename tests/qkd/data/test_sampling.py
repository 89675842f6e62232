"""Stratified quotas: proportional, complete, and never more than there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkd.data.sampling import stratified_quotas, take_quotas


@given(st.lists(st.integers(0, 400), min_size=1, max_size=12), st.floats(0, 1))
def test_quotas_are_proportional_and_add_up(counts: list[int], share: float) -> None:
    total = int(sum(counts) * share)
    quotas = stratified_quotas(torch.tensor(counts), total).tolist()
    assert sum(quotas) == total
    for count, quota in zip(counts, quotas, strict=True):
        assert 0 <= quota <= count
        assert abs(quota - count * total / max(sum(counts), 1)) < 1


def test_ties_go_to_the_lower_class() -> None:
    assert stratified_quotas(torch.tensor([5, 5, 5]), 4).tolist() == [2, 1, 1]


@pytest.mark.parametrize("total", [-1, 16])
def test_more_than_there_is_cannot_be_taken(total: int) -> None:
    with pytest.raises(ValueError, match=f"cannot take {total} of 15 images"):
        stratified_quotas(torch.tensor([5, 5, 5]), total)


def test_taking_divides_every_position_once() -> None:
    labels = torch.arange(40) % 4
    taken, rest = take_quotas(labels, torch.tensor([1, 2, 3, 10]), torch.Generator().manual_seed(0))
    assert sorted((*taken.tolist(), *rest.tolist())) == list(range(40))
    assert torch.bincount(labels[taken]).tolist() == [1, 2, 3, 10]
    other, _ = take_quotas(labels, torch.tensor([1, 2, 3, 10]), torch.Generator().manual_seed(1))
    assert taken.tolist() != other.tolist()
