"""Reasons for the outcome of a comparison of agents: how strong the found schedules are, how noisy their searches."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy import stats

from qkd.agents import Policy, Schedule, read_schedule_file

Row = Mapping[str, Any]
LEVELS = 9  # the highest magnitude


def search_facts(folder: Path, role: str) -> dict[str, Any]:
    """Return the outcome of a role's search, from the files in its run's ``search`` folder.

    Args:
        folder: Contains ``ROLE.schedule.yaml``, ``ROLE.population.jsonl`` and ``ROLE.cost.json``.
        role: The role.
    """
    found = read_schedule_file(folder / f"{role}.schedule.yaml")
    turns = [json.loads(line) for line in (folder / f"{role}.population.jsonl").read_text().splitlines()]
    cost = json.loads((folder / f"{role}.cost.json").read_text())
    strengths = epoch_strengths(found.schedule)
    images = found.provenance["settings"]["val_images"]
    return {
        "val_accuracy": found.provenance["val_accuracy"],
        "seconds": round(cost["seconds"], 1),
        "trained_images": cost["run"]["trained_images"],
        "validated_images": cost["run"]["validated_images"],
        "segments": len(found.schedule.segments),
        "strength_by_epoch": [round(value, 5) for value in strengths],
        "strength_by_third": [round(value, 5) for value in thirds(strengths)],
        **search_noise(turns, images),
    }


def strength(policy: Policy) -> float:
    """Return the mean over a policy's operations of probability times magnitude, both 0..1; 0 without operations."""
    return statistics.fmean(op.probability * op.magnitude / LEVELS for op in policy.ops) if policy.ops else 0.0


def epoch_strengths(schedule: Schedule) -> list[float]:
    """Return the strength of a schedule's policy in each epoch."""
    return [strength(segment.policy) for segment in schedule.segments for _ in range(segment.epochs)]


def thirds(values: Sequence[float]) -> list[float]:
    """Return the means of the first, second and last third; neighbors share values if not divisible by three."""
    n = len(values)
    means = []
    for index in range(3):
        low, high = index * n / 3, (index + 1) * n / 3
        weights = [max(0.0, min(high, at + 1) - max(low, at)) for at in range(n)]
        means.append(sum(map(lambda a, b: a * b, weights, values)) / sum(weights))
    return means


def search_noise(turns: Sequence[Row], val_images: int) -> dict[str, Any]:
    """Return how far apart the members of a population are, and how far apart chance alone would put them.

    Args:
        turns: The lines of a ``population.jsonl``: one per member and round.
        val_images: Images that score a member.

    Returns:
        ``last_scores`` of the last round in which all members took part (except those that diverged), their standard
        deviation ``spread``, the standard deviation of one binomial score at their mean (``chance``), and
        ``kept_rank``, the mean rank correlation between the scores of neighboring rounds, of the members that continued
        unchanged.
    """
    rounds: dict[int, dict[int, Row]] = {}
    for turn in turns:
        if not turn["diverged"] and turn["val_accuracy"] is not None:
            rounds.setdefault(turn["round"], {})[turn["member"]] = turn
    size = max(len(members) for members in rounds.values())
    full = max(number for number, members in rounds.items() if len(members) == size)
    scores = [turn["val_accuracy"] for turn in rounds[full].values()]
    mean = statistics.fmean(scores)
    kept = []
    for before, after in pairwise(sorted(rounds)):
        same = [member for member, turn in rounds[after].items() if not turn["copied"] and member in rounds[before]]
        pair = [[rounds[number][member]["val_accuracy"] for member in same] for number in (before, after)]
        kept.append(rank_correlation(*pair))
    known = [value for value in kept if value is not None]
    return {
        "last_scores": scores,
        "spread": round(statistics.stdev(scores), 5) if len(scores) > 1 else None,
        "chance": round(math.sqrt(mean * (1 - mean) / val_images), 5),
        "kept_rank": round(statistics.fmean(known), 3) if known else None,
    }


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None for fewer than three pairs, or if one side does not vary."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return round(float(stats.spearmanr(first, second).statistic), 4)


def reasons(rows: Sequence[Row], searches: Sequence[Row]) -> dict[str, Any]:
    """Return how well scores on validation images predict accuracies on test images.

    Args:
        rows: One per arm and seed.
        searches: One per role and seed.

    Returns:
        ``teacher_search`` and ``student_search``: the search's score against the accuracy of what was trained with its
        schedule, over the seeds. ``validation``: over the arms of a seed, averaged over the seeds.
    """
    good = [row for row in rows if "failed" not in row]
    found: dict[str, Any] = {}
    for role in ("teacher", "student"):
        ends = {row["seed"]: row[f"{role}_accuracy"] for row in good if row["arm"] == "role_wise"}
        pairs = [(one["val_accuracy"], ends[one["seed"]]) for one in searches
                 if one["role"] == role and one["seed"] in ends]  # fmt: skip
        value = rank_correlation([score for score, _ in pairs], [end for _, end in pairs])
        found[f"{role}_search"] = {"rank_correlation": value, "n": len(pairs)}
    values, n = [], 0
    for seed in sorted({row["seed"] for row in good}):
        own = [row for row in good if row["seed"] == seed and row["student_val_accuracy"] is not None]
        value = rank_correlation([r["student_val_accuracy"] for r in own], [r["student_accuracy"] for r in own])
        n += len(own)
        values += [] if value is None else [value]
    mean = round(statistics.fmean(values), 4) if values else None
    return {**found, "validation": {"rank_correlation": mean, "n": n}}
