"""The search stage: the schedules of both agents, as files."""

from __future__ import annotations

from pathlib import Path

from qkd.agents import Agent, build_agent, save_schedule
from qkd.data import load_splits
from qkd.files import write_json
from qkd.progress import Progress
from qkd.rundir import RunFolder

NOTE = "the agents are those that the config names; no search was run"


def run(run: RunFolder, progress: Progress) -> None:
    """Write what each agent does, epoch by epoch, to ``search/``.

    A ``ROLE.schedule.yaml`` for each agent that has a schedule; ``result.json`` describes both. (A TrivialAugment- or
    RandAugment-like agent draws operations anew for every image, and has none.)

    Raises:
        ValueError: If an agent's policy or schedule file cannot be used.
        OSError: If a file cannot be written.
    """
    config = run.config
    mean = load_splits(config.data, seed=config.seed).mean
    folder = run.folder("search")
    student_epochs = config.student.train.epochs
    teacher_epochs = config.teacher.train.epochs if config.teacher.train else student_epochs
    files: list[Path] = []
    roles: dict[str, object] = {}
    for role, settings, epochs in (
        ("teacher", config.teacher.agent, teacher_epochs),
        ("student", config.student.agent, student_epochs),
    ):
        agent = build_agent(settings, epochs=epochs, mean=mean)
        path = _write_schedule(agent, role, settings.policy, epochs, folder)
        files += [path] if path else []
        roles[role] = {"agent": agent.describe(), "epochs": epochs, "schedule": path.name if path else None}
        progress.say(f"{role}: {agent.describe()}")
    result = folder / "result.json"
    write_json(result, {"searched": False, "note": NOTE, **roles})
    progress.say(NOTE)
    run.complete("search", [*files, result])


def _write_schedule(agent: Agent, role: str, policy: str, epochs: int, folder: Path) -> Path | None:
    schedule = agent.schedule(epochs)
    path = folder / f"{role}.schedule.yaml"
    if schedule is None:
        path.unlink(missing_ok=True)
        return None
    save_schedule(schedule, path, role=role, provenance={"policy": policy, "searched": False})
    return path
