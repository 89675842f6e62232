"""Seeded choices among labeled images: stratified parts, and the order of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_quotas(counts: Tensor, total: int) -> Tensor:
    """Share ``total`` places among classes in proportion to their ``counts`` (largest remainder; ties: lower class).

    Args:
        counts: Images of each class, int64, shape ``[classes]``.
        total: Places to give, 0 to ``counts.sum()``.

    Returns:
        Places of each class, int64, shape ``[classes]``: they add up to ``total``, none above its count.

    Raises:
        ValueError: If ``total`` is negative or larger than there are images.
    """
    images = int(counts.sum())
    if not 0 <= total <= images:
        raise ValueError(f"cannot take {total} of {images} images")
    if total == 0:
        return torch.zeros_like(counts)
    quotas = counts * total // images
    remainders = counts * total % images
    missing = total - int(quotas.sum())
    # Sorting is stable, so of equal remainders the lower class is served first.
    winners = torch.sort(remainders, descending=True, stable=True).indices[:missing]
    quotas[winners] += 1
    return quotas


def take_quotas(labels: Tensor, quotas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Divide positions into a random part with ``quotas[c]`` images of class ``c``, and the rest.

    Args:
        labels: Class numbers, int64, shape ``[n]``.
        quotas: Images to take of each class, int64, shape ``[classes]``.
        generator: CPU generator that is drawn from.

    Returns:
        ``(taken, rest)``: sorted positions, int64; together every position once.
    """
    is_taken = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas.tolist()):
        members = (labels == label).nonzero().flatten()
        is_taken[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return is_taken.nonzero().flatten(), (~is_taken).nonzero().flatten()


def epoch_order(n: int, generator: torch.Generator) -> Tensor:
    """Draw the order in which an epoch visits ``n`` images.

    The same state of ``generator`` gives the same order, so a run that was stopped in mid-epoch draws it again and
    continues with the rest: ``iterate(split, order[step * batch_size:], batch_size, ...)``.

    Args:
        n: Number of images, not negative.
        generator: Where the order is drawn from, on any device.

    Returns:
        A permutation, int64, shape ``[n]``, on the CPU.

    Raises:
        ValueError: If ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"needs a number of images, got {n=}")
    return torch.randperm(n, generator=generator, device=generator.device).cpu()
