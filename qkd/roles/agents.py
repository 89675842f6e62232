"""Each role's agent, replaced by what the run's own search found if it is searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from qkd.agents import read_schedule_file
from qkd.config import AgentConfig, RunConfig
from qkd.config.training import SAVING
from qkd.methods.table import method_mark
from qkd.nets.own.copies import change_nets, portable_net
from qkd.roles.stored import WEIGHTS_HASH, start_mark
from qkd.run.folder import RunFolder
from qkd.run.identity import leaves

UNLEARNED = {"weights", "run", "schedule", *SAVING}
Role = Literal["teacher", "student"]


def role_agent(run: RunFolder, role: Role) -> AgentConfig:
    """Return a role's agent for its training.

    ``search`` becomes the schedule file that the run's search wrote; ``teacher`` (the student's) becomes the teacher's
    policy, with the crop, flip and cut-out of the student's own agent.

    Args:
        run: The run.
        role: The role whose agent is returned.

    Raises:
        FileNotFoundError: If the search has not written its schedule yet.
    """
    agent = named_agent(run.config, role)
    if agent.policy != "search":
        return agent
    path = schedule_file(run.path, searcher(run.config, role))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stage that searches it first (qkd search)")
    return agent.model_copy(update={"policy": "file", "schedule": path})


def agent_to_train_with(run: RunFolder, role: Role) -> AgentConfig:
    """Return :func:`role_agent`, checked: the search that found it used the same files of the user as the training.

    Raises:
        FileNotFoundError: If the search has not written its schedule yet.
        ValueError: If the file of weights or the user's own method has changed since the search, or the schedule is
            damaged.
    """
    agent, config = role_agent(run, role), run.config
    if not agent_inputs(run, role) or searcher(config, role) != role:
        return agent
    found = read_schedule_file(schedule_file(run.path, role)).provenance
    own = config.teacher if role == "teacher" else config.student
    files: dict[str, tuple[object, object, object]] = {
        "weights": (own.weights, found.get(WEIGHTS_HASH), start_mark(config, role).get(WEIGHTS_HASH))
    }
    if role == "student":
        before = found.get("made_from", {}).get("method")
        files["method"] = (config.student.method, before, method_mark(config).get("method"))
    for key, (given, then, now) in files.items():
        if then not in (None, now):
            raise ValueError(
                f"{role}.{key}: {given} has changed since the search for this run's {role} agent used it; restore it, "
                f"or search again in another run (name=...)"
            )
    return agent


def named_agent(config: RunConfig, role: Role) -> AgentConfig:
    """Return a role's agent with ``teacher`` resolved to the teacher's policy; ``search`` is kept."""
    return config.teacher.agent if role == "teacher" else config.student_agent


def unsearched_agent(agent: AgentConfig) -> AgentConfig:
    """Return what a searched agent does besides its schedule (crop, flip and cut-out); any other agent unchanged."""
    return agent.model_copy(update={"policy": "crop_flip"}) if agent.policy == "search" else agent


def searcher(config: RunConfig, role: Role) -> Role:
    """Return the role whose search a role's agent comes from: the teacher if the student shares its agent."""
    return "teacher" if role == "student" and config.student.agent.policy == "teacher" else role


def schedule_file(run_path: Path, role: Role) -> Path:
    """Return the path of a role's schedule."""
    return run_path / "search" / f"{role}.schedule.yaml"


def agent_inputs(run: RunFolder, role: Role) -> list[Path]:
    """Return the files of the run folder that a role's agent comes from."""
    is_found = named_agent(run.config, role).policy == "search"
    return [schedule_file(run.path, searcher(run.config, role))] if is_found else []


def training_settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings that a distillation depends on, as stored in a checkpoint: dotted key -> plain value.

    Files are left out (their content is in the fingerprint), as is how often the training is saved.
    """
    parts = config.model_dump(mode="json", include={"seed", "teacher", "student"})
    values = dict(leaves(change_nets(parts, portable_net)))
    return {key: value for key, value in values.items() if key.rpartition(".")[2] not in UNLEARNED}
