"""Data-free methods teach: a student that never saw a real image classifies real ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qkd.config.data_free import FAMILIES, DataFreeConfig
from qkd.data import Splits, normalize
from qkd.losses import logit_distance_loss, soft_target_loss
from qkd.methods.data_free.inverting.pooling import INVERSIONS
from qkd.methods.data_free.making.adversary import Adversary
from qkd.methods.data_free.making.generating import GeneratorStep, TrainedGenerator, build_generator, judged
from qkd.methods.data_free.making.sources import Generated, Pool, draw_latents
from qkd.methods.data_free.making.watching import Watched
from qkd.seeding import global_stream, stream
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import Batch

CPU = torch.device("cpu")
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]
pytestmark = pytest.mark.slow


def images_of(splits: Splits, part: str) -> tuple[Tensor, Tensor]:
    raw, labels = getattr(splits, part).batch(torch.arange(len(getattr(splits, part))), "cpu")
    return normalize(raw, splits.mean, splits.std), labels


@functools.cache
def taught() -> tuple[Splits, nn.Module]:
    """Return a data set and a teacher that knows it."""
    splits = synthetic_splits(train=256, test=200)
    with global_stream(0, "teacher"):
        net = TinyNet(width=12)
    images, labels = images_of(splits, "train")
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(80):
        chosen = torch.randperm(256, generator=stream(0, "order", step))[:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    assert accuracy(net, splits) > 0.97
    return splits, net


def accuracy(net: nn.Module, splits: Splits) -> float:
    images, labels = images_of(splits, "test")
    was = net.training
    with torch.no_grad():
        right = (net.eval()(images).argmax(1) == labels).float().mean().item()
    net.train(was)
    return right


def trained_generator(own: DataFreeConfig, folder: Path, steps: int) -> tuple[nn.Module, dict[str, object]]:
    splits, teacher = taught()
    net = TrainedGenerator(build_generator(own, splits, 0, "test"))
    step = GeneratorStep(net, Watched(teacher), own, splits, 0, folder)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for number in range(steps):
        latents, labels = draw_latents(64, own.latent, 4, stream(0, "latents", number), CPU)
        result = step(Batch(latents[:, :, None, None], labels, latents, number // 20, number % 20))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    made = Generated(net.generator, latent=own.latent, classes=4, device=CPU, asks=False)
    return net, judged(teacher(made.draw(256, stream(0, "judged"))[0]))


def student_of(draw: Draw, before: Callable[[int], None] = lambda _: None, *, steps: int = 150) -> float:
    """Return the accuracy on real images of a student that learned from drawn ones."""
    splits, teacher = taught()
    with global_stream(0, "student"):
        net = STUDENT[0] if STUDENT else TinyNet(width=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(steps):
        before(step)
        images, _ = draw(64, stream(0, "made", step))
        with torch.no_grad():
            targets = teacher(images)
        optimizer.zero_grad()
        loss = logit_distance_loss(net(images), targets) if STUDENT else soft_target_loss(
            net(images), targets, temperature=4
        )  # fmt: skip
        loss.backward()
        optimizer.step()
    return accuracy(net, splits)


STUDENT: list[nn.Module] = []  # of a method that plays against it


@pytest.mark.parametrize("method", [name for name, family in FAMILIES.items() if family == "generator"])
def test_a_generator_teaches(method: str, tmp_path: Path) -> None:
    groups = 2 if method == "generative" else 1
    own = DataFreeConfig(method=method, latent=16, width=16, groups=groups)
    net, found = trained_generator(own, tmp_path, 400 if method == "dafl" else 150)  # its classes take longer
    assert found["histogram_entropy"] > 0.8 and found["mean_confidence"] > 0.6
    made = Generated(net.generator, latent=16, classes=4, device=CPU, asks=False)
    assert student_of(made.draw) > (0.45 if method == "dafl" else 0.6)  # chance is 0.25


@pytest.mark.parametrize("method", INVERSIONS)
def test_a_pool_teaches(method: str) -> None:
    splits, teacher = taught()
    rate = {"deep_inversion": 0.05, "zskd": 0.01, "cmi": 2e-3}[method]
    sizes = {"latent": 16, "width": 16} if method == "cmi" else {}
    own = DataFreeConfig(method=method, pool_images=128, batch_size=64, pool_steps=80, lr=rate, **sizes)
    inversion, parts, state = INVERSIONS[method](Watched(teacher), own, splits, 0, CPU), [], {}
    for index in range(2):
        made = inversion(index, 64, state)
        parts.append(made.images)
        state = made.state
    images = torch.cat(parts)
    assert judged(teacher(images))["histogram_entropy"] > 0.7
    assert student_of(Pool(images, teacher(images).argmax(1)).draw) > 0.6


@pytest.mark.parametrize("method", [name for name, family in FAMILIES.items() if family == "adversarial"])
def test_an_adversary_teaches(method: str) -> None:
    splits, teacher = taught()
    own = DataFreeConfig(method=method, latent=16, width=16, student_steps=3)
    with global_stream(0, "student"):
        student = TinyNet(width=8)
    net = TrainedGenerator(build_generator(own, splits, 0, "test"))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    adversary = Adversary(net, optimizer, Watched(teacher), student, own, 4)

    def play(step: int) -> None:
        if step % 3 == 0:
            assert adversary.learn(64, stream(0, "adversary", step)).loss.isfinite()

    STUDENT.append(student)
    try:
        assert student_of(adversary.draw, play, steps=300) > 0.6
    finally:
        STUDENT.clear()


def test_without_the_balance_fewer_classes_are_made(tmp_path: Path) -> None:
    """The entropy of the class histogram is what DAFL's balance is for."""
    found = {}
    for weight in (0.0, 5.0):
        own = DataFreeConfig(method="dafl", latent=16, width=16, weights={"balance_weight": weight})
        found[weight] = trained_generator(own, tmp_path, 100)[1]["histogram_entropy"]
    assert found[5.0] > found[0.0] + 0.1
