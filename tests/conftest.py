"""What tests of several packages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is not an error
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """Compiling costs seconds: the fused path is tested where a test asks for it."""
    import quantizers

    before = quantizers.is_fused()
    quantizers.set_fused(enabled=False)
    yield
    quantizers.set_fused(enabled=before)


@pytest.fixture
def one_eager_thread() -> Iterator[None]:
    """One thread and no compiled kernels: what a test of bits, or of something tiny, wants."""
    import torch

    import quantizers

    before, threads = quantizers.is_fused(), torch.get_num_threads()
    quantizers.set_fused(enabled=False)
    torch.set_num_threads(1)
    yield
    quantizers.set_fused(enabled=before)
    torch.set_num_threads(threads)


@pytest.fixture
def compiled_kernels() -> Iterator[None]:
    """Compiled kernels on, and whatever number of threads a test sets is gone after it."""
    import torch

    import quantizers

    before, threads = quantizers.is_fused(), torch.get_num_threads()
    quantizers.set_fused(enabled=True)
    yield
    quantizers.set_fused(enabled=before)
    torch.set_num_threads(threads)
