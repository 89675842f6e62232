"""That each data-free method is wired as published: its loss, its generator's form, its latents, its inversions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.config import AgentConfig
from qkd.config.data_free import DataFreeConfig
from qkd.losses import contrastive_loss
from qkd.methods.data_free.inverting.contrast import Contrast, _Memory
from qkd.methods.data_free.inverting.inversions import DataImpressions, DeepInversion, _full_range
from qkd.methods.data_free.making.adversary import AdversarialSource, Adversary
from qkd.methods.data_free.making.blind import RealImageError, sightless
from qkd.methods.data_free.making.generating import TrainedGenerator, build_generator
from qkd.methods.data_free.making.kinds import weights_of
from qkd.methods.data_free.making.objectives import OBJECTIVES, Moment
from qkd.methods.data_free.making.watching import Seen, Watched
from qkd.nets.generator import Generator
from qkd.seeding import stream
from qkd.testing import TinyNet, synthetic_splits

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"latent": 6, "width": 8}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHER, STUDENT, FEATURE = drawn(0, 4, 3), drawn(1, 4, 3), drawn(2, 4, 5)
INPUTS = (drawn(3, 4, 2, 3, 3), drawn(4, 4, 6))
MEANS, VARIANCES = (drawn(5, 2), drawn(6, 6)), (drawn(7, 2).square(), drawn(8, 6).square())
IMAGES, LATENTS, LABELS = drawn(9, 4, 1, 3, 3), drawn(10, 4, 6), torch.tensor([0, 1, 2, 1])
SEEN = Seen(TEACHER, FEATURE, INPUTS, MEANS, VARIANCES)
MOMENT = Moment(IMAGES, LATENTS, LABELS, SEEN, torch.tensor([0.3, -0.2], dtype=torch.float64), STUDENT)


def one_hot() -> Tensor:
    return -TEACHER.softmax(1).amax(1).log().mean()


def balance(base: float = 1.0) -> Tensor:
    mean = TEACHER.softmax(1).mean(0)
    return (mean * mean.log()).sum() / base


def classes() -> Tensor:
    return functional.cross_entropy(TEACHER, LABELS)


def differences() -> list[tuple[Tensor, Tensor]]:
    found = []
    for values, mean, variance in zip(INPUTS, MEANS, VARIANCES, strict=True):
        rows = values.transpose(0, 1).flatten(1)
        found.append((rows.mean(1) - mean, rows.var(1, correction=0) - variance))
    return found


def norms() -> Tensor:
    return torch.stack([one.norm() for pair in differences() for one in pair]).sum()


def squares() -> Tensor:
    return torch.stack([one.square().mean() for pair in differences() for one in pair]).sum() / 2


def divergence() -> Tensor:
    p = TEACHER.softmax(1)
    return (p * (p.log() - STUDENT.softmax(1).log())).sum()


def halves(values: Tensor) -> Tensor:
    return values[2:] - values[:2]


TEN = 2.302585092994046  # ln 10
DAFL = one_hot() + 5 * balance(TEN) - 0.1 * FEATURE.abs().mean()
EXPECTED: dict[str, Callable[[], Tensor]] = {
    "rdskd": lambda: (
        (one_hot() - 0.3).exp() + (balance() + 0.2).exp() + halves(TEACHER.softmax(1)).norm() / halves(IMAGES).norm()
    ),
    "dafl": lambda: DAFL,
    "dafl_joint": lambda: DAFL,
    "mskd": lambda: DAFL + 1 / (halves(IMAGES).abs().mean() / halves(LATENTS).abs().mean() + 1e-5),
    "gdfq": lambda: classes() + 0.1 * squares(),
    "generative": lambda: classes() + norms(),  # whose weight could not be read
    "zskt": lambda: -divergence() / 12,  # over batch times classes, as the released code's `mean`
    "dfad": lambda: -(STUDENT - TEACHER).abs().mean(),
    "dfq": lambda: -divergence() / 4 + norms() + one_hot() + 20 * balance(),
}


@pytest.mark.parametrize("method", OBJECTIVES)
def test_the_loss_of_each_generator_is_its_papers(method: str) -> None:
    found = OBJECTIVES[method](MOMENT, weights_of(method, {})).loss
    torch.testing.assert_close(found, EXPECTED[method](), atol=1e-9, rtol=1e-9)


def test_a_generator_computes_the_published_form() -> None:
    torch.manual_seed(0)
    net = Generator(latent=6, classes=4, channels=2, image_size=8, width=8)
    latents, labels = torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)
    x = net.expand(latents).view(5, 8, 2, 2)
    for norm, conv, after in ((net.norm1, net.conv1, net.norm2), (None, net.conv2, net.norm3)):
        x = x if norm is None else functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
        x = conv(functional.interpolate(x, scale_factor=2, mode="nearest"))
        x = functional.batch_norm(x, None, None, after.weight, after.bias, training=True, eps=0.8)
        x = torch.where(x > 0, x, 0.2 * x)
    expected = functional.batch_norm(net.conv3(x).tanh(), None, None, training=True)
    torch.testing.assert_close(net(latents, labels), expected)


# --- latents of generators that learn along


class Fake:
    """Of a job, what a source reads."""

    seed, role, device, splits = 0, "student", CPU, synthetic_splits()
    config = type("Config", (), {"epochs": 2})()

    def __init__(self, folder: Path) -> None:
        self.folder = folder


@pytest.mark.parametrize(("method", "is_same"), [("zskt", True), ("dfad", False), ("dfq", False)])
def test_which_latents_the_students_steps_see(method: str, is_same: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """ZSKT's are those of the generator's step, remade by the moved generator; DFAD and DFQ draw fresh ones."""
    own = DataFreeConfig(method=method, student_steps=3, **SIZES)  # type: ignore[arg-type]
    net = TrainedGenerator(build_generator(own, synthetic_splits(), 0, "test"))
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    torch.manual_seed(0)
    opponent = Adversary(net, torch.optim.SGD(net.parameters(), lr=0.1), Watched(TinyNet()), TinyNet(), own, 4)
    opponent.teacher.net.eval()
    source = AdversarialSource(Fake(tmp_path), opponent, images=48, agent=AgentConfig(policy="none"))  # type: ignore[arg-type]
    list(source.batches(0, 0, 8))
    of_batches = [one for one in seen if len(one) == 8]  # others are samples to show
    groups = of_batches[:4], of_batches[4:8]  # a step of the generator, three of the student
    for group in groups:
        assert len(group) == 4
        assert all(torch.equal(group[0], one) == is_same for one in group[1:])
    assert not torch.equal(groups[0][0], groups[1][0])


# --- inversions


def contrast() -> Contrast:
    own = DataFreeConfig(method="cmi", pool_steps=1, **SIZES)
    return Contrast(Watched(TinyNet()), own, synthetic_splits(), 0, CPU)


class UnevenNorms(TinyNet):
    """One batch norm runs twice, and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.twice = nn.BatchNorm2d(7), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.twice(self.twice(x)))


def test_features_are_of_the_batch_norms_that_run() -> None:
    own = DataFreeConfig(method="cmi", pool_steps=1, **SIZES)
    made = Contrast(Watched(UnevenNorms()), own, synthetic_splits(), 0, CPU)(0, 4, {})
    assert made.images.shape[0] == 4 and bool(made.images.isfinite().all())


def test_each_batch_of_cmi_begins_with_a_generator_of_its_own() -> None:
    made = contrast()
    first, again, second = (made._generator(index) for index in (0, 0, 1))
    assert torch.equal(first.conv1.weight, again.conv1.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.equal(first.conv1.weight, second.conv1.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.equal(first.conv1.bias, second.conv1.bias)  # type: ignore[union-attr,arg-type]
    for layer in first.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.2), "N(0, 0.02)"


def test_deep_inversion_rolls_what_the_teacher_sees_and_keeps_what_it_moves() -> None:
    own = DataFreeConfig(method="deep_inversion", pool_steps=12, lr=0.01)
    torch.manual_seed(0)
    teacher, found = Watched(TinyNet()), []
    teacher.net.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0].detach().clone()))
    DeepInversion(teacher, own, synthetic_splits(), 0, CPU)(0, 4, {})
    noise = torch.randn(4, *synthetic_splits().image_shape, generator=stream(0, "inversion", 0))
    places = set()
    for view in found:  # twelve steps of 0.01 are small beside noise: the nearest roll is the one that was drawn
        rolls = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
        places.add(min(rolls, key=lambda roll: float((torch.roll(noise, roll, (2, 3)) - view).norm())))
    assert len(found) == 12 and len(places) > 3


def test_a_bank_of_earlier_images_joins_the_contrast() -> None:
    own = DataFreeConfig(method="cmi", pool_steps=1, **SIZES)
    torch.manual_seed(0)
    views = torch.randn(4, 3), torch.randn(4, 3)
    empty = _Memory(3, 0, CPU, {}, own.lr)
    state = empty.contrast(*views).backward() or empty.optimizer.step() or empty.state(views)  # type: ignore[no-untyped-call]
    filled = _Memory(3, 0, CPU, state, own.lr)
    later = torch.randn(4, 3), torch.randn(4, 3)
    heads = [filled.head(one) for one in (*later, *views)]
    expected = contrastive_loss(*heads, temperature=0.1)
    torch.testing.assert_close(filled.contrast(*later), expected)
    assert expected > contrastive_loss(*heads[:2], temperature=0.1)


def impressions(**changes: Any) -> DataImpressions:
    own = DataFreeConfig(method="zskd", pool_steps=3, lr=0.5, **changes)
    torch.manual_seed(0)
    return DataImpressions(Watched(TinyNet()), own, synthetic_splits(), 0, CPU)


def test_a_smaller_beta_makes_targets_surer_unless_the_released_defect_is_asked_for() -> None:
    surest = {
        beta: float(impressions(beta=(beta,)).targets(0, 200).amax(1).mean()) for beta in (1.0, 0.1)
    }  # fmt: skip
    assert surest[0.1] > surest[1.0] + 0.1
    released = [impressions(beta=(beta,), compat="released").targets(0, 50) for beta in (1.0, 0.1)]
    assert torch.equal(released[0], released[1]) and torch.equal(released[0], impressions(beta=(1.0,)).targets(0, 50))


def test_data_impressions_stay_within_the_range_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    made = impressions()
    before = made._normalized
    monkeypatch.setattr(
        DataImpressions, "_normalized", lambda _, pixels: found.append(pixels.detach().clone()) or before(pixels)
    )
    made(0, 4, {})
    assert len(found) == 3 and not torch.equal(found[1], found[2])
    for pixels in found[1:]:  # behind a step of the optimizer at a rate of half the range
        torch.testing.assert_close(pixels.flatten(1).amin(1), torch.zeros(4))
        torch.testing.assert_close(pixels.flatten(1).amax(1), torch.ones(4))
    assert torch.equal(_full_range(torch.full((1, 1, 2, 2), 0.3)), torch.full((1, 1, 2, 2), 0.3))


# --- without images


def test_what_is_made_before_the_student_sees_no_image_at_all() -> None:
    splits = sightless(synthetic_splits())
    assert len(splits.train) == 64 and splits.quiz is None and splits.target is None
    for part in (splits.train, splits.val, splits.test):
        with pytest.raises(RealImageError, match="the run is data-free"):
            part.batch(torch.arange(2), "cpu")


def test_the_moment_is_left_as_it_was() -> None:
    before = copy.deepcopy(SEEN.logits)
    for method, objective in OBJECTIVES.items():
        objective(MOMENT, weights_of(method, {}))
    assert torch.equal(before, SEEN.logits)
