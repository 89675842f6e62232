"""Each loss: a worked number, an identity, a limit, gradients, extreme inputs, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses import cross_entropy_loss, similarity_preserving_loss, soft_target_loss

BATCH, CLASSES = 5, 7


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LABELS = torch.tensor([0, 3, 6, 1, 1])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


# --- cross-entropy


def test_cross_entropy_by_hand() -> None:
    value = cross_entropy_loss(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]))
    assert value.shape == ()
    assert value.item() == pytest.approx(math.log(4 / 3))


def test_label_smoothing_is_a_mixture_with_the_uniform_label() -> None:
    z, a = logits(0), 0.3
    uniform = -(functional.log_softmax(z, 1).mean(1)).mean()
    expected = (1 - a) * cross_entropy_loss(z, LABELS) + a * uniform
    torch.testing.assert_close(cross_entropy_loss(z, LABELS, label_smoothing=a), expected, rtol=1e-12, atol=0)


def test_cross_entropy_gradient() -> None:
    z = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy_loss(z, LABELS, label_smoothing=0.1), z)


@pytest.mark.parametrize(
    ("z", "labels", "smoothing", "match"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), 0.0, r"logits \[batch, classes\]"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), 0.0, r"labels \[batch\]"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 1.0, "label_smoothing must be in"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), -0.1, "label_smoothing must be in"),
    ],
)
def test_cross_entropy_refuses(z: Tensor, labels: Tensor, smoothing: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cross_entropy_loss(z, labels, label_smoothing=smoothing)


# --- soft target


def test_soft_target_by_hand() -> None:
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft_target_loss(student, teacher, temperature=1.0).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_target_is_the_naive_divergence(temperature: float) -> None:
    z, v = logits(0), logits(1)
    naive = kl((v / temperature).softmax(1), (z / temperature).softmax(1))
    expected = {
        (None, "batchmean"): naive * temperature**2 / BATCH,
        (1.0, "batchmean"): naive / BATCH,
        (1.0, "mean"): naive / (BATCH * CLASSES),
        (2.5, "mean"): 2.5 * naive / (BATCH * CLASSES),
    }
    for (scale, reduction), value in expected.items():
        found = soft_target_loss(z, v, temperature=temperature, scale=scale, reduction=reduction)
        torch.testing.assert_close(found, value, rtol=1e-9, atol=0)
        assert found.dtype == torch.float64 and found.shape == ()


def test_soft_target_is_zero_where_both_agree_and_positive_elsewhere() -> None:
    z = logits(0)
    assert soft_target_loss(z, z.clone(), temperature=4.0).item() == 0
    assert soft_target_loss(z, z + 3.0, temperature=4.0).item() == pytest.approx(0, abs=1e-12)
    assert soft_target_loss(z, logits(1), temperature=4.0).item() > 0


def test_soft_target_gradient_at_high_temperature_is_the_difference_of_logits() -> None:
    z, v = logits(0).requires_grad_(), logits(1)
    soft_target_loss(z, v, temperature=1e4).backward()
    centered = (z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))
    torch.testing.assert_close(z.grad, (centered / CLASSES / BATCH).detach(), rtol=1e-3, atol=1e-5)


def test_soft_target_gradient() -> None:
    z, v = logits(0).requires_grad_(), logits(1)
    assert torch.autograd.gradcheck(lambda z: soft_target_loss(z, v, temperature=3.0), z)
    teacher = logits(1).requires_grad_()
    soft_target_loss(z, teacher, temperature=3.0).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_target_stays_finite(dtype: torch.dtype) -> None:
    z, v = (logits(0, dtype) * 1e4).requires_grad_(), logits(1, dtype) * -1e4
    loss = soft_target_loss(z, v, temperature=1.0) + cross_entropy_loss(z, LABELS)
    loss.backward()
    assert bool(loss.isfinite()) and bool(z.grad.isfinite().all()) and loss.dtype == dtype


@pytest.mark.parametrize(
    ("shapes", "options", "match"),
    [
        (((2, 3), (2, 4)), {"temperature": 1.0}, "the same shape"),
        (((2, 3, 1), (2, 3, 1)), {"temperature": 1.0}, "the same shape"),
        (((2, 3), (2, 3)), {"temperature": 0.0}, "temperature must be positive"),
        (((2, 3), (2, 3)), {"temperature": -4.0}, "temperature=-4.0"),
        (((2, 3), (2, 3)), {"temperature": math.inf}, "temperature must be positive and finite"),
        (((2, 3), (2, 3)), {"temperature": math.nan}, "temperature must be positive and finite"),
        (((2, 3), (2, 3)), {"temperature": 1.0, "scale": -1.0}, "scale must be"),
        (((2, 3), (2, 3)), {"temperature": 1.0, "scale": math.nan}, "scale must be"),
        (((2, 3), (2, 3)), {"temperature": 1.0, "reduction": "sum"}, "reduction must be"),
    ],
)
def test_soft_target_refuses(shapes, options, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        soft_target_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), **options)


# --- similarity-preserving


def feature(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_similarity_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # G is the identity
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # rows of G become (1, 1) / sqrt(2)
    expected = 2 * ((1 - math.sqrt(0.5)) ** 2 + 0.5) / 4
    assert similarity_preserving_loss(student, teacher).item() == pytest.approx(expected)


def test_similarity_is_the_naive_formula_for_features_of_any_shape() -> None:
    student, teacher = feature(0, 6, 3, 4, 4), feature(1, 6, 5, 2, 2)

    def normalized(f: Tensor) -> Tensor:
        gram = f.reshape(6, -1) @ f.reshape(6, -1).T
        return gram / gram.norm(dim=1, keepdim=True)

    expected = (normalized(teacher) - normalized(student)).norm() ** 2 / 36
    torch.testing.assert_close(similarity_preserving_loss(student, teacher), expected, rtol=1e-10, atol=0)


def test_similarity_ignores_size_and_rotation_and_order() -> None:
    student, teacher = feature(0, 6, 8), feature(1, 6, 8)
    rotation = torch.linalg.qr(feature(2, 8, 8)).Q
    assert similarity_preserving_loss(student, student).item() == 0
    assert similarity_preserving_loss(1e6 * student @ rotation, student).item() < 1e-24
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(
        similarity_preserving_loss(student[order], teacher[order]), similarity_preserving_loss(student, teacher)
    )


@pytest.mark.parametrize("seed", range(5))
def test_similarity_is_bounded(seed: int) -> None:
    batch = 3
    value = similarity_preserving_loss(feature(seed, batch, 4), feature(seed + 9, batch, 4)).item()
    assert 0 < value <= 4 / batch
    positive = feature(seed, batch, 4).abs(), feature(seed + 9, batch, 4).abs()
    assert similarity_preserving_loss(*positive).item() <= 2 / batch


def test_similarity_gradient() -> None:
    student, teacher = feature(0, 4, 3).requires_grad_(), feature(1, 4, 3).requires_grad_()
    # the detached size makes no difference to the gradient: the loss does not depend on it
    assert torch.autograd.gradcheck(lambda f: similarity_preserving_loss(f, teacher.detach()), student, atol=1e-6)
    similarity_preserving_loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30])
def test_similarity_of_degenerate_features_is_finite(factor: float) -> None:
    student = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * factor).requires_grad_()
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    teacher[0] = 0
    loss = similarity_preserving_loss(student, teacher)
    loss.backward()
    assert bool(loss.isfinite()) and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("shapes", [((4,), (4,)), ((4, 2), (3, 2)), ((4, 2), (4,))])
def test_similarity_refuses(shapes) -> None:
    with pytest.raises(ValueError, match="features"):
        similarity_preserving_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_mixed_labels_are_a_mixture_of_both_losses() -> None:
    z = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    first, second = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 3, 2, 1])
    share = torch.tensor([0.0, 0.25, 0.7, 1.0], dtype=torch.float64)
    log = torch.log_softmax(z, 1)
    rows = range(4)
    expected = -((1 - share) * log[rows, first] + share * log[rows, second]).mean()
    torch.testing.assert_close(cross_entropy_loss(z, first, second, share), expected, rtol=1e-12, atol=0)
    assert torch.equal(cross_entropy_loss(z, first, first, share), cross_entropy_loss(z, first))


def test_mixed_labels_come_with_their_shares() -> None:
    z, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="other_labels and other_share belong together"):
        cross_entropy_loss(z, labels, labels)
    with pytest.raises(ValueError, match=r"other_labels and other_share need the shape of labels"):
        cross_entropy_loss(z, labels, labels, torch.zeros(3))
