"""Losses on features: naive formulas, invariances, gradients, and features of nothing but zeros."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses import (
    angle_relation_loss,
    attention_transfer_loss,
    distance_relation_loss,
    hint_loss,
    information_flow_loss,
    probabilistic_transfer_loss,
    similarity_preserving_loss,
)
from qkd.losses.stable import distances, row_norms, unit_rows

BATCH = 6


def feature(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- stable arithmetic


def test_stable_arithmetic_is_the_plain_one_away_from_zero() -> None:
    rows = feature(0, 4, 3)
    torch.testing.assert_close(row_norms(rows), rows.norm(dim=1), rtol=1e-14, atol=0)
    torch.testing.assert_close(unit_rows(rows), rows / rows.norm(dim=1, keepdim=True), rtol=1e-14, atol=0)
    torch.testing.assert_close(distances(rows), (rows[:, None] - rows[None]).norm(dim=2), rtol=1e-12, atol=0)
    for function in (row_norms, unit_rows):
        assert torch.autograd.gradcheck(function, rows.clone().requires_grad_())


@pytest.mark.parametrize("function", [row_norms, unit_rows, distances])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_stable_arithmetic_of_zeros_and_of_very_small_and_large_rows(function, size: float) -> None:
    rows = (feature(0, 4, 3, dtype=torch.float32) * size).requires_grad_()
    with torch.no_grad():
        rows[1] = rows[0]
    value = function(rows)
    value.sum().backward()
    assert bool(value.isfinite().all()) and bool(rows.grad.isfinite().all())
    if size == 0:
        assert not value.any() and not rows.grad.any()


# --- relational


def naive_distances(f: Tensor) -> Tensor:
    rows = f.reshape(BATCH, -1)
    apart = (rows[:, None] - rows[None]).norm(dim=2)
    return apart / apart[apart > 0].mean()


def naive_angles(f: Tensor) -> Tensor:
    rows = f.reshape(BATCH, -1)
    away = rows[None] - rows[:, None]
    away = functional.normalize(away, dim=2)
    return torch.einsum("ijd,ikd->ijk", away, away)


@pytest.mark.parametrize(
    ("loss", "naive"), [(distance_relation_loss, naive_distances), (angle_relation_loss, naive_angles)]
)
def test_relational_losses_are_the_naive_formulas(loss, naive) -> None:
    student, teacher = feature(0, BATCH, 3, 4, 4), feature(1, BATCH, 10)
    expected = functional.smooth_l1_loss(naive(student), naive(teacher))
    torch.testing.assert_close(loss(student, teacher), expected, rtol=1e-9, atol=1e-12)


def test_relational_losses_by_hand() -> None:
    teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # distances 3, 4, 5; a right angle at the first
    student = torch.tensor([[0.0], [1.0], [2.0]])  # distances 1, 2, 1, on a line
    wanted = [(1 * 3 / 4 - 3 / 4), (2 * 3 / 4 - 1), (1 * 3 / 4 - 5 / 4)]  # over the mean distances 4/3 and 4
    expected = 2 * sum(0.5 * value**2 for value in wanted) / 9
    assert distance_relation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    cosines = [(1, 0.0), (-1, 0.6), (1, 0.8)]  # at each corner: student's and teacher's
    expected = 2 * sum(abs(a - b) - 0.5 if abs(a - b) > 1 else 0.5 * (a - b) ** 2 for a, b in cosines) / 27
    assert angle_relation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [distance_relation_loss, angle_relation_loss])
def test_relational_losses_ignore_size_shift_and_rotation(loss) -> None:
    teacher = feature(0, BATCH, 8)
    rotation = torch.linalg.qr(feature(2, 8, 8)).Q
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-20)
    assert loss(5 * teacher @ rotation + 3, teacher).item() == pytest.approx(0, abs=1e-18)


# --- probabilities of neighbors


def naive_probabilities(f: Tensor) -> Tensor:
    rows = f.reshape(BATCH, -1)
    rows = rows / (rows.norm(dim=1, keepdim=True) + 1e-7)
    kernel = (rows @ rows.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def test_probabilistic_transfer_is_the_naive_formula() -> None:
    student, teacher = feature(0, BATCH, 3, 2, 2), feature(1, BATCH, 5)
    p, q = naive_probabilities(teacher), naive_probabilities(student)
    expected = (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()
    torch.testing.assert_close(probabilistic_transfer_loss(student, teacher), expected, rtol=1e-9, atol=0)
    assert probabilistic_transfer_loss(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)


# --- what a 2-bit student gives


def rounded(rows: Tensor, *, dead: int) -> Tensor:
    """Return rows of which one has become zeros, with a gradient as if it had not (a quantizer's)."""
    kept = torch.ones(len(rows), 1, dtype=rows.dtype)
    kept[dead] = 0
    return rows + (rows * kept - rows).detach()


@pytest.mark.parametrize("loss", [similarity_preserving_loss, probabilistic_transfer_loss, information_flow_loss])
def test_a_dead_image_does_not_drown_the_batch(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = feature(0, 8, 16).requires_grad_(), feature(1, 8, 5)
    (gradient,) = torch.autograd.grad(loss(rounded(student, dead=0), teacher), student)
    sizes = gradient.norm(dim=1)
    assert bool(sizes[1:].min() > 0)
    assert sizes[0] <= 10 * sizes[1:].max()  # the published forms: 1e6 to 1e10 times


def test_angles_of_images_that_lie_close_together() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.rand(6, 64, generator=generator), torch.rand(6, 64, generator=generator)
    student[1] = student[0] + 1e-6 * torch.randn(64, generator=generator)

    def naive(rows: Tensor) -> Tensor:
        edges = functional.normalize(rows[None] - rows[:, None], dim=2)
        return torch.einsum("ijd,ikd->ijk", edges, edges)

    exact = student.double().requires_grad_()
    expected = functional.smooth_l1_loss(naive(exact), naive(teacher.double()))
    expected.backward()
    student.requires_grad_()
    found = angle_relation_loss(student, teacher)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert exact.grad is not None and student.grad is not None
    error = (student.grad - exact.grad).norm() / exact.grad.norm()
    assert error.item() < 1e-3


@pytest.mark.parametrize("loss", [distance_relation_loss, angle_relation_loss])
def test_half_precision_is_widened(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = feature(0, BATCH, 4).half(), feature(1, BATCH, 3).half()
    assert loss(student, teacher).item() == loss(student.float(), teacher.float()).item()


# --- value by value


def test_hint_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert hint_loss(student, teacher).item() == pytest.approx((1 + 4) / 2)


def test_attention_is_the_naive_formula() -> None:
    student, teacher = feature(0, BATCH, 3, 4, 4), feature(1, BATCH, 7, 4, 4)

    def attention(f: Tensor, power: float) -> Tensor:
        return functional.normalize(f.abs().pow(power).mean(1).flatten(1), dim=1)

    for power in (1.0, 2.0, 4.0):
        expected = (attention(student, power) - attention(teacher, power)).square().mean()
        torch.testing.assert_close(
            attention_transfer_loss(student, teacher, power=power), expected, rtol=1e-10, atol=0
        )  # fmt: skip
    assert attention_transfer_loss(7 * teacher, teacher).item() == pytest.approx(0, abs=1e-24)


def test_attention_of_maps_of_two_sizes_is_compared_on_the_smaller_one() -> None:
    student, teacher = feature(0, BATCH, 3, 8, 4), feature(1, BATCH, 3, 4, 4)
    pooled = functional.adaptive_avg_pool2d(student, (4, 4))
    torch.testing.assert_close(attention_transfer_loss(student, teacher), attention_transfer_loss(pooled, teacher))
    torch.testing.assert_close(attention_transfer_loss(teacher, student), attention_transfer_loss(teacher, pooled))


# --- all of them

LOSSES = {
    "distance": distance_relation_loss,
    "angle": angle_relation_loss,
    "probabilistic": probabilistic_transfer_loss,
    "hint": hint_loss,
    "attention": attention_transfer_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    student, teacher = feature(0, 4, 2, 2, 2).requires_grad_(), feature(1, 4, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student, atol=1e-6)
    value = LOSSES[name](student, teacher)
    assert value.shape == () and value.dtype == torch.float64 and value.item() > 0
    value.backward()
    assert teacher.grad is None and bool(student.grad.any())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["zero", "some zero", "constant", "huge", "one hot", "opposite"])
def test_degenerate_features_stay_finite(name: str, kind: str) -> None:
    plain = feature(0, BATCH, 2, 3, 3, dtype=torch.float32)
    some_zero = plain.clone()
    some_zero[::2] = 0
    one_hot = torch.zeros_like(plain)
    one_hot[:, 0, 1, 1] = 1
    made = {
        "zero": torch.zeros_like(plain), "some zero": some_zero, "constant": torch.ones_like(plain),
        "huge": 1e4 * plain, "one hot": one_hot, "opposite": torch.cat([plain[:3], -plain[:3]]),
    }[kind]  # fmt: skip
    for student, teacher in ((made.clone(), plain), (plain.clone(), made), (made.clone(), made)):
        student = student.requires_grad_()
        value = LOSSES[name](student, teacher)
        value.backward()
        assert bool(value.isfinite()) and bool(student.grad.isfinite().all()), (name, kind)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shapes", [((4, 2, 2, 2), (3, 2, 2, 2)), ((4,), (4,))])
def test_refused_features(name: str, shapes) -> None:
    with pytest.raises(ValueError, match="features"):
        LOSSES[name](torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_refused_options_and_shapes() -> None:
    f = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="features of the same shape"):
        hint_loss(f, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\[batch, channels, height, width\]"):
        attention_transfer_loss(f, f)
    for power in (0.5, math.inf):
        with pytest.raises(ValueError, match="power must be at least 1"):
            attention_transfer_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), power=power)
