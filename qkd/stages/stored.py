"""Read the config that a run folder was made with."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from qkd.binding import read_config
from qkd.config import RunConfig


def stored_config(folder: Path) -> RunConfig:
    """Return the config of a run folder.

    Raises:
        ConfigError: If it cannot be read.
        ValueError: If it is not a config of this version.
    """
    path = folder / "config.yaml"
    try:
        return RunConfig.model_validate(read_config(path))
    except ValidationError as error:
        raise ValueError(f"{path}: is not a config of this version ({error.error_count()} faults)") from error
