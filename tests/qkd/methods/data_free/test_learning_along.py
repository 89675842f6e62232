"""Methods whose images are made while the student learns teach it the digits: it never sees one, and knows them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qkd.config import DataConfig
from qkd.config.data_free import FAMILIES, DataFreeConfig
from qkd.data import Splits, load_splits, normalize
from qkd.losses import soft_target_loss
from qkd.methods.data_free.inverting.growing import GrowingPool, due
from qkd.methods.data_free.making.adversary import Adversary
from qkd.methods.data_free.making.generating import TrainedGenerator, build_generator
from qkd.methods.data_free.making.watching import Watched
from qkd.seeding import global_stream, stream
from qkd.testing import TinyNet

pytestmark = pytest.mark.slow
CPU, STEPS, BATCH = torch.device("cpu"), 240, 64
KNOWS = 0.3  # chance is 0.1


def images_of(splits: Splits, part: str) -> tuple[Tensor, Tensor]:
    raw, labels = getattr(splits, part).batch(torch.arange(len(getattr(splits, part))), "cpu")
    return normalize(raw, splits.mean, splits.std), labels


@functools.cache
def taught() -> tuple[Splits, nn.Module]:
    """Return the digits and a teacher that knows them."""
    splits = load_splits(DataConfig(name="digits", val_fraction=0), seed=0)
    with global_stream(0, "teacher"):
        net = TinyNet(classes=10, width=16)
    images, labels = images_of(splits, "train")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(250):
        chosen = torch.randperm(len(images), generator=stream(0, "order", step))[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    assert accuracy(net.eval(), splits) > 0.85
    return splits, net


def accuracy(net: nn.Module, splits: Splits) -> float:
    images, labels = images_of(splits, "test")
    with torch.no_grad():
        return (net.eval()(images).argmax(1) == labels).float().mean().item()


def fresh_student() -> nn.Module:
    with global_stream(0, "student"):
        return TinyNet(classes=10, width=12)


def learned(student: nn.Module, images_at: Callable[[int], Tensor]) -> float:
    """Return the accuracy on real digits of a student that learned from made images."""
    splits, teacher = taught()
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    for step in range(STEPS):
        student.train()
        images = images_at(step)
        with torch.no_grad():
            targets = teacher(images)
        optimizer.zero_grad()
        soft_target_loss(student(images), targets, temperature=4).backward()
        optimizer.step()
    return accuracy(student, splits)


# zskt and dfad, which read neither statistics nor decisions, need longer for digits: test_learning.py has easier images
@pytest.mark.parametrize("method", ["dfq", "dafl_joint"])
def test_a_generator_that_learns_along_teaches(method: str) -> None:
    splits, teacher = taught()
    is_joint = FAMILIES[method] == "joint"
    own = DataFreeConfig(method=method, latent=32, width=32, **({} if is_joint else {"student_steps": 3}))
    student, net = fresh_student(), TrainedGenerator(build_generator(own, splits, 0, "test"))
    adversary = Adversary(net, torch.optim.Adam(net.parameters(), lr=1e-3), Watched(teacher), student, own, 10)

    def images_at(step: int) -> Tensor:
        if is_joint:
            return adversary.learn(BATCH, stream(0, "joint", step)).images
        if step % 3 == 0:
            adversary.learn(BATCH, stream(0, "adversary", step))
        return adversary.draw(BATCH, stream(0, "made", step))[0]

    assert learned(student, images_at) > KNOWS


@pytest.mark.parametrize("method", [name for name, family in FAMILIES.items() if family == "growing"])
def test_a_pool_that_grows_teaches(method: str, tmp_path: Path) -> None:
    splits, teacher = taught()
    settings = {
        "adaptive_inversion": {"pool_steps": 60, "lr": 0.05},
        "cmi_adversarial": {"pool_steps": 60, "lr": 5e-3, "latent": 32, "width": 32},
        "fast_dfkd": {"pool_steps": 10, "lr": 5e-3, "latent": 32, "width": 32},
    }[method]
    own = DataFreeConfig(method=method, pool_images=512, batch_size=64, **settings)
    student = fresh_student()
    pool = GrowingPool(Watched(teacher), student, own, splits, 0, CPU)
    pool.settle_in(tmp_path)

    def images_at(step: int) -> Tensor:
        pool.grow(due(pool.count, step, STEPS))
        return pool.draw(BATCH, stream(0, "made", step))[0]

    assert learned(student, images_at) > KNOWS
