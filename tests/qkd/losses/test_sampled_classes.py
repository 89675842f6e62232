"""Soft targets from drawn classes: exact with every class, unbiased for fewer, less noisy by a good proposal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qkd.losses import (
    SampledClasses,
    class_proposal,
    draw_classes,
    estimated_log_normalizers,
    every_class,
    sampled_soft_target_loss,
    soft_target_loss,
)
from quantizers.tensor_quant import LsqWeightQuant

BATCH, CLASSES, FEATURES, DRAWN = 3, 40, 5, 8


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FEATURE, ROWS, BIAS = drawn(0, BATCH, FEATURES), drawn(1, CLASSES, FEATURES), drawn(2, CLASSES)
TEACHER = drawn(3, 1, CLASSES) * 3 + drawn(4, BATCH, CLASSES) * 0.3
LOGITS = FEATURE @ ROWS.T + BIAS


def gradients(sampled: SampledClasses, constants: Tensor, temperature: float = 1.0) -> tuple[float, Tensor, Tensor]:
    """Return value and gradients with respect to features and rows."""
    feature, rows = FEATURE.clone().requires_grad_(), ROWS.clone().requires_grad_()
    targets = torch.log_softmax(TEACHER / temperature, 1)[:, sampled.classes]
    loss = sampled_soft_target_loss(feature, rows, BIAS, targets, sampled, constants, temperature=temperature)
    loss.backward()
    assert rows.grad.is_sparse, "only drawn rows"
    return loss.item(), feature.grad, rows.grad.to_dense()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_every_class_and_exact_normalizers_are_plain_soft_targets(temperature: float) -> None:
    exact = torch.logsumexp(LOGITS / temperature, 1)
    value, by_feature, by_rows = gradients(every_class(CLASSES), exact, temperature)
    feature, rows = FEATURE.clone().requires_grad_(), ROWS.clone().requires_grad_()
    full = soft_target_loss(feature @ rows.T + BIAS, TEACHER, temperature=temperature)
    full.backward()
    assert value == pytest.approx(full.item(), abs=1e-9)
    torch.testing.assert_close(by_feature, feature.grad, atol=1e-9, rtol=0)
    torch.testing.assert_close(by_rows, rows.grad, atol=1e-9, rtol=0)


def test_it_is_a_bound_for_other_normalizers() -> None:
    exact = torch.logsumexp(LOGITS, 1)
    divergence = gradients(every_class(CLASSES), exact)[0]
    for shift in (-0.5, 0.5):
        assert gradients(every_class(CLASSES), exact + shift)[0] > divergence


@pytest.mark.parametrize("kind", ["difference", "teacher", "uniform"])
def test_the_gradient_is_unbiased(kind: str) -> None:
    """Its mean over draws is the full gradient: a z-test of every entry."""
    exact = torch.logsumexp(LOGITS, 1)
    _, full, _ = gradients(every_class(CLASSES), exact)
    proposal = class_proposal(torch.softmax(LOGITS, 1), torch.softmax(TEACHER, 1), kind=kind)
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([gradients(draw_classes(proposal, DRAWN, generator), exact)[1] for _ in range(600)])
    z = (found.mean(0) - full) / (found.std(0) / len(found) ** 0.5)
    assert float(z.abs().max()) < 4


def test_a_dynamic_proposal_has_less_variance_than_a_uniform_one() -> None:
    exact = torch.logsumexp(LOGITS, 1)
    variances = {}
    for kind in ("difference", "uniform"):
        proposal = class_proposal(torch.softmax(LOGITS, 1), torch.softmax(TEACHER, 1), kind=kind)
        generator = torch.Generator().manual_seed(1)
        found = torch.stack([gradients(draw_classes(proposal, DRAWN, generator), exact)[1] for _ in range(200)])
        variances[kind] = float(found.var(0).sum())
    assert variances["difference"] < 0.5 * variances["uniform"]


def test_normalizers_from_a_draw() -> None:
    exact = torch.logsumexp(LOGITS, 1)
    torch.testing.assert_close(estimated_log_normalizers(FEATURE, ROWS, BIAS, every_class(CLASSES)), exact)
    proposal = torch.full((CLASSES,), 1 / CLASSES)
    generator = torch.Generator().manual_seed(0)
    found = torch.stack(
        [estimated_log_normalizers(FEATURE, ROWS, BIAS, draw_classes(proposal, 8, generator)) for _ in range(2000)]
    )
    torch.testing.assert_close(found.exp().mean(0), exact.exp(), rtol=0.1, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_normalizers_of_every_class_make_it_plain_soft_targets(temperature: float) -> None:
    constants = estimated_log_normalizers(FEATURE, ROWS, BIAS, every_class(CLASSES), temperature=temperature)
    full = soft_target_loss(LOGITS, TEACHER, temperature=temperature)
    assert gradients(every_class(CLASSES), constants, temperature)[0] == pytest.approx(full.item(), abs=1e-9)


@pytest.mark.parametrize("kind", ["parameter", "clamped", "low_bit", "half"])
def test_it_trains_every_kind_of_last_layer(kind: str) -> None:
    """A bias, and rows that are computed from a parameter, as those of a low-bit layer are."""
    layer, feature = nn.Linear(FEATURES, CLASSES), FEATURE.float()
    weight, bias = layer.weight, layer.bias
    rows = {
        "parameter": weight,
        "clamped": weight.clamp(-0.1, 0.1),
        "low_bit": LsqWeightQuant(2, -2, 1, weight, True).values(weight),
        "half": weight.bfloat16(),
    }[kind]
    sampled, targets = every_class(CLASSES), torch.log_softmax(TEACHER.float(), 1)
    constants = estimated_log_normalizers(feature, rows, bias, sampled)
    loss = sampled_soft_target_loss(feature, rows, bias, targets, sampled, constants)
    found = torch.autograd.grad(loss, (weight, bias), retain_graph=True)
    full = soft_target_loss(feature @ rows.float().T + bias, TEACHER.float(), temperature=1.0)
    expected = torch.autograd.grad(full, (weight, bias))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to_dense(), other)


def test_a_proposal_need_not_sum_to_one() -> None:
    drawn_evenly = draw_classes(torch.ones(4), 2, torch.Generator())
    assert drawn_evenly.weights.tolist() == [2.0, 2.0]
    assert draw_classes(torch.ones(4).bfloat16(), 3, torch.Generator()).weights.dtype == torch.float32


def test_equal_nets_are_drawn_from_evenly() -> None:
    same = torch.softmax(LOGITS, 1)
    torch.testing.assert_close(class_proposal(same, same), torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64))


@pytest.mark.parametrize(
    ("compute", "match"),
    [
        (lambda: class_proposal(LOGITS, TEACHER[:1]), "of the same shape"),
        (lambda: class_proposal(LOGITS, TEACHER, kind="rank"), "kind must be one of"),
        (lambda: class_proposal(LOGITS, TEACHER, uniform_share=0), "uniform_share must be in"),
        (lambda: draw_classes(torch.zeros(3), 2, torch.Generator()), "positive, finite probabilities"),
        (lambda: class_proposal(LOGITS, TEACHER), "take the softmax of logits first"),
        (lambda: draw_classes(torch.tensor([1.0, torch.nan]), 2, torch.Generator()), "positive, finite probabilities"),
        (lambda: draw_classes(torch.tensor([1.0, torch.inf]), 2, torch.Generator()), "positive, finite probabilities"),
        (
            lambda: draw_classes(torch.ones(3, dtype=torch.int64), 2, torch.Generator()),
            "positive, finite probabilities",
        ),
        (lambda: draw_classes(torch.ones(3), 0, torch.Generator()), "positive count"),
        (lambda: every_class(0), "classes must be positive"),
        (lambda: estimated_log_normalizers(FEATURE, ROWS[:, :2], None, every_class(3)), "needs features"),
        (
            lambda: sampled_soft_target_loss(FEATURE, ROWS, BIAS, TEACHER[:, :3], every_class(4), TEACHER[:, 0]),
            "the teacher's logarithms",
        ),
    ],
)
def test_refusals(compute, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compute()
