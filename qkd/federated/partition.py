"""Divide labeled images among clients, class by class, by shares drawn from a Dirichlet distribution."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkd.data.sampling import stratified_quotas
from qkd.seeding import derive, stream


def dirichlet_shares(classes: int, clients: int, *, alpha: float, seed: int) -> Tensor:
    """Draw which share of each class every client has.

    Args:
        classes: Number of classes.
        clients: Number of clients.
        alpha: Concentration, positive: small values give a class to few clients, large ones share it evenly.
        seed: Of the draw.

    Returns:
        Shares in ``[0, 1]``, float64, shape ``[classes, clients]``; rows add up to 1.

    Raises:
        ValueError: If ``alpha`` is not positive and finite, or there is no class or client.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be positive and finite, got {alpha=}")
    if classes < 1 or clients < 1:
        raise ValueError(f"at least one class and one client are required, got {classes=} and {clients=}")
    generator = np.random.default_rng(derive(seed, "federated", "shares"))
    shares: npt.NDArray[np.float64] = generator.dirichlet([alpha] * clients, size=classes)
    broken = ~np.isclose(shares.sum(1), 1)  # draws of a tiny alpha may all round to 0, the sum of a huge one overflows
    shares[broken] = 1 / clients if alpha > 1 else np.eye(clients)[generator.integers(clients, size=int(broken.sum()))]
    return torch.from_numpy(shares)


def divide(labels: Tensor, shares: Tensor, *, seed: int, least: int = 0) -> list[Tensor]:
    """Divide positions of images among clients: every image belongs to exactly one.

    Each class is divided by its shares (largest remainder). A client with too few images then gets some of the most
    frequent class of the client that has the most, one by one.

    Args:
        labels: Class numbers, int64, shape ``[n]``.
        shares: Of :func:`dirichlet_shares`, ``[classes, clients]``.
        seed: Draws which images of a class go to whom.
        least: Images that every client has at least.

    Returns:
        Sorted positions of each client, int64.

    Raises:
        ValueError: If there are fewer than ``least`` images per client, or a label is not a row of ``shares``.
    """
    classes, clients = shares.shape
    if len(labels) < least * clients:
        raise ValueError(
            f"{clients} clients with at least {least} images each need {least * clients} images, but there are "
            f"{len(labels)}; use fewer clients or more images"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    owners = torch.full((len(labels),), -1, dtype=torch.int64)
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=stream(seed, "federated", "division", label))]
        owners[members] = torch.repeat_interleave(torch.arange(clients), _quotas(shares[label], len(members)))
    _feed_the_poor(owners, labels, clients, least)
    return [(owners == client).nonzero().flatten() for client in range(clients)]


def count_labels(labels: Tensor, parts: list[Tensor], classes: int) -> Tensor:
    """Return how many images of each class every client has, int64, shape ``[clients, classes]``.

    Args:
        labels: Of all images, int64.
        parts: Positions of each client.
        classes: Number of classes.
    """
    return torch.stack([torch.bincount(labels[part], minlength=classes) for part in parts])


def _quotas(shares: Tensor, total: int) -> Tensor:
    """Return whole numbers that add up to ``total``, in proportion to shares (to a billionth)."""
    weights = (shares * 1e9).round().long()
    weights[shares.argmax()] += max(0, total - int(weights.sum()))  # as many places as there are images
    return stratified_quotas(weights, total)


def _feed_the_poor(owners: Tensor, labels: Tensor, clients: int, least: int) -> None:
    counts = torch.bincount(owners, minlength=clients) if len(owners) else torch.zeros(clients, dtype=torch.int64)
    for client in range(clients):
        while counts[client] < least:
            rich = int(counts.argmax())
            theirs = (owners == rich).nonzero().flatten()
            frequent = torch.bincount(labels[theirs]).argmax()
            owners[theirs[labels[theirs] == frequent][0]] = client
            counts[client], counts[rich] = counts[client] + 1, counts[rich] - 1
