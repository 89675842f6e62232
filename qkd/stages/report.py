"""The report stage: the results of the run as one HTML page and one text file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qkd.agents import Schedule, load_schedule, read_schedule_file
from qkd.agents.policies.policy import LEVELS
from qkd.agents.policies.spaces import BINS
from qkd.config import AgentConfig, RunConfig
from qkd.config.training import TrainConfig
from qkd.files import write_text
from qkd.methods.data_free.making.pictures import made_histogram, made_pictures
from qkd.predicting.predictions import GALLERY, PREDICTIONS
from qkd.progress import Progress, duration
from qkd.report import RunRecord, SearchRecord, read_json, render_page, render_text, summarize
from qkd.report.findings.gallery import read_gallery
from qkd.report.records import read_metrics
from qkd.report.stacks import schedule_picture
from qkd.roles.agents import Role, named_agent
from qkd.run.folder import RunFolder
from qkd.units import times_as_many

METRICS = {"teacher": "teacher", "generator": "generator", "float twin": "student/float", "student": "student"}


def run(run: RunFolder, progress: Progress) -> None:  # noqa: ARG001 - every stage takes both arguments
    """Write ``report.html`` and ``report.md`` from the files of the other stages.

    Raises:
        ValueError: If one of these files is damaged.
        OSError: If a report cannot be written.
    """
    summary = summarize(run.path)
    record = gather(run)
    write_text(run.path / "report.html", render_page(summary, record))
    write_text(run.path / "report.md", render_text(summary, searches=record.searches, agents=record.agents))
    inputs = (
        sorted((run.path / "export").glob("*.json"))
        + sorted(run.path.glob("**/metrics.jsonl"))
        + sorted(run.path.glob("**/result.json"))
    )
    inputs += sorted(run.path.glob("**/samples/*.npz")) + sorted((run.path / "export").glob("*.npz"))
    inputs += sorted((run.path / "bench").glob("*.json")) + [
        path for kind in ("yaml", "cost.json") for path in sorted((run.path / "search").glob(f"*.{kind}"))
    ]
    inputs += [path for path in (run.path / "config.yaml", run.manifest_file("bench")) if path.is_file()]
    run.complete("report", [run.path / "report.html", run.path / "report.md"], inputs)


def gather(run: RunFolder) -> RunRecord:
    """Return what the page shows in addition to the summary, from a run's files."""
    files = {role: run.path / folder / "metrics.jsonl" for role, folder in METRICS.items()}
    settings = read_json(run.path / "search" / "result.json")
    predictions = read_json(run.path / "export" / PREDICTIONS)
    schedules = _schedules(run.path / "search", run.config)
    words = {role: settings.get(role) for role in ("teacher", "student")}
    metrics = {role: read_metrics(file) for role, file in files.items() if file.is_file()}
    return RunRecord(
        metrics={role: lines for role, lines in metrics.items() if lines or role != "generator"},
        pictures=made_pictures(run.path),
        histogram=made_histogram(run.path),
        schedules=_drawings(schedules, run.config),
        stacks=_stacks(schedules),
        agents={role: str(value.get("agent", "")) for role, value in words.items() if isinstance(value, Mapping)},
        searches={role: record for role in run.config.searched_roles if (record := read_search(run.path, role))},
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
        environment=read_json(run.path / "environment.json"),
        gallery=read_gallery(run.path / "export" / GALLERY, predictions.get("classes", [])),
    )


def read_search(run_path: Path, role: str) -> SearchRecord | None:
    """Return the outcome of a role's search, from its files; None if it left none.

    Args:
        run_path: The run folder.
        role: The role whose agent was searched.

    Raises:
        ValueError: If a file is damaged.
    """
    folder = run_path / "search"
    if not (folder / f"{role}.schedule.yaml").is_file():
        return None
    found = read_schedule_file(folder / f"{role}.schedule.yaml").provenance
    cost = read_json(folder / f"{role}.cost.json")
    return SearchRecord(
        epochs=tuple(itertools.accumulate(found["epochs_of_rounds"])),
        best=found["best_val_accuracy"],
        mean=found["mean_val_accuracy"],
        chosen=found["lineage_val_accuracy"],
        cost=_search_cost(role, cost) if cost else "",
    )


def _search_cost(role: str, cost: Mapping[str, Any]) -> str:
    run = cost["run"]
    return (
        f"The {role}'s search trained on {run['trained_images']:,} images and validated {run['validated_images']:,} in "
        f"{duration(cost['seconds'])}. Scoring after every epoch, as published, would have validated "
        f"{times_as_many(cost['run_validates_less_by'])}; in the published setting "
        f"({cost['published']['validated_images'] / 1e6:.0f} million images) it is "
        f"{cost['published_validates_more_by']:.2f} times."
    )


def draw_agent(agent: AgentConfig, epochs: int, schedule: Schedule | None) -> dict[str, list[float]]:
    """Return how strongly an agent acts in each epoch: its schedule's operations, then the fixed ones after them.

    Args:
        agent: The role's agent.
        epochs: Length of its training.
        schedule: What it does before crop, flip and cut-out; None if it draws new operations for every image.
    """
    rows: dict[str, float] = {}
    if agent.policy == "trivial":
        rows["1 drawn operation"] = 0.5  # any magnitude, so half of the strength on average
    elif agent.policy == "randaugment":
        rows[f"{agent.operations} drawn operations"] = agent.magnitude / (BINS - 1)
    if agent.policy != "none":
        rows |= {f"crop, padding {agent.crop_padding}": 1.0} if agent.crop_padding else {}
        rows |= {"flip": 0.5} if agent.flip and agent.policy != "crop" else {}
        rows |= {f"cut-out {agent.cutout}": 1.0} if agent.cutout else {}
    constant = {name: [value] * epochs for name, value in rows.items()}
    return {**(strengths(schedule) if schedule else {}), **constant}


def strengths(schedule: Schedule) -> dict[str, list[float]]:
    """Return how strongly each operation acts in each epoch: probability times magnitude, scaled to 0..1.

    Args:
        schedule: Policies over epochs. If a policy holds an operation twice, the stronger one counts.
    """
    rows: dict[str, list[float]] = {}
    done = 0
    for segment in schedule.segments:
        for op in segment.policy.ops:
            row = rows.setdefault(op.name, [0.0] * schedule.epochs)
            value = op.probability * (op.magnitude + 1) / LEVELS
            for epoch in range(done, done + segment.epochs):
                row[epoch] = max(row[epoch], value)
        done += segment.epochs
    return dict(sorted(rows.items()))


def _schedules(folder: Path, config: RunConfig) -> dict[str, Schedule]:
    """Return the schedules of the search stage, stretched to the trainings that follow them."""
    found = {}
    for role, train in (("teacher", config.teacher.train), ("student", config.student.train)):
        if (file := folder / f"{role}.schedule.yaml").is_file():
            schedule = load_schedule(file)
            found[role] = schedule if train is None else schedule.stretched(train.epochs)
    return found


def _stacks(schedules: Mapping[str, Schedule]) -> dict[str, Markup]:
    """Return the pictures of the schedules that hold an operation: role -> SVG."""
    return {
        role: schedule_picture(f"{role}'s schedule", schedule).inline()
        for role, schedule in schedules.items()
        if any(segment.policy.ops for segment in schedule.segments)
    }


def _drawings(schedules: Mapping[str, Schedule], config: RunConfig) -> dict[str, dict[str, list[float]]]:
    trained: dict[Role, TrainConfig | None] = {"teacher": config.teacher.train, "student": config.student.train}
    return {
        role: draw_agent(named_agent(config, role), train.epochs, schedules.get(role))
        for role, train in trained.items()
        if train is not None
    }
