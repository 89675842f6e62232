"""The results of a search: the schedule with its provenance, the population's log, the cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkd.agents import Schedule, save_schedule
from qkd.files import write_json, write_text
from qkd.search.board import scores
from qkd.search.cost import CostReport
from qkd.search.journal import Journal, policy_rows
from qkd.search.population import best_member, lineage


def write_search(journal: Journal, folder: Path, provenance: Mapping[str, Any], cost: CostReport) -> list[Path]:
    """Write ``ROLE.schedule.yaml``, ``ROLE.population.jsonl`` and ``ROLE.cost.json``.

    The schedule and the log contain no times, so the same search gives the same files.

    Args:
        journal: A finished search.
        folder: Where to write them.
        provenance: The inputs of the search: seed, hashes, settings.
        cost: Its cost.

    Returns:
        Their paths, in that order.

    Raises:
        SearchError: If every member has diverged in the last round.
        ValueError: If the search is not done.
        OSError: If a file cannot be written.
    """
    if not journal.is_done:
        raise ValueError(
            f"the {journal.role}'s search is not done: {len(journal.turns())} turns of this round are still open"
        )
    best = best_member(journal.rounds)
    line = lineage(journal.rounds, best)
    found = {
        "policy": "search",
        "searched": True,
        **provenance,
        "member": best,
        "val_accuracy": scores(line)[-1],
        "lineage": [member.index for member in line],
        "lineage_val_accuracy": scores(line),
        "best_val_accuracy": [max(scores(population)) for population in journal.rounds],
        "mean_val_accuracy": [sum(scores(population)) / len(scores(population)) for population in journal.rounds],
        "epochs_of_rounds": list(journal.lengths),
    }
    names = {kind: folder / f"{journal.role}.{kind}" for kind in ("schedule.yaml", "population.jsonl", "cost.json")}
    save_schedule(found_schedule(journal), names["schedule.yaml"], role=journal.role, provenance=found)
    write_text(names["population.jsonl"], population_log(journal))
    write_json(names["cost.json"], cost.to_json())
    return list(names.values())


def found_schedule(journal: Journal) -> Schedule:
    """Return the schedule that the best member of a search went through."""
    return journal.schedule(best_member(journal.rounds))


def population_log(journal: Journal) -> str:
    """Return JSON lines, one per turn: round, member, the state it continued from, its policy and its outcome."""
    lines = []
    for number, population in enumerate(journal.rounds):
        for member in population:
            if member.rests and member.score is None:
                continue
            score = member.score
            lines.append({
                "round": number,
                "epoch": sum(journal.lengths[: number + 1]),
                "member": member.index,
                "from": member.source if number else None,
                "copied": member.is_copy,
                "val_accuracy": score.accuracy if score else None,
                "diverged": bool(score and score.is_diverged),
                "ops": policy_rows(member.policy),
            })  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)
