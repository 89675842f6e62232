"""What tests of whole trainings share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qkd.testing import write_npz_set
from quantizers import is_fused, set_fused


@pytest.fixture(scope="module")
def unfused() -> Iterator[None]:
    """Switch the compiled kernels off: compiling takes longer than a training of seconds."""
    before = is_fused()
    set_fused(enabled=False)
    yield
    set_fused(enabled=before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small image set."""
    return write_npz_set(tmp_path_factory.mktemp("data"))
