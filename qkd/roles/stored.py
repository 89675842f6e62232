"""Read what a run folder was created with: its config, and how the environment has changed since."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from qkd.config import RunConfig
from qkd.config.bind_faults import schema_faults
from qkd.config.binding import read_config
from qkd.files import read_json, sha256_of
from qkd.moved import in_new_spelling
from qkd.nets.own.copies import resolved_nets
from qkd.progress import Progress
from qkd.run.folder import RunFolder

WEIGHTS_HASH = "weights_sha256"  # key of a result: of the file that the net's training started from


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


def changed_weights(folder: Path, config: RunConfig) -> str:
    """Return what to warn of if a run's float nets started from files that hold other weights now; empty if none do.

    The run keeps what it made from them. A file that is gone is no longer needed.

    Args:
        folder: The run folder.
        config: Its config.
    """
    started = {"teacher": ("teacher", config.teacher.weights), "student": ("student", config.student.weights)}
    found = []
    for role, (place, weights) in started.items():
        try:
            then = read_json(folder / place / "result.json").get(WEIGHTS_HASH)
            if then is not None and weights is not None and weights.is_file() and sha256_of(weights) != then:
                found.append(f"{role}.weights: {weights} has changed since this run started from it")
        except (OSError, ValueError):
            continue  # a damaged record is reported by its reader
    return f"{'; '.join(found)}; the run keeps the nets that it made (name=... makes others)" if found else ""


def warn_of_another_environment(run: RunFolder, progress: Progress) -> None:
    """Warn how this process differs from the one that created the run folder, since results may differ too."""
    for change in run.environment_changes():
        progress.warn(f"the environment has changed: {change}; results may now differ in the last bits")
