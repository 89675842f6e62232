"""Members of a population and its rounds as values: who continues, who copies whom, and a member's schedule.

Errors: :class:`SearchError` (a ``RuntimeError``) ends a search that cannot continue.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qkd.agents import Policy, Schedule, Segment
from qkd.search.space import explore, start_policy
from qkd.seeding import derive

QUANTILE = 0.25  # share that copies others, and share that is copied
ROUNDS_FOR_A_FINAL = 3  # with fewer, no explored policy would be tried before the final
_DIVERGED = (
    "every member of the population has diverged; lower train.lr, raise train.warmup_epochs or set "
    "train.clip_grad_norm of the searched role, and give the run another name"
)


class SearchError(RuntimeError):
    """A search cannot continue or has found nothing."""


@dataclass(frozen=True)
class Score:
    """The outcome of a member's round.

    Args:
        accuracy: Share of the validation images that it classifies correctly; 0 if it diverged.
        is_diverged: Whether the loss or weights were not finite.
        state_sha256: SHA-256 of the file that holds its state; empty if it diverged.
        trained_images: Images used in its training steps in this round.
        validated_images: Images read to score it.
        seconds: Time spent on it.
    """

    accuracy: float
    is_diverged: bool
    state_sha256: str
    trained_images: int
    validated_images: int
    seconds: float


@dataclass(frozen=True)
class Member:
    """One member in one round.

    Args:
        index: Its index in the population, from 0.
        policy: What its agent does in this round.
        source: Index of the member from whose last state it continues: its own, or the one it copied.
        score: Its score; None before the round is done.
        rests: Whether it is left out; in the last round, only members of the top quarter continue.
    """

    index: int
    policy: Policy
    source: int
    score: Score | None = None
    rests: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether it gave up its own state for another's."""
        return self.source != self.index


Round = tuple[Member, ...]


def first_round(members: int) -> Round:
    """Return the population before training: every policy is the start policy.

    Args:
        members: Number of members, at least 1.

    Returns:
        Members 0, 1, ... without scores.
    """
    return tuple(Member(index, start_policy(), index) for index in range(members))


def quantiles(population: Round) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the indices of the members that copy, and of those that may be copied.

    Each is a quarter of the population, rounded up, but at most half of it (16 members: 4 and 4); a single member has
    nobody to copy. Among equal scores, the lower index is better. Members that diverged always copy and are never
    copied.

    Args:
        population: A round with all scores.

    Returns:
        ``(bottom, top)``; the best member comes first in ``top``.

    Raises:
        SearchError: If every member has diverged.
        ValueError: If a score is missing.
    """
    if any(member.score is None for member in population):
        raise ValueError("the quantiles need the scores of all members")
    ranked = sorted(population, key=lambda member: (_accuracy(member), -member.index))
    size = quantile_size(len(ranked))
    healthy = [member.index for member in ranked if member.score is not None and not member.score.is_diverged]
    if not healthy:
        raise SearchError(_DIVERGED)
    sick = [member.index for member in ranked if member.index not in healthy]
    top = tuple(reversed(healthy[-max(size, 1) :])) if size or sick else ()
    bottom = [member.index for member in ranked[:size] if member.index not in sick]
    return tuple(index for index in (*sick, *bottom) if index not in top), top


def quantile_size(members: int) -> int:
    """Return how many members copy, and how many may be copied: a quarter rounded up, at most half."""
    return min(math.ceil(members * QUANTILE), members // 2)


def next_round(population: Round, *, seed: int, role: str, number: int) -> Round:
    """Return the next round: exploit, then explore.

    Each member of the bottom quarter copies the state and policy of a uniformly random member of the top quarter, and
    its copy of the policy is explored; all others continue unchanged.

    Args:
        population: A round with all scores.
        seed: The run's seed.
        role: ``teacher`` or ``student``; names the random draws.
        number: Number of the finished round, from 0.

    Returns:
        The same number of members, without scores.

    Raises:
        SearchError: If every member has diverged.
        ValueError: If a score is missing.

    Note:
        The published searches are asynchronous: a member is compared when it passes the interval, with the others
        at whatever point they have reached. Here all members finish a round first, so that the outcome does not depend
        on their speed.
    """
    bottom, top = quantiles(population)
    following = []
    for member in population:
        if member.index not in bottom:
            following.append(Member(member.index, member.policy, member.index))
            continue
        rng = random.Random(derive(seed, "search", role, "perturb", number, member.index))
        donor = population[rng.choice(sorted(top))]
        following.append(Member(member.index, explore(donor.policy, rng), donor.index))
    return tuple(following)


def last_round(population: Round) -> Round:
    """Return the last round: members of the top quarter continue unchanged, all others rest.

    Nothing is copied after it, so only members that can be chosen are worth training and scoring; a member that has
    just explored has had no time to prove its policy.

    Args:
        population: The previous round, with all scores.

    Raises:
        SearchError: If every member has diverged.
        ValueError: If a score is missing.
    """
    _, top = quantiles(population)
    finalists = top or tuple(member.index for member in population)
    return tuple(
        Member(member.index, member.policy, member.index, rests=member.index not in finalists) for member in population
    )


def finalists_of(members: int, rounds: int) -> int:
    """Return how many members take a turn in the last round: the top quarter, or all if there are only two rounds.

    Args:
        members: Size of the population.
        rounds: Rounds of the search.
    """
    return quantile_size(members) if rounds >= ROUNDS_FOR_A_FINAL else members


def waiting(population: Round) -> list[int]:
    """Return the indices of members still to take a turn; resting ones are used if all others have diverged."""
    active = [member for member in population if not member.rests]
    is_lost = all(member.score is not None and member.score.is_diverged for member in active)
    return [member.index for member in (population if is_lost else active) if member.score is None]


def best_member(history: Sequence[Round]) -> int:
    """Return the index of the best member of the last round.

    The highest accuracy wins; among equal ones, the highest mean along the lineage, then the lowest index. (The rule
    of the published releases is not in their code.)

    Args:
        history: Rounds in order, the last one with all scores.

    Returns:
        Its index, from 0.

    Raises:
        SearchError: If every member has diverged.
    """
    healthy = [member.index for member in history[-1] if member.score is not None and not member.score.is_diverged]
    if not healthy:
        raise SearchError(_DIVERGED)

    def merit(index: int) -> tuple[float, float, int]:
        line = lineage(history, index)
        return _accuracy(line[-1]), sum(map(_accuracy, line)) / len(line), -index

    return max(healthy, key=merit)


def lineage(history: Sequence[Round], index: int) -> tuple[Member, ...]:
    """Return the members, one per round, whose states led to a member's state in the last round.

    Args:
        history: Rounds in order; a member's ``source`` points into the round before.
        index: Index of the member in the last round, from 0.

    Returns:
        One member per round, starting with the first round.

    Raises:
        IndexError: If no member of the last round has that index.
    """
    line = []
    for population in reversed(history):
        line.append(population[index])
        index = population[index].source
    return tuple(reversed(line))


def schedule_of(line: Sequence[Member], lengths: Sequence[int]) -> Schedule:
    """Return the schedule that a lineage went through; neighbors with the same policy become one segment.

    Args:
        line: One member per round.
        lengths: Epochs of each round.

    Returns:
        Segments of epochs and policy, in order.

    Raises:
        ValueError: If the numbers of lengths and members differ.
    """
    segments: list[Segment] = []
    for member, epochs in zip(line, lengths, strict=True):
        if segments and segments[-1].policy == member.policy:
            segments[-1] = Segment(segments[-1].epochs + epochs, member.policy)
        else:
            segments.append(Segment(epochs, member.policy))
    return Schedule(tuple(segments))


def round_lengths(epochs: int, interval_epochs: int) -> tuple[int, ...]:
    """Return the epochs of each round: the interval, and the remainder for the last one."""
    whole, rest = divmod(epochs, interval_epochs)
    return (interval_epochs,) * whole + ((rest,) if rest else ())


def with_score(population: Round, index: int, score: Score) -> Round:
    """Return the round with one member's score filled in."""
    return tuple(replace(member, score=score) if member.index == index else member for member in population)


def _accuracy(member: Member) -> float:
    return member.score.accuracy if member.score is not None else 0.0
