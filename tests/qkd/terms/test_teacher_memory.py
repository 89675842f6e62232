"""Logits of a fixed teacher are computed once, the same bits in a resumed training, and only for unchanged images."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qkd.config import TermConfig
from qkd.data import Splits, normalize
from qkd.terms import teacher_memory
from qkd.terms.step import DistillStep
from qkd.terms.teacher_memory import TeacherMemory, memory_for
from qkd.terms.weighting import build_terms
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import Batch

TERMS = (TermConfig(loss="cross_entropy"), TermConfig(loss="soft_target", options={"temperature": 4.0}))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.images = TinyNet().eval().requires_grad_(False), 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return self.net(images)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return synthetic_splits(train=48, val=12)


def batch(splits: Splits, places: Tensor) -> Batch:
    images, labels = splits.train.batch(places, "cpu")
    return Batch(normalize(images, splits.mean, splits.std), labels, images, 0, 0, places)


def test_logits_are_computed_once_and_the_same_bits_wherever_a_training_resumes(splits: Splits) -> None:
    teacher, asked = Counting(), Counting()
    memory, resumed = TeacherMemory(splits, 16), TeacherMemory(splits, 16)
    assert resumed.logits(Counting(), batch(splits, torch.arange(40, 48))) is not None
    for seed in range(6):
        given = batch(splits, torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:16])
        found = memory.logits(teacher, given)
        assert found is not None and torch.equal(found, resumed.logits(asked, given))  # type: ignore[arg-type]
        # an image's place in a batch may change the last bit of a matrix product
        torch.testing.assert_close(found, teacher.net(given.images), rtol=1e-5, atol=1e-6)
    assert (teacher.images, asked.images) == (48, 0)
    last = replace(given, images=given.images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(memory.logits(teacher, last), found)  # type: ignore[arg-type]


def test_each_precision_has_its_own(splits: Splits) -> None:
    memory, teacher, given = TeacherMemory(splits, 16), Counting(), batch(splits, torch.arange(16))
    full = memory.logits(teacher, given)
    with torch.autocast("cpu", torch.bfloat16):
        half = memory.logits(teacher, given)
        wanted = teacher.net(given.images)
    assert full is not None and half is not None and half.dtype is wanted.dtype
    torch.testing.assert_close(half, wanted, rtol=0.02, atol=0.02)
    assert full.dtype is torch.float32 and memory.logits(teacher, given) is not None and teacher.images == 96


def test_a_step_gives_the_same_loss_and_gradient(splits: Splits) -> None:
    torch.manual_seed(0)
    student, teacher = TinyNet(), Counting()
    twin = copy.deepcopy(student)
    plain = DistillStep(student, teacher, build_terms(TERMS))
    remembering = DistillStep(twin, teacher, build_terms(TERMS), memory=TeacherMemory(splits, 16))
    given = batch(splits, torch.arange(8, 24))
    one, other = plain(given), remembering(given)
    one.loss.backward()
    other.loss.backward()
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-6)
    pairs = zip(student.parameters(), twin.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("written", ["weight", "buffer"])
def test_a_teacher_that_moves_is_asked_itself(splits: Splits, written: str) -> None:
    memory, teacher, given = TeacherMemory(splits, 16), Counting(), batch(splits, torch.arange(16))
    assert memory.logits(teacher, given) is not None and memory.logits(teacher, given) is not None
    tensors = list(teacher.buffers()) if written == "buffer" else list(teacher.parameters())
    with torch.no_grad():
        tensors[-1].add_(1)
    assert memory.logits(teacher, given) is None and memory.logits(teacher, given) is None


def test_other_images_at_these_places_switch_it_off(splits: Splits) -> None:
    memory, teacher, given = TeacherMemory(splits, 16), Counting(), batch(splits, torch.arange(16))
    assert memory.logits(teacher, replace(given, samples=given.samples + 1)) is None  # type: ignore[operator]
    assert memory.logits(teacher, given) is None and teacher.images == 0
    assert TeacherMemory(splits, 16).logits(teacher, replace(given, samples=None)) is None


def test_what_would_be_too_large_is_not_kept(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_memory, "MOST_BYTES", 100)
    teacher = Counting()
    memory = TeacherMemory(splits, 16)
    for _ in range(2):
        assert memory.logits(teacher, batch(splits, torch.arange(16))) is None
    assert teacher.images == 16


def test_where_it_pays(splits: Splits) -> None:
    fixed, learning = Counting(), TinyNet()
    assert memory_for(splits, 16, epochs=3, sees_raw=True, teacher=fixed) is not None
    assert memory_for(splits, 16, epochs=2, sees_raw=True, teacher=fixed) is None
    assert memory_for(splits, 16, epochs=3, sees_raw=False, teacher=fixed) is None
    assert memory_for(splits, 16, epochs=3, sees_raw=True, teacher=learning) is None
