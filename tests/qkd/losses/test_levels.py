"""The levels of knowledge: worked numbers, the identities between them, gradients, and extreme teachers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses import (
    class_relation_loss,
    class_relation_targets,
    cross_entropy_loss,
    decoupled_loss,
    equivalent_label_smoothing,
    gradient_rescaling,
    soft_target_loss,
    teacher_confidence_loss,
    top_classes_loss,
)

BATCH, CLASSES = 5, 7
LABELS = torch.tensor([0, 3, 6, 1, 1])


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def soft_cross_entropy(target: Tensor, z: Tensor) -> Tensor:
    return -(target * functional.log_softmax(z, 1)).sum(1).mean()


def confidence_target(p: Tensor) -> Tensor:
    rho = ((1 - p.gather(1, LABELS[:, None])) / (CLASSES - 1)).expand(-1, CLASSES).clone()
    return rho.scatter(1, LABELS[:, None], p.gather(1, LABELS[:, None]))


# --- decoupled


def test_decoupled_by_hand() -> None:
    teacher = torch.tensor([[math.log(6), math.log(3), math.log(1)]])  # 0.6, 0.3, 0.1
    student = torch.zeros(1, 3)
    target = 0.6 * math.log(0.6 * 3) + 0.4 * math.log(0.4 * 1.5)
    others = 0.75 * math.log(0.75 * 2) + 0.25 * math.log(0.25 * 2)
    found = decoupled_loss(student, teacher, torch.tensor([0]), temperature=1.0, target_weight=2.0, others_weight=5.0)
    assert found.item() == pytest.approx(2 * target + 5 * others, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_are_the_decoupled_parts_put_together(temperature: float) -> None:
    z, v = logits(0), logits(1)
    p = (v / temperature).softmax(1).gather(1, LABELS[:, None])[:, 0]
    total = torch.zeros((), dtype=torch.float64)
    for image in range(BATCH):
        part = decoupled_loss(
            z[image : image + 1], v[image : image + 1], LABELS[image : image + 1], temperature=temperature,
            target_weight=1.0, others_weight=float(1 - p[image]),
        )  # fmt: skip
        total += part / BATCH
    torch.testing.assert_close(total, soft_target_loss(z, v, temperature=temperature), rtol=1e-9, atol=0)


# --- teacher confidence


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_confidence_is_the_naive_formula(temperature: float) -> None:
    z, v = logits(0), logits(1)
    rho, q = confidence_target((v / temperature).softmax(1)), (z / temperature).softmax(1)
    naive = (rho * (rho.log() - q.log())).sum() / BATCH * temperature**2
    torch.testing.assert_close(teacher_confidence_loss(z, v, LABELS, temperature=temperature), naive, rtol=1e-9, atol=0)


def test_constant_confidence_is_label_smoothing() -> None:
    z, confidence = logits(0), 0.7
    rest = (1 - confidence) / (CLASSES - 1)
    v = torch.full((BATCH, CLASSES), math.log(rest), dtype=torch.float64)
    v.scatter_(1, LABELS[:, None], math.log(confidence))
    smoothing = equivalent_label_smoothing(v, LABELS).item()
    assert smoothing == pytest.approx(CLASSES * (1 - confidence) / (CLASSES - 1))
    entropy = -(confidence * math.log(confidence) + (1 - confidence) * math.log(rest))
    expected = cross_entropy_loss(z, LABELS, label_smoothing=smoothing) - entropy
    torch.testing.assert_close(teacher_confidence_loss(z, v, LABELS, temperature=1.0), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_without_doubt_gives_hard_labels(dtype: torch.dtype) -> None:
    z = logits(0, dtype).requires_grad_()
    v = 1e4 * functional.one_hot(LABELS, CLASSES).to(dtype)
    loss = teacher_confidence_loss(z, v, LABELS, temperature=1.0)
    torch.testing.assert_close(loss, cross_entropy_loss(z, LABELS))
    loss.backward()
    assert bool(z.grad.isfinite().all())


# --- top classes


def test_all_classes_are_the_soft_targets_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.float64):
        z, v = logits(0, dtype), logits(1, dtype)
        for temperature in (1.0, 4.0):
            plain = soft_target_loss(z, v, temperature=temperature)
            assert torch.equal(top_classes_loss(z, v, temperature=temperature, classes=CLASSES), plain)


def test_one_class_is_the_confidence_in_the_teachers_best() -> None:
    z, v = logits(0), logits(1)
    expected = teacher_confidence_loss(z, v, v.argmax(1), temperature=3.0)
    torch.testing.assert_close(top_classes_loss(z, v, temperature=3.0, classes=1), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("remainder", ["uniform", "renormalize"])
def test_top_classes_are_the_naive_formula(remainder: str) -> None:
    z, v, k = logits(0), logits(1), 3
    p, q = v.softmax(1), z.softmax(1)
    kept = torch.zeros_like(p).scatter(1, p.topk(k).indices, 1.0)
    inside = (p * kept).sum(1, keepdim=True)
    rho = p * kept + (1 - kept) * (1 - inside) / (CLASSES - k) if remainder == "uniform" else p * kept / inside
    torch.testing.assert_close(rho.sum(1), torch.ones(BATCH, dtype=torch.float64))
    naive = (torch.special.xlogy(rho, rho) - rho * q.log()).sum() / BATCH
    found = top_classes_loss(z, v, temperature=1.0, classes=k, remainder=remainder)
    torch.testing.assert_close(found, naive, rtol=1e-9, atol=0)


# --- class relation


def test_targets_of_a_class_are_the_same_for_every_image() -> None:
    weights = torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    targets = class_relation_targets(weights, sharpness=0.5, one_hot_share=0.25)
    rows = weights / weights.norm(dim=1, keepdim=True)
    naive = 0.25 * torch.eye(CLASSES, dtype=torch.float64) + 0.75 * (rows @ rows.T / 0.5).softmax(1)
    torch.testing.assert_close(targets, naive, rtol=1e-12, atol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(CLASSES, dtype=torch.float64))
    z = logits(0)
    rho, q = targets[LABELS], (z / 2).softmax(1)
    expected = (rho * (rho.log() - q.log())).sum() / BATCH * 4
    found = class_relation_loss(z, LABELS, weights, temperature=2.0, sharpness=0.5, one_hot_share=0.25)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_small_sharpness_does_not_underflow(share: float) -> None:
    weights = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    z, labels = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.tensor([0, 1])
    loss = class_relation_loss(z, labels, weights, temperature=4.0, sharpness=0.01, one_hot_share=share)
    loss.backward()
    one_hot = soft_target_loss(z, 1e3 * functional.one_hot(labels, 3).float(), temperature=4.0)
    assert loss.item() == pytest.approx(one_hot.item(), rel=1e-5)  # so sharp a relation is the label
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_classes_that_are_all_alike_give_label_smoothing() -> None:
    simplex = torch.eye(CLASSES, dtype=torch.float64) - 1 / CLASSES  # every pair of rows at the same angle
    targets = class_relation_targets(simplex)
    off = targets[~torch.eye(CLASSES, dtype=torch.bool)]
    assert (off.max() - off.min()).item() < 1e-15


# --- gradient rescaling


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (4.0, None), (4.0, 1.0)])
def test_rescaling_is_what_autograd_gives(temperature: float, scale: float | None) -> None:
    z, v, share = logits(0).requires_grad_(), logits(1), 0.9
    c = temperature**2 if scale is None else scale
    soft = soft_cross_entropy((v / temperature).softmax(1), z / temperature)
    hard = functional.cross_entropy(z, LABELS)
    (mixed,) = torch.autograd.grad((1 - share) * hard + share * c * soft, z, retain_graph=True)
    (plain,) = torch.autograd.grad(hard, z)
    wrong = ~functional.one_hot(LABELS, CLASSES).bool()
    ratio = (mixed * wrong).sum(1) / (plain * wrong).sum(1)
    found = gradient_rescaling(z, v, LABELS, teacher_share=share, temperature=temperature, scale=scale)
    torch.testing.assert_close(found, ratio, rtol=1e-9, atol=1e-12)


def test_rescaling_is_small_where_the_student_is_surer() -> None:
    v = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    z = 3 * functional.one_hot(LABELS, CLASSES).double()
    assert bool((gradient_rescaling(z, v, LABELS, teacher_share=0.5, temperature=1.0) < 0.5).all())
    assert bool((gradient_rescaling(v, z, LABELS, teacher_share=0.5, temperature=1.0) > 0.5).all())
    sure = 1e4 * functional.one_hot(LABELS, CLASSES).float()
    for dtype in (torch.float32, torch.float64):  # both probabilities round to 1 in float32
        student, teacher = torch.tensor([[20.0, 0, 0]], dtype=dtype), torch.tensor([[21.0, 0, 0]], dtype=dtype)
        found = gradient_rescaling(student, teacher, torch.tensor([0]), teacher_share=0.9, temperature=1.0)
        q, p = (2 / (2 + math.exp(margin)) for margin in (20, 21))
        assert found.item() == pytest.approx(0.1 + 0.9 * (q - p) / q, rel=1e-6)
    assert bool(gradient_rescaling(sure, v.float(), LABELS, teacher_share=0.5, temperature=1.0).isfinite().all())


# --- all of them

CALLS = {
    "decoupled": lambda z, v: decoupled_loss(z, v, LABELS, temperature=4.0),
    "confidence": lambda z, v: teacher_confidence_loss(z, v, LABELS, temperature=4.0),
    "relation": lambda z, v: class_relation_loss(z, LABELS, v.T.contiguous().T[:CLASSES].mT @ v, temperature=4.0),
    "top": lambda z, v: top_classes_loss(z, v, temperature=4.0, classes=2),
    "top renormalized": lambda z, v: top_classes_loss(z, v, temperature=4.0, classes=2, remainder="renormalize"),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str) -> None:
    z, v = logits(0).requires_grad_(), logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: CALLS[name](z, v), z)
    value = CALLS[name](z, v)
    assert value.shape == () and value.dtype == torch.float64 and value.item() > 0
    value.backward()
    assert v.grad is None, "the teacher is a constant"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["zero", "constant", "huge", "one hot"])
def test_degenerate_logits_stay_finite(name: str, kind: str) -> None:
    made = {
        "zero": torch.zeros(BATCH, CLASSES),
        "constant": torch.full((BATCH, CLASSES), 3.0),
        "huge": 1e4 * logits(3, torch.float32),
        "one hot": 1e4 * functional.one_hot(LABELS, CLASSES).float(),
    }[kind]
    for z, v in ((made.clone(), logits(1, torch.float32)), (logits(0, torch.float32), made), (made.clone(), made)):
        z = z.requires_grad_()
        value = CALLS[name](z, v)
        value.backward()
        assert bool(value.isfinite()) and bool(z.grad.isfinite().all()), (name, kind)


Z = torch.zeros(2, 3)
Y = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: decoupled_loss(Z, torch.zeros(2, 4), Y, temperature=1.0), "the same shape"),
        (lambda: decoupled_loss(torch.zeros(2, 1), torch.zeros(2, 1), Y, temperature=1.0), "at least 2 classes, got 1"),
        (lambda: decoupled_loss(Z, Z, Y[:1], temperature=1.0), r"labels \[batch\]"),
        (lambda: decoupled_loss(Z, Z, Y, temperature=0.0), "temperature must be positive"),
        (lambda: decoupled_loss(Z, Z, Y, temperature=1.0, others_weight=-1.0), "others_weight must be finite"),
        (lambda: decoupled_loss(Z, Z, Y, temperature=1.0, target_weight=math.nan), "target_weight must be finite"),
        (lambda: teacher_confidence_loss(Z, Z, Y, temperature=1.0, scale=-1.0), "scale must be"),
        (lambda: teacher_confidence_loss(torch.zeros(2, 1), torch.zeros(2, 1), Y, temperature=1.0), "2 classes"),
        (lambda: top_classes_loss(Z, Z, temperature=1.0, classes=4), "classes must be 1 to 3"),
        (lambda: top_classes_loss(Z, Z, temperature=1.0, classes=0), "classes must be 1 to 3"),
        (lambda: top_classes_loss(Z, Z, temperature=1.0, classes=1, remainder="none"), "remainder must be one of"),
        (lambda: class_relation_loss(Z, Y, torch.zeros(4, 5), temperature=1.0), r"logits \[batch, 4\]"),
        (lambda: class_relation_targets(torch.zeros(4)), "class weights"),
        (lambda: class_relation_targets(torch.zeros(4, 2), sharpness=0.0), "sharpness must be positive"),
        (lambda: class_relation_targets(torch.zeros(4, 2), one_hot_share=1.0), "one_hot_share must be in"),
        (lambda: gradient_rescaling(Z, Z, Y, teacher_share=1.5, temperature=1.0), "teacher_share must be in"),
        (lambda: equivalent_label_smoothing(Z, Y, temperature=-1.0), "temperature must be positive"),
    ],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("remainder", ["uniform", "renormalize"])
def test_of_classes_that_are_as_likely_the_first_count(remainder: str) -> None:
    """Four of six classes tie for two places."""
    teacher = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    clear = torch.tensor([[1.0, 3.0, 2.0, 2.0 - 1e-9, 2.0 - 2e-9, 2.0 - 3e-9]], dtype=torch.float64)
    z = torch.arange(6, dtype=torch.float64)[None]
    options = {"temperature": 1.0, "classes": 3, "remainder": remainder}
    tied, told = (top_classes_loss(z, one, **options).item() for one in (teacher, clear))
    assert tied == pytest.approx(told, abs=1e-7)


# --- high temperatures


@pytest.mark.parametrize("temperature", [30.0, 1e3, 1e5, 1e6])
def test_float32_keeps_its_digits_at_high_temperatures(temperature: float) -> None:
    """A divergence of 1e-12 times the temperature squared: in float32, rounding was all that was left of it."""
    z, v = logits(0), logits(1)
    losses = [
        lambda a, b: soft_target_loss(a, b, temperature=temperature),
        lambda a, b: decoupled_loss(a, b, LABELS, temperature=temperature),
        lambda a, b: teacher_confidence_loss(a, b, LABELS, temperature=temperature),
        lambda a, b: top_classes_loss(a, b, classes=3, temperature=temperature),
        lambda a, b: gradient_rescaling(a, b, LABELS, teacher_share=0.5, temperature=temperature).sum(),
    ]
    for loss in losses:
        student = z.float().requires_grad_()
        found, exact = loss(student, v.float()), loss(z.float().double(), v.float().double())
        assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=1e-5)
        if found.requires_grad:
            (gradient,) = torch.autograd.grad(found, student)
            double = z.float().double().requires_grad_()
            (expected,) = torch.autograd.grad(loss(double, v.float().double()), double)
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-7, 1e7, 1e300])
def test_temperatures_that_leave_nothing_but_rounding_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be from 1e-06 to 1e\+06"):
        soft_target_loss(logits(0), logits(1), temperature=temperature)
