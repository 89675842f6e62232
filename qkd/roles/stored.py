"""Read what a run folder was created with: its config, and how the environment has changed since."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from qkd.config import RunConfig
from qkd.config.bind_faults import schema_faults
from qkd.config.binding import read_config
from qkd.moved import in_new_spelling
from qkd.nets.own.copies import resolved_nets
from qkd.progress import Progress
from qkd.run.folder import RunFolder


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


def warn_of_another_environment(run: RunFolder, progress: Progress) -> None:
    """Warn how this process differs from the one that created the run folder, since results may differ too."""
    for change in run.environment_changes():
        progress.warn(f"the environment has changed: {change}; results may now differ in the last bits")
