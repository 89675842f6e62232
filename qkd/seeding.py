"""Named random streams derived from one seed: the same names give the same numbers on every run and machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator

import torch


def derive(seed: int, *names: str | int) -> int:
    """Return the seed of a named purpose.

    Args:
        seed: The run's seed.
        *names: What the numbers are for, e.g. ``"augment", epoch, step``. Text and whole numbers; 1 and "1" differ.

    Returns:
        An integer in ``[0, 2 ** 63)``, equal on every machine and Python version (SHA-256, not ``hash``).
    """
    key = json.dumps([int(seed), *names], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "little") >> 1


def stream(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for a named purpose.

    Args:
        seed: The run's seed.
        *names: As for :func:`derive`.
        device: Where the numbers are drawn.

    Returns:
        A fresh generator. PyTorch's CPU generator takes 32 bits of the derived seed, so two of many streams may
        coincide; nothing here relies on their being different.

    Example:
        >>> a, b = stream(0, "augment", 3, 7), stream(0, "augment", 3, 7)
        >>> bool(torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b)))
        True
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(derive(seed, *names))
    return generator


@contextlib.contextmanager
def global_stream(seed: int, *names: str | int) -> Iterator[None]:
    """Seed PyTorch's global generators for a block (weight initialization, dropout), and restore them after it."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if in_use else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, *names))
        yield
