"""The division of images among clients: every image once, nobody empty, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkd.federated.partition import count_labels, dirichlet_shares, divide

LABELS = torch.arange(300) % 5


def parts(alpha: float, clients: int = 6, seed: int = 0, least: int = 2, labels: Tensor = LABELS) -> list[Tensor]:
    return divide(labels, dirichlet_shares(5, clients, alpha=alpha, seed=seed), seed=seed, least=least)


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 1.0, 1000.0])
def test_every_image_has_one_client_and_every_client_some(alpha: float) -> None:
    for seed in range(5):
        found = parts(alpha, seed=seed)
        assert torch.cat(found).sort().values.equal(torch.arange(300))
        assert min(map(len, found)) >= 2


def test_the_same_seed_divides_alike_and_another_does_not() -> None:
    first, again, other = parts(0.5), parts(0.5), parts(0.5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_alpha_says_how_uneven_it_is() -> None:
    """A large alpha gives everybody a fair share of each class, a small one few classes to each."""
    even, uneven = (count_labels(LABELS, parts(alpha), 5) for alpha in (1e5, 0.05))
    assert int(even.max()) - int(even.min()) <= 2
    assert int((uneven > 0).sum()) < int((even > 0).sum()) == 30
    assert torch.equal(even.sum(0), torch.full((5,), 60)) and torch.equal(uneven.sum(0), even.sum(0))


@pytest.mark.parametrize("alpha", [1e308, 1e-300])
def test_shares_add_up_for_any_alpha(alpha: float) -> None:
    shares = dirichlet_shares(5, 3, alpha=alpha, seed=0)
    torch.testing.assert_close(shares.sum(1), torch.ones(5, dtype=torch.float64))
    assert bool((shares < 0.5).all()) == (alpha > 1)


def test_as_many_clients_as_images() -> None:
    assert sorted(map(len, parts(0.1, clients=300, least=1))) == [1] * 300


def test_one_client_has_all() -> None:
    assert parts(0.1, clients=1)[0].equal(torch.arange(300))


def test_no_images_are_divided_into_nothing() -> None:
    """A run without validation images has clients without any."""
    empty = torch.zeros(0, dtype=torch.int64)
    assert [len(part) for part in parts(0.1, labels=empty, least=0)] == [0] * 6


def test_what_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="200 clients with at least 2 images each need 400 images, but there are 300"):
        parts(0.1, clients=200)
    with pytest.raises(ValueError, match="alpha must be positive and finite, got alpha=0"):
        dirichlet_shares(5, 3, alpha=0, seed=0)
    with pytest.raises(ValueError, match="at least one class and one client"):
        dirichlet_shares(5, 0, alpha=1, seed=0)
    with pytest.raises(ValueError, match="labels must be 0 to 1"):
        divide(LABELS, dirichlet_shares(2, 3, alpha=1, seed=0), seed=0)
