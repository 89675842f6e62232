"""Modes within a block: what they change is back after it, also on failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from qkd.training.arithmetic.precision import Precision
from quantizers.modes import evaluating, exact_float32

CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _flags() -> Iterator[None]:
    parts = (CUDNN.conv, CUDNN.rnn, MATMUL)
    before = [part.fp32_precision for part in parts]
    yield
    for part, precision in zip(parts, before, strict=True):
        part.fp32_precision = precision


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_tensor_float_32_is_off_within_a_block(allowed: bool, matmul: str) -> None:
    CUDNN.allow_tf32 = allowed
    torch.set_float32_matmul_precision(matmul)
    with exact_float32():
        assert (CUDNN.allow_tf32, MATMUL.allow_tf32) == (False, False)
    assert (CUDNN.allow_tf32, MATMUL.allow_tf32) == (allowed, matmul == "high")
    torch.set_float32_matmul_precision("highest")


def test_flags_that_older_names_cannot_express_come_back() -> None:
    CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = "ieee", "tf32"
    with pytest.raises(ZeroDivisionError), exact_float32():
        assert {CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision, MATMUL.fp32_precision} == {"ieee"}
        raise ZeroDivisionError
    assert (CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision) == ("ieee", "tf32")


def test_evaluation_and_float32_steps_are_exact() -> None:
    CUDNN.allow_tf32 = True
    net = nn.Linear(2, 2).train()
    with evaluating(net):
        assert not CUDNN.allow_tf32 and not net.training
    assert CUDNN.allow_tf32 and net.training
    with Precision("cuda", torch.bfloat16).context(enabled=False):
        assert not CUDNN.allow_tf32
