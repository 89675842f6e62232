"""The search stage: the schedules of both agents, as files; the student's is searched here, if requested."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkd.agents import build_agent, read_schedule_file, save_schedule
from qkd.failures import UsageError
from qkd.files import delete_file, read_json, write_json
from qkd.progress import Progress
from qkd.roles.agents import Role, role_agent, schedule_file, searcher
from qkd.roles.images import run_images
from qkd.roles.stored import SCHEDULE_HASH, schedule_mark
from qkd.run.folder import RunFolder
from qkd.search.role_search import search_agent
from qkd.training import cpu_threads

NOTE = "the agents are those named in the config; no search was run"
ROLES: tuple[Role, ...] = ("teacher", "student")


def run(run: RunFolder, progress: Progress) -> None:
    """Search the agents whose policy is ``search``, and write what each agent does in each epoch to ``search/``.

    The teacher's search comes before the teacher's training, which runs it if it is needed; the student's runs here.
    Each agent that has a schedule gets a ``ROLE.schedule.yaml``; ``result.json`` describes both. (An agent like
    TrivialAugment or RandAugment draws new operations for every image, and has no schedule.)

    Raises:
        UsageError: If the student's agent is to be searched and there is no teacher yet, or a schedule file has changed
            since a net of this run was trained by it.
        qkd.search.SearchError: If a search's whole population diverges.
        ValueError: If an agent's policy or schedule file cannot be used, or a search's settings do not fit the data.
        OSError: If a file cannot be written.
    """
    folder = run.folder("search")
    with cpu_threads(run.config.threads):
        files = search_agent(run, "teacher", progress)
        _require_teacher(run)
        files += search_agent(run, "student", progress)
    searched = run.config.searched_roles
    note = f"searched: {' and '.join(searched)}" if searched else NOTE
    mean = run_images(run, progress).mean
    roles: dict[str, dict[str, Any]] = {role: _describe(run, role, mean, progress) for role in ROLES}
    files += [folder / facts["schedule"] for facts in roles.values() if facts["schedule"]]
    result = folder / "result.json"
    write_json(result, {"searched": bool(searched), "note": note, **roles})
    progress.say(note)
    run.complete("search", [*dict.fromkeys(files), result])


def _require_teacher(run: RunFolder) -> None:
    why = run.why_incomplete("teacher")
    if "student" in run.config.searched_roles and why:
        found = "the teacher's agent is found, but " if "teacher" in run.config.searched_roles else ""
        raise UsageError(
            f"{found}the student's search distills from the teacher of {run.path}, which is missing ({why}); run "
            f"`qkd teacher` with the same config first, or `qkd run` for all stages"
        )


def _require_same_schedule(run: RunFolder, role: Role, file: Path, now: str) -> None:
    """Raise if a role was trained by an earlier version of its schedule file: the record would be of another one."""
    trained = {"teacher": "teacher", "student": "distill"}[role]
    then = read_json(run.path / role / "result.json").get(SCHEDULE_HASH) if run.is_complete(trained) else None
    if then not in (None, now):
        raise UsageError(
            f"{role}.agent.schedule: {file} has changed since this run's {role} was trained by it; restore it, or "
            f"train another one (name=...)"
        )


def _describe(run: RunFolder, role: Role, mean: Sequence[float], progress: Progress) -> dict[str, Any]:
    """Write a role's schedule if no search has; return what ``result.json`` says about the role."""
    config, settings = run.config, role_agent(run, role)
    train = config.student.train if role == "student" else config.teacher.train or config.student.train
    agent = build_agent(settings, epochs=train.epochs, mean=mean)
    facts: dict[str, Any] = {"agent": agent.describe(), "epochs": train.epochs, "schedule": None}
    origin = searcher(config, role)
    if origin in config.searched_roles:
        found = read_schedule_file(schedule_file(run.path, origin)).provenance
        facts["agent"] = f"found by the {origin}'s search{facts['agent'].removeprefix(settings.policy)}"
        facts["search"] = {"role": origin, "val_accuracy": found["val_accuracy"], "member": found["member"]}
    progress.say(f"{role}: {facts['agent']}")
    path = schedule_file(run.path, role)
    if origin not in config.searched_roles and settings.schedule is not None:
        facts |= schedule_mark(settings)
        _require_same_schedule(run, role, settings.schedule, facts[SCHEDULE_HASH])
    if role in config.searched_roles:
        return {**facts, "schedule": path.name}
    schedule = agent.schedule(train.epochs)
    if schedule is None:
        delete_file(path)
        return facts
    is_shared = origin != role and origin in config.searched_roles
    policy = config.student.agent.policy if role == "student" else config.teacher.agent.policy
    provenance: dict[str, Any] = {"policy": policy, "searched": is_shared}
    save_schedule(schedule, path, role=role, provenance=provenance)
    return {**facts, "schedule": path.name}
