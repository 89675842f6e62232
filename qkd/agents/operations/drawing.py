"""Random draws of a batch: which operations each image gets, at which levels.

Every image draws from its own numbers (`qkd.agents.operations.counting`), on the CPU. So the same key gives the
same images on every device and every run, however an epoch is cut into batches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qkd.agents.operations.counting import FloatArray, IntArray, SampleDraws, Use
from qkd.agents.policies.policy import PBA_OPERATIONS, Schedule
from qkd.agents.policies.spaces import PBA, RANDAUGMENT, TRIVIAL_WIDE, Space

NONE = -1  # no operation in this round
COUNT_EDGES = (0.2, 0.5)  # no operation with probability 0.2, one with 0.3, two with 0.5 (PBA)
MOST_OPERATIONS = 2


@dataclass(frozen=True)
class Drawn:
    """The operations of a batch, in the order in which they are applied.

    Args:
        kinds: Positions in ``PBA_OPERATIONS`` or ``NONE``, int64, shape ``[batch, rounds]``.
        levels: Magnitudes, int64, same shape.
        space: What the levels mean.
    """

    kinds: IntArray
    levels: IntArray
    space: Space = PBA


class OperationDraws(Protocol):
    """A way to draw operations for each image of a batch."""

    def draw(self, draws: SampleDraws, epoch: int, epochs: int) -> Drawn:
        """Return the operations of a batch in ``epoch`` (from 0) of a training of ``epochs``."""
        ...


@dataclass(frozen=True)
class NoDraws:
    """No operations at all; nothing is drawn."""

    def draw(self, draws: SampleDraws, epoch: int, epochs: int) -> Drawn:  # noqa: ARG002 - one signature for all
        """Return no rounds."""
        empty = np.zeros((len(draws), 0), dtype=np.int64)
        return Drawn(empty, empty)


@dataclass(frozen=True)
class PolicyDraws:
    """PBA's draw: at most 0, 1 or 2 operations (0.2, 0.3, 0.5) of the epoch's policy.

    An image's policy is shuffled and traversed; each operation is applied with its own probability, until the image has
    its maximum or the list ends.

    Args:
        schedule: Policies over the epochs; stretched to the training.
        flatten: Whether each image uses the policy of a random epoch, redrawn every time: all the policies
            without their order (an ablation of the release).

    References:
        Ho et al., `Population Based Augmentation <https://arxiv.org/abs/1905.05393>`_, 2019, algorithm 1.
    """

    schedule: Schedule
    flatten: bool = False

    def draw(self, draws: SampleDraws, epoch: int, epochs: int) -> Drawn:
        """Return up to two operations per image.

        Raises:
            ValueError: If ``epoch`` is not within the training.
        """
        table = _policy_table(self.schedule, epochs)
        if not 0 <= epoch < epochs:
            raise ValueError(f"epoch must be 0..{epochs - 1} for a training of {epochs} epochs, got {epoch=}")
        if not self.flatten:
            return _walk(table, table.segment_of[epoch : epoch + 1], draws)
        return _walk(table, table.segment_of[draws.integers(epochs, Use.EPOCH, 1)[:, 0]], draws)


@dataclass(frozen=True)
class TrivialDraws:
    """Exactly one operation, uniformly, at a uniform magnitude: TrivialAugment "wide".

    References:
        Müller, Hutter, `TrivialAugment <https://arxiv.org/abs/2103.10158>`_, 2021, algorithm 1.
    """

    def draw(self, draws: SampleDraws, epoch: int, epochs: int) -> Drawn:  # noqa: ARG002
        """Return one operation per image."""
        kinds = _codes(TRIVIAL_WIDE)[draws.integers(len(TRIVIAL_WIDE.operations), Use.KINDS, 1)]
        return Drawn(kinds, draws.integers(TRIVIAL_WIDE.levels, Use.LEVELS, 1), TRIVIAL_WIDE)


@dataclass(frozen=True)
class RandAugmentDraws:
    """A fixed number of operations, each uniform and independent, all at one magnitude.

    References:
        Cubuk, Zoph, Shlens, Le, `RandAugment <https://arxiv.org/abs/1909.13719>`_, 2019, figure 2.
    """

    operations: int
    magnitude: int

    def draw(self, draws: SampleDraws, epoch: int, epochs: int) -> Drawn:  # noqa: ARG002
        """Return ``operations`` operations per image."""
        kinds = _codes(RANDAUGMENT)[draws.integers(len(RANDAUGMENT.operations), Use.KINDS, self.operations)]
        return Drawn(kinds, np.full_like(kinds, self.magnitude), RANDAUGMENT)


@dataclass(frozen=True)
class _PolicyTable:
    """The policies of a schedule as arrays ``[segments, most operations]``; missing operations have chance 0."""

    kinds: IntArray
    levels: IntArray
    chances: FloatArray
    segment_of: IntArray  # each epoch's segment


@functools.lru_cache(maxsize=32)
def _policy_table(schedule: Schedule, epochs: int) -> _PolicyTable:
    segments = schedule.stretched(epochs).segments
    shape = (len(segments), max(len(one.policy.ops) for one in segments))
    kinds, levels, chances = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape)
    for row, segment in enumerate(segments):
        for column, op in enumerate(segment.policy.ops):
            kinds[row, column] = PBA_OPERATIONS.index(op.name)
            levels[row, column], chances[row, column] = op.magnitude, op.probability
    return _PolicyTable(kinds, levels, chances, np.repeat(np.arange(shape[0]), [one.epochs for one in segments]))


def _walk(table: _PolicyTable, segments: IntArray, draws: SampleDraws) -> Drawn:
    """Return up to two operations per image. ``segments``: one for all images, or one per image."""
    kinds, levels, chances = table.kinds[segments], table.levels[segments], table.chances[segments]
    width = kinds.shape[1]
    if width == 0 or not chances.any():
        return NoDraws().draw(draws, 0, 1)
    # Firing does not depend on the order, so the walk ends with the first `allowed` of those that fire, shuffled.
    last = np.iinfo(np.int64).max
    fires = draws.uniform(Use.FIRES, width) < chances
    turns = np.where(fires, (draws.words(Use.TURNS, width) >> np.uint64(2)).astype(np.int64), last)
    allowed = np.searchsorted(COUNT_EDGES, draws.uniform(Use.COUNT, 1)[:, 0], side="right")
    rows = np.arange(len(draws))
    of_row = rows if len(segments) > 1 else np.zeros_like(rows)
    rounds = min(MOST_OPERATIONS, width)
    drawn = np.full((len(draws), rounds), NONE), np.zeros((len(draws), rounds), np.int64)
    for index in range(rounds):
        chosen = turns.argmin(axis=1)
        is_used = (turns[rows, chosen] < last) & (index < allowed)
        drawn[0][:, index] = np.where(is_used, kinds[of_row, chosen], NONE)
        drawn[1][:, index] = levels[of_row, chosen]
        turns[rows, chosen] = last
    return Drawn(*drawn)


@functools.lru_cache(maxsize=8)
def _codes(space: Space) -> IntArray:
    """Return for each operation of a space its position in ``PBA_OPERATIONS``, or ``NONE``."""
    names = (PBA_OPERATIONS.index(name) if name in PBA_OPERATIONS else NONE for name in space.operations)
    return np.array(list(names), dtype=np.int64)
