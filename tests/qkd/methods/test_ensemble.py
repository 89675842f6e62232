"""Ensemble teachers: copies change nothing, averages are averages, and a training's gain is not one of copies."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from qkd.data import normalize
from qkd.losses import soft_target_loss
from qkd.methods.ensemble.average import EnsembleTeacher, mean_logits, mean_probability_logits
from qkd.seeding import global_stream
from qkd.testing import TinyNet, synthetic_splits

SPACES = ("probability", "logit")


def tensors(count: int, *, size: float = 3.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [size * torch.randn(5, 4, generator=generator, dtype=dtype) for _ in range(count)]


def nets(count: int) -> list[nn.Module]:
    made = []
    for number in range(count):
        with global_stream(0, "member", number):
            made.append(TinyNet().eval())
    return made


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_copies_are_the_single_net_bit_for_bit(space: str, count: int, temperature: float) -> None:
    net = nets(1)[0]
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for size in (1.0, 1e4):
        teacher = EnsembleTeacher([copy.deepcopy(net) for _ in range(count)], space, temperature=temperature)
        assert torch.equal(teacher(size * images), net(size * images))


def test_the_mean_of_probabilities_is_on_the_simplex_and_is_the_mean() -> None:
    logits = tensors(3)
    for temperature in (0.5, 1.0, 4.0):
        found = (mean_probability_logits(logits, temperature=temperature) / temperature).softmax(1)
        expected = torch.stack([(one / temperature).softmax(1) for one in logits]).mean(0)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found.sum(1), torch.ones(5, dtype=torch.float64), rtol=1e-14, atol=0)
        assert bool((found > 0).all())


def test_two_members_by_hand() -> None:
    first, second = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])  # 3/4 and 1/2 for class 0
    found = mean_probability_logits([first, second]).softmax(1)
    assert found[0].tolist() == pytest.approx([5 / 8, 3 / 8])
    found = mean_logits([first, second]).softmax(1)
    assert found[0].tolist() == pytest.approx([3**0.5 / (1 + 3**0.5), 1 / (1 + 3**0.5)])


def test_the_two_spaces_differ_and_meet_at_high_temperature() -> None:
    logits = tensors(3)
    of_logits, of_probabilities = mean_logits(logits).softmax(1), mean_probability_logits(logits).softmax(1)
    assert (of_logits - of_probabilities).abs().max() > 0.01
    hot = mean_probability_logits(logits, temperature=1e5).softmax(1)
    torch.testing.assert_close(hot, of_logits, rtol=1e-3, atol=1e-4)


def test_what_soft_targets_at_a_temperature_mean() -> None:
    logits, student = tensors(3), tensors(4)[3]
    softened = torch.stack([(one / 4).softmax(1) for one in logits]).mean(0)
    prediction = torch.stack([one.softmax(1) for one in logits]).mean(0)
    sharpened = prediction ** (1 / 4) / (prediction ** (1 / 4)).sum(1, keepdim=True)
    for temperature, targets in ((4.0, softened), (1.0, sharpened)):
        teacher = mean_probability_logits(logits, temperature=temperature)
        found = soft_target_loss(student, teacher, temperature=4.0)
        expected = 16 * (targets * (targets.log() - (student / 4).log_softmax(1))).sum(1).mean()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mean", [mean_logits, mean_probability_logits])
def test_order_does_not_matter_and_gradients_check(mean) -> None:
    logits = tensors(3)
    torch.testing.assert_close(mean(logits).softmax(1), mean(logits[::-1]).softmax(1), rtol=1e-12, atol=1e-15)
    leaves = [one.requires_grad_() for one in logits]
    assert torch.autograd.gradcheck(lambda *parts: mean(list(parts)), leaves)


@pytest.mark.parametrize("kind", ["zero", "constant", "huge", "one hot"])
@pytest.mark.parametrize("mean", [mean_logits, mean_probability_logits])
def test_extreme_logits_stay_finite(mean, kind: str) -> None:
    plain = tensors(2, dtype=torch.float32)
    one_hot = torch.zeros(5, 4)
    one_hot[:, 1] = 1
    made = {"zero": torch.zeros(5, 4), "constant": torch.ones(5, 4), "huge": 1e4 * plain[0], "one hot": one_hot}[kind]
    for parts in ([made, plain[0]], [plain[0], made], [made, -made], [made, made]):
        leaves = [part.clone().requires_grad_() for part in parts]
        value = mean(leaves)
        assert value.dtype == torch.float32 and bool(value.isfinite().all())
        value.softmax(1).square().sum().backward()
        assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


def test_refused() -> None:
    net = nets(1)
    with pytest.raises(ValueError, match="at least one model"):
        EnsembleTeacher([])
    with pytest.raises(ValueError, match="space must be one of logit, probability, got 'prob'"):
        EnsembleTeacher(net, "prob")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be positive"):
        EnsembleTeacher(net, temperature=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        mean_probability_logits(tensors(2), temperature=-1)
    for mean in (mean_logits, mean_probability_logits):
        with pytest.raises(ValueError, match="at least one model"):
            mean([])
        with pytest.raises(ValueError, match=r"the same shape \[batch, classes\], got \(5, 4\), \(5, 3\)"):
            mean([torch.zeros(5, 4), torch.zeros(5, 3)])
        with pytest.raises(ValueError, match="the same shape"):
            mean([torch.zeros(5)])


def test_the_gain_is_of_different_nets_not_of_more_nets() -> None:
    """The control: nets of other seeds help; copies of one do not, and the average of weights is no ensemble."""
    splits = synthetic_splits(train=96, test=400)
    images, labels = splits.train.batch(torch.arange(96), "cpu")
    clean, truth = splits.test.batch(torch.arange(400), "cpu")
    generator = torch.Generator().manual_seed(7)
    unseen = _noisy(normalize(clean, splits.mean, splits.std), generator)
    members = nets(4)
    for net in members:
        net.train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
        for _ in range(40):
            optimizer.zero_grad()
            seen = _noisy(normalize(images, splits.mean, splits.std), generator)
            nn.functional.cross_entropy(net(seen), labels).backward()
            optimizer.step()
        net.eval()

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return (model(unseen).argmax(1) != truth).double().mean().item()

    single = [error(net) for net in members]
    mean = sum(single) / len(single)
    assert 0.01 < mean < 0.3, "else there is nothing to gain, or nothing was learned"
    for space in SPACES:
        assert error(EnsembleTeacher(members, space)) < mean / 2
        assert error(EnsembleTeacher([members[0]] * 4, space)) == single[0]
    assert error(_averaged(members)) > max(single)


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.7 * torch.randn(images.shape, generator=generator)  # so that nets make different errors


def _averaged(members: list[nn.Module]) -> nn.Module:
    states = [net.state_dict() for net in members]
    mean = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
    net = copy.deepcopy(members[0])
    net.load_state_dict({name: mean[name].to(tensor.dtype) for name, tensor in states[0].items()})
    return net
