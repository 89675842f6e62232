"""The table of a comparison of arms: spreads, paired tests, and rendering as Markdown and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats
from stage_runs import spread

from qkd.report.drawing import CURVES, Picture, clean, dot, drawing, new_figure, note, panel, write
from qkd.report.table import markdown
from qkd.units import percent

Row = Mapping[str, Any]
LEVEL = 0.95  # of the confidence interval of a paired difference


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, float | int | None]:
    """Return the paired t-test of two arms over the seeds that both have.

    Args:
        ours: Accuracy by seed.
        theirs: Accuracy of the other arm by seed.

    Returns:
        ``n`` pairs, the ``difference`` of the means, its ``stdev``, the ``half_width`` of its 95% confidence interval,
        and the two-sided ``p``. None for those that need more pairs, or spread among them.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    n = len(differences)
    result: dict[str, float | int | None] = {"n": n, "difference": None, "stdev": None, "half_width": None, "p": None}
    if not n:
        return result
    result["difference"] = round(statistics.mean(differences), 6)
    if n < 2 or max(differences) - min(differences) < 1e-12:
        return result
    deviation = statistics.stdev(differences)
    width = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    test = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    return {**result, "stdev": round(deviation, 6), "half_width": round(width, 6), "p": round(float(test.pvalue), 5)}


def summarize(rows: Sequence[Row], arms: Sequence[str], *, plain: str, fixed: Sequence[str]) -> dict[str, Any]:
    """Return the best fixed policy, and each arm's spread, costs and paired tests.

    Args:
        rows: One per arm and seed; failed ones have ``failed``.
        arms: Names, in the order of the table.
        plain: The arm that every other is compared with.
        fixed: Arms of which the one with the highest mean is the second rival. It is chosen by the accuracies that it
            are then compared, which favors it.
    """
    scores = {name: _by_seed(rows, name, "student_accuracy") for name in arms}
    means = {name: statistics.mean(scores[name].values()) for name in fixed if scores.get(name)}
    best = max(means, key=lambda name: means[name]) if means else None
    return {"plain": plain, "best_fixed": best, "summary": {
        name: {
            **spread(list(scores[name].values())),
            "failed": sum("failed" in row for row in rows if row["arm"] == name),
            "teacher": spread(list(_by_seed(rows, name, "teacher_accuracy").values())),
            **{key: _mean(rows, name, key) for key in ("student_seconds", "search_seconds", "search_trained_images",
                                                      "search_validated_images")},
            "against": {rival: paired(scores[name], scores.get(rival, {})) for rival in dict.fromkeys((plain, best))
                        if rival is not None and rival != name},
        }
        for name in arms
    }}  # fmt: skip


def render(record: Mapping[str, Any]) -> str:
    """Return a record of ``role_agents.py`` as Markdown."""
    parts = ["# Augmentation agents compared", _setting(record), markdown(_arm_table(record)), _legend(record)]
    parts += ["## Seed by seed", markdown(_seed_table(record))]
    if record["searches"]:
        parts += ["## The searches", markdown(_search_table(record)), SEARCH_NOTE]
    parts += ["## What the scores are worth", *_reason_lines(record["reasons"])]
    return "\n\n".join(parts) + "\n"


def _by_seed(rows: Sequence[Row], name: str, key: str) -> dict[int, float]:
    return {row["seed"]: row[key] for row in rows if row["arm"] == name and "failed" not in row}


def _mean(rows: Sequence[Row], name: str, key: str) -> float | None:
    values = list(_by_seed(rows, name, key).values())
    return round(statistics.mean(values), 1) if values else None


def _setting(record: Mapping[str, Any]) -> str:
    one, where, search = record["settings"], record["environment"], record["settings"]["search"]
    extra = f" (with {' '.join(record['overrides'])})" if record["overrides"] else ""
    times = f" {record['task_seconds'] / 60:.0f} minutes of runs," if record.get("task_seconds") else ""
    wall = f" {record['wall_seconds'] / 60:.0f} minutes by the clock," if record.get("wall_seconds") else ""
    return (
        f"`{record['config']}`{extra}: teacher {one['teacher_net']}, student {one['student_net']} "
        f"w{one['weight_bits']}a{one['act_bits']}, {one['train_images'] or 'all'} training images, "
        f"{one['teacher_epochs']} and {one['student_epochs']} epochs, batch {one['batch_size']}; a search: "
        f"{search['members']} members, {search['epochs']} epochs of {search['train_images']} images, scored every "
        f"{search['interval_epochs']} by {search['val_images'] or 'the validation'} images. Seeds "
        f"{', '.join(map(str, record['seeds']))};{times}{wall} {record['jobs']} side by side, one thread each, on "
        f"{where['cpu']}, PyTorch {where['torch']}, Brevitas {where['brevitas']}, {where['date']}."
    )


def _arm_table(record: Mapping[str, Any]) -> list[list[str]]:
    rivals = [record["plain"], *([record["best_fixed"]] if record["best_fixed"] else [])]
    head = ["arm", "teacher's view", "n", "student", "teacher", *(f"against {rival} (p)" for rival in rivals),
            "training, s", "search, s", "search images"]  # fmt: skip
    return [head, *(_arm_cells(name, record, rivals) for name in record["summary"])]


def _arm_cells(name: str, record: Mapping[str, Any], rivals: Sequence[str]) -> list[str]:
    one = record["summary"][name]
    failed = f" ({one['failed']} failed)" if one["failed"] else ""
    images = one["search_trained_images"]
    read = f"{images:,.0f} + {one['search_validated_images']:,.0f}" if images else "-"
    return [
        name, record["arms"][name]["view"], f"{one['seeds']}{failed}", _plus_minus(one), _plus_minus(one["teacher"]),
        *(_against(one["against"].get(rival)) for rival in rivals),
        _number(one["student_seconds"]), _number(one["search_seconds"]) if one["search_seconds"] else "-", read,
    ]  # fmt: skip


def _plus_minus(one: Mapping[str, Any]) -> str:
    return f"{percent(one['mean'])} +- {100 * one['stdev']:.2f}" if one["seeds"] else "-"


def _against(test: Mapping[str, Any] | None) -> str:
    if test is None or test["difference"] is None:
        return "-"
    width = "" if test["half_width"] is None else f" +- {100 * test['half_width']:.2f}"
    return f"{100 * test['difference']:+.2f}{width} (p {'-' if test['p'] is None else format(test['p'], '.3f')})"


def _legend(record: Mapping[str, Any]) -> str:
    chosen = f", and with {record['best_fixed']}, the best fixed policy by these very means" * bool(
        record["best_fixed"]
    )
    return (
        "Student and teacher: mean and standard deviation of the test accuracies in percent (all test images, last "
        f"epoch). Each arm is compared seed by seed with {record['plain']}{chosen}: mean difference in points with the "
        "half width of its 95 % confidence interval, and p of a paired two-sided t-test, not corrected for the number "
        "of arms. Training: of the student, steps alone. Search: all searches that the arm uses, its own or shared "
        "with another arm, training and validation images."
    )


def _seed_table(record: Mapping[str, Any]) -> list[list[str]]:
    head = ["arm", "seed", "student", "teacher", "student on validation images", "failure"]
    return [head, *([row["arm"], str(row["seed"]), percent(row.get("student_accuracy")),
                     percent(row.get("teacher_accuracy")), percent(row.get("student_val_accuracy")),
                     row.get("failed", "")] for row in record["rows"])]  # fmt: skip


SEARCH_NOTE = (
    "Strength: mean over the operations of a policy of probability times magnitude (both 0..1), averaged over each "
    "third of the training. Spread: standard deviation of the members' scores at the end of the last round that all "
    "took part in; chance: what it would be if all members were equally good, from the number of validation images "
    "alone. Kept rank: mean rank correlation between the scores of neighboring rounds, of the members that continued "
    "unchanged."
)


def _search_table(record: Mapping[str, Any]) -> list[list[str]]:
    head = ["search", "seed", "score", "strength by thirds", "spread", "chance", "kept rank"]
    return [head, *([one["role"], str(one["seed"]), percent(one["val_accuracy"]),
                     " / ".join(f"{value:.3f}" for value in one["strength_by_third"]), percent(one["spread"]),
                     percent(one["chance"]), _number(one["kept_rank"], 2)] for one in record["searches"])]  # fmt: skip


def _reason_lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for text, key in (
        ("search's score and the test accuracy of the teacher trained with what it found", "teacher_search"),
        ("search's score and the test accuracy of the student distilled with what it found", "student_search"),
        ("accuracy on the validation images and on the test images, over the arms of a seed", "validation"),
    ):
        one = found[key]
        value = "too few" if one["rank_correlation"] is None else f"{one['rank_correlation']:+.2f}"
        lines.append(f"- Rank correlation of the {text}: {value} (n = {one['n']}).")
    return ["\n".join(lines)]


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


WIDTH, LEFT, RIGHT, TOP, STEP = 640, 130, 20, 30, 26
TITLE = "Test accuracy of the student by arm: seeds (dots), mean (bar)"


def draw(record: Mapping[str, Any]) -> str:
    """Return the accuracies by arm as an SVG picture: a dot for each seed, a bar for the mean."""
    arms = list(record["summary"])
    scores = {name: list(_by_seed(record["rows"], name, "student_accuracy").values()) for name in arms}
    values = [value for found in scores.values() for value in found] or [0.0, 1.0]
    margin = max(0.05 * (max(values) - min(values)), 0.001)
    with drawing():
        figure = new_figure(WIDTH, TOP + STEP * len(arms) + 28)
        write(figure, LEFT, 18, TITLE, weight="bold")
        axes = panel(figure, LEFT, TOP, WIDTH - LEFT - RIGHT, STEP * len(arms))
        axes.set(xlim=(min(values) - margin, max(values) + margin), ylim=(len(arms) - 0.5, -0.5))
        axes.set_yticks(range(len(arms)), [clean(name) for name in arms])
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: percent(value))
        axes.grid(axis="x")
        for row, name in enumerate(arms):
            for value in scores[name]:
                dot(axes, value, row, 4, 0, f"{name}: {percent(value)}")
            if scores[name]:
                mean = statistics.mean(scores[name])
                (bar,) = axes.plot([mean] * 2, [row - 0.35, row + 0.35], color=CURVES[1], linewidth=2)
                note(bar, f"{name}, mean: {percent(mean)}")
    return Picture(TITLE, figure).to_svg()
