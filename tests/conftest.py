"""What tests of several packages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """Compiling costs seconds: the fused path is tested where a test asks for it."""
    import quantizers

    before = quantizers.is_fused()
    quantizers.set_fused(enabled=False)
    yield
    quantizers.set_fused(enabled=before)
