"""What tests of whole trainings share."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkd.testing import write_npz_set


@pytest.fixture(scope="module")
def unfused(eager: None) -> None:
    """Switch the compiled kernels off: compiling takes longer than a training of seconds."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small image set."""
    return write_npz_set(tmp_path_factory.mktemp("data"))
