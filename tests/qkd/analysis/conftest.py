"""A run to look at, trained once for each module of tests that wants it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qkd.testing import run_tiny, tiny_config, write_npz_set


@pytest.fixture(scope="module")
def folder(unfused: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a data set, a config, and a run of it that is trained but not exported."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(write_npz_set(folder / "data"))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run_tiny(config, folder / "runs", "teacher", "search", "distill").close()
    return folder
