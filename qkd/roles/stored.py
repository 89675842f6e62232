"""Read what a run folder was created with: its config, and how the environment has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qkd.config import AgentConfig, RunConfig
from qkd.config.bind_faults import schema_faults
from qkd.config.binding import read_config
from qkd.files import read_json, sha256_of
from qkd.methods.table import method_mark
from qkd.moved import in_new_spelling
from qkd.nets.imagenet import weights_file
from qkd.nets.own.copies import resolved_nets
from qkd.progress import Progress
from qkd.run.folder import RunFolder

WEIGHTS_HASH = "weights_sha256"  # key of a result: of the file that the net's training started from
SCHEDULE_HASH = "schedule_sha256"  # likewise: of the user's schedule file that it was trained by
METHOD_HASH = "method_sha256"  # likewise: of the user's own method


def stored_config(folder: Path) -> RunConfig:
    """Return the config of a run folder.

    Raises:
        ConfigError: If it cannot be read.
        ValueError: If it is not a config of this version.
    """
    path = folder / "config.yaml"
    values = resolved_nets(in_new_spelling(read_config(path), is_stored=True), folder)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, where))}: {what}" for where, what in schema_faults(error, values, RunConfig)]
        raise ValueError("\n".join([
            f"{path} is not a config of this version, so the run cannot be read:", *faults,
            "use the version that created it (environment.json has its commit), or run it again under another name",
        ])) from error  # fmt: skip


def start_mark(config: RunConfig, role: Literal["teacher", "student"]) -> dict[str, str]:
    """Return the hash of the user's file of weights that a role starts from, by the key of a result, if there is one.

    Args:
        config: The run's.
        role: The role.
    """
    own, net = (config.teacher, config.teacher_net) if role == "teacher" else (config.student, config.student_net)
    return {} if own.weights is None else {WEIGHTS_HASH: sha256_of(weights_file(own.weights, net))}


def schedule_mark(agent: AgentConfig) -> dict[str, str]:
    """Return the hash of the user's schedule file that an agent of a config names, by the key of a result, if any."""
    return {} if agent.schedule is None or not agent.schedule.is_file() else {SCHEDULE_HASH: sha256_of(agent.schedule)}


def changed_sources(folder: Path, config: RunConfig) -> str:
    """Return what to warn of if a run's nets were made from files of the user that have changed; empty if none have.

    The run keeps what it made from them. A file that is gone is no longer needed.

    Args:
        folder: The run folder.
        config: Its config.
    """
    agents, found = _agents(config), []
    for role, weights in {"teacher": config.teacher.weights, "student": config.student.weights}.items():
        try:
            then = read_json(folder / role / "result.json")
            if _has_changed(weights, then.get(WEIGHTS_HASH)):
                found.append(f"{role}.weights: {weights} has changed since this run started from it")
            if _has_changed(agents[role].schedule, then.get(SCHEDULE_HASH)):
                found.append(f"{role}.agent.schedule: {agents[role].schedule} has changed since this run trained by it")
            if role == "student" and _has_another_method(config, then.get(METHOD_HASH)):
                found.append(f"student.method: {config.student.method} has changed since this run trained by it")
        except (OSError, ValueError, AttributeError):
            continue  # a damaged record is reported by its reader
    return f"{'; '.join(found)}; the run keeps the nets that it made (name=... makes others)" if found else ""


def described_otherwise(folder: Path, config: RunConfig) -> str:
    """Return which schedule file has changed since the search stage described it; empty if none has.

    Args:
        folder: The run folder, whose search stage is complete.
        config: Its config.
    """
    agents = _agents(config)
    try:
        then = read_json(folder / "search" / "result.json")
        changed = [role for role in agents if _has_changed(agents[role].schedule, then[role].get(SCHEDULE_HASH))]
    except (OSError, ValueError, KeyError, AttributeError):
        return ""  # a damaged record is reported by its reader
    return "; ".join(f"{role}.agent.schedule: {agents[role].schedule} has changed" for role in changed)


def _agents(config: RunConfig) -> dict[str, AgentConfig]:
    return {"teacher": config.teacher.agent, "student": config.student_agent}


def method_hash(config: RunConfig) -> dict[str, str]:
    """Return the hash of the user's own method of a config, by the key of a result, if there is one."""
    mark = method_mark(config)
    return {METHOD_HASH: mark["method"]} if mark else {}


def _has_another_method(config: RunConfig, then: object) -> bool:
    if then is None:
        return False
    try:
        return method_hash(config).get(METHOD_HASH) != then
    except (OSError, ValueError):  # it is gone, or cannot be loaded by now
        return False


def _has_changed(path: Path | None, then: object) -> bool:
    return then is not None and path is not None and path.is_file() and sha256_of(path) != then


def warn_of_another_environment(run: RunFolder, progress: Progress) -> None:
    """Warn how this process differs from the one that created the run folder, since results may differ too."""
    for change in run.environment_changes():
        progress.warn(f"the environment has changed: {change}; results may now differ in the last bits")
