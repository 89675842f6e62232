"""Random draws of a batch: which operations each image gets, and where its crop, flip and cut-outs fall.

Every draw comes from the generator that the caller passes, on that generator's own device, and is moved to the images'
device afterwards. So a CPU generator in the same state gives the same batch on every device and every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qkd.agents.policy import LEVELS, PBA_OPERATIONS, Policy, Schedule

NONE = -1  # no operation in this round
COUNT_EDGES = (0.2, 0.5)  # no operation with probability 0.2, one with 0.3, two with 0.5 (PBA)
MOST_OPERATIONS = 2


@dataclass(frozen=True)
class Drawn:
    """The operations of a batch, in the order in which they are applied.

    Args:
        kinds: Positions in ``PBA_OPERATIONS`` or ``NONE``, int64, shape ``[batch, rounds]``.
        levels: Magnitudes 0..9, int64, same shape.
    """

    kinds: Tensor
    levels: Tensor


class OperationDraws(Protocol):
    """A way to draw operations for each image of a batch."""

    def draw(self, batch: int, epoch: int, epochs: int, generator: torch.Generator) -> Drawn:
        """Return the operations of ``batch`` images in ``epoch`` (from 0) of a training of ``epochs``."""
        ...


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return numbers in [0, 1), float32, on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


def integers(high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return integers 0..high - 1, int64, on the generator's device."""
    return torch.randint(high, shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class NoDraws:
    """No operations at all; nothing is drawn."""

    def draw(self, batch: int, epoch: int, epochs: int, generator: torch.Generator) -> Drawn:
        """Return no rounds."""
        empty = torch.zeros((batch, 0), dtype=torch.int64, device=generator.device)
        return Drawn(empty, empty)


@dataclass(frozen=True)
class PolicyDraws:
    """PBA's draw: at most 0, 1 or 2 operations (0.2, 0.3, 0.5) of the epoch's policy.

    An image's policy is shuffled and walked; each operation fires with its own probability, until as many have fired as
    the image may have or the list ends.

    References:
        Ho et al., `Population Based Augmentation <https://arxiv.org/abs/1905.05393>`_, 2019, algorithm 1.
    """

    schedule: Schedule

    def draw(self, batch: int, epoch: int, epochs: int, generator: torch.Generator) -> Drawn:
        """Return up to two operations an image."""
        return draw_from_policy(self.schedule.at(epoch, epochs), batch, generator)


@dataclass(frozen=True)
class TrivialDraws:
    """Exactly one operation, uniformly, at a uniform magnitude 0..9.

    Note: Müller and Hutter's operations and ranges differ from PBA's; the draw is theirs, the operations are PBA's.

    References:
        Müller, Hutter, `TrivialAugment <https://arxiv.org/abs/2103.10158>`_, 2021, algorithm 1.
    """

    def draw(self, batch: int, epoch: int, epochs: int, generator: torch.Generator) -> Drawn:
        """Return one operation an image."""
        kinds = integers(len(PBA_OPERATIONS), (batch, 1), generator)
        return Drawn(kinds, integers(LEVELS, (batch, 1), generator))


@dataclass(frozen=True)
class RandAugmentDraws:
    """A fixed number of operations, each uniform and independent, all at one magnitude.

    Note: Cubuk et al.'s operations and ranges differ from PBA's; the draw is theirs, the operations are PBA's.

    References:
        Cubuk, Zoph, Shlens, Le, `RandAugment <https://arxiv.org/abs/1909.13719>`_, 2019, figure 2.
    """

    operations: int
    magnitude: int

    def draw(self, batch: int, epoch: int, epochs: int, generator: torch.Generator) -> Drawn:
        """Return ``operations`` operations an image."""
        kinds = integers(len(PBA_OPERATIONS), (batch, self.operations), generator)
        return Drawn(kinds, torch.full_like(kinds, self.magnitude))


def draw_from_policy(policy: Policy, batch: int, generator: torch.Generator) -> Drawn:
    """Return up to two operations of a policy for each of ``batch`` images: see :class:`PolicyDraws`."""
    if not policy.ops:
        return NoDraws().draw(batch, 0, 1, generator)
    device = generator.device
    kinds = torch.tensor([PBA_OPERATIONS.index(op.name) for op in policy.ops], device=device)
    levels = torch.tensor([op.magnitude for op in policy.ops], device=device)
    chances = torch.tensor([op.probability for op in policy.ops], device=device)
    shape = (batch, len(policy.ops))
    fires = uniform(shape, generator) < chances
    # Firing does not depend on the order, so the walk ends with the first `allowed` of those that fire, shuffled.
    turns = uniform(shape, generator).masked_fill(~fires, 2.0)
    edges = torch.tensor(COUNT_EDGES, device=device)
    allowed = torch.bucketize(uniform((batch,), generator), edges, right=True)
    first, chosen = turns.topk(min(MOST_OPERATIONS, len(policy.ops)), dim=1, largest=False, sorted=True)
    is_used = (first < 2.0) & (torch.arange(first.shape[1], device=device) < allowed.unsqueeze(1))
    return Drawn(torch.where(is_used, kinds[chosen], NONE), levels[chosen])
