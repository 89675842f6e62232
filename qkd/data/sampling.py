"""Seeded sampling of labeled images: stratified parts, and the order of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_quotas(counts: Tensor, total: int) -> Tensor:
    """Distribute ``total`` places over classes in proportion to ``counts`` (largest remainder; ties: lower class).

    Args:
        counts: Images of each class, int64, shape ``[classes]``.
        total: Places to distribute, 0 to ``counts.sum()``.

    Returns:
        Places per class, int64, shape ``[classes]``: they add up to ``total``, and none exceeds its count.

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
    # The sort is stable, so among equal remainders the lower class comes first.
    winners = torch.sort(remainders, descending=True, stable=True).indices[:missing]
    quotas[winners] += 1
    return quotas


def take_quotas(labels: Tensor, quotas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Divide positions into a random part with ``quotas[c]`` images of each class ``c``, and the rest.

    Args:
        labels: Class numbers, int64, shape ``[n]``.
        quotas: Images to take per class, int64, shape ``[classes]``.
        generator: CPU generator to draw from.

    Returns:
        ``(taken, rest)``: sorted positions, int64; every position is in exactly one of them.
    """
    is_taken = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas.tolist()):
        members = (labels == label).nonzero().flatten()
        is_taken[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return is_taken.nonzero().flatten(), (~is_taken).nonzero().flatten()


def epoch_order(n: int, generator: torch.Generator) -> Tensor:
    """Draw the order in which an epoch visits ``n`` images.

    The same state of ``generator`` gives the same order, so a run that was stopped mid-epoch draws it again and
    continues with the rest: ``iterate(split, order[step * batch_size:], batch_size, ...)``.

    Args:
        n: Number of images, not negative.
        generator: Generator to draw from, on any device.

    Returns:
        A permutation, int64, shape ``[n]``, on the CPU.

    Raises:
        ValueError: If ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"the number of images must not be negative, got {n=}")
    return torch.randperm(n, generator=generator, device=generator.device).cpu()
