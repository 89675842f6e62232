"""Losses of data-free methods: their formulas in plain numpy, what each is at its limits, and degenerate inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qkd.losses import (
    batch_norm_loss,
    class_balance_loss,
    class_similarity,
    cmi_inversion_loss,
    competition_loss,
    contrastive_loss,
    dafl_generator_loss,
    data_impression_loss,
    decision_adversarial_loss,
    deep_inversion_loss,
    dfq_generator_loss,
    dirichlet_concentrations,
    disagreement_loss,
    exponential_increment,
    feature_activation_loss,
    gdfq_generator_loss,
    gdfq_student_loss,
    image_diversity_loss,
    logit_distance_loss,
    mode_seeking_loss,
    mskd_generator_loss,
    one_hot_loss,
    rdskd_generator_loss,
    soft_target_loss,
    total_variation_loss,
)

BATCH, CLASSES = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES, LATENTS = drawn(0, BATCH, 2, 4, 4), drawn(1, BATCH, 3)
TEACHER, STUDENT, FEATURE = drawn(2, BATCH, CLASSES) * 2, drawn(3, BATCH, CLASSES) * 2, drawn(4, BATCH, 7)
INPUTS = [drawn(5, BATCH, 3, 2, 2) * 2 + 1, drawn(6, BATCH, 4)]
MEANS, VARIANCES = [drawn(7, 3), drawn(8, 4)], [drawn(9, 3).square(), drawn(10, 4).square()]


def softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z - z.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


V, Z, X, F = TEACHER.numpy(), STUDENT.numpy(), IMAGES.numpy(), FEATURE.numpy()
P, Q = softmax(V), softmax(Z)
CE_OWN = -np.log(P.max(1)).mean()
CE_LABELS = -np.log(P[np.arange(BATCH), LABELS.numpy()]).mean()
PBAR = P.mean(0)
KL_ROWS = (P * (np.log(P) - np.log(Q))).sum(1)
DIVERSITY = 1 / (np.linalg.norm(X[3:] - X[:3]) / np.linalg.norm(P[3:] - P[:3]) + 1e-20)


def norms() -> float:
    total = 0.0
    for x, mean, variance in zip(INPUTS, MEANS, VARIANCES, strict=True):
        values = np.moveaxis(x.numpy(), 1, 0).reshape(x.shape[1], -1)
        total += np.linalg.norm(variance.numpy() - values.var(1)) + np.linalg.norm(mean.numpy() - values.mean(1))
    return total


def squares() -> float:
    parts = []
    for x, mean, variance in zip(INPUTS, MEANS, VARIANCES, strict=True):
        values = np.moveaxis(x.numpy(), 1, 0).reshape(x.shape[1], -1)
        parts.append(((variance.numpy() - values.var(1)) ** 2).mean() + ((mean.numpy() - values.mean(1)) ** 2).mean())
    return float(np.mean(parts))


def variation() -> list[np.ndarray]:
    return [
        X[..., :-1] - X[..., 1:],
        X[..., :-1, :] - X[..., 1:, :],
        X[..., 1:, :-1] - X[..., :-1, 1:],
        X[..., :-1, :-1] - X[..., 1:, 1:],
    ]


def competition(factor: float = 1) -> float:
    """Return the loss; of sure nets the upper clamp, too, says how much they differ."""
    p, q = softmax(factor * Z / 3), softmax(factor * V / 3)
    m = (p + q) / 2
    p, q, m = (np.clip(one, 0.01, 0.99) for one in (p, q, m))
    js = 0.5 * (m * np.log(m / p)).sum() / BATCH + 0.5 * (m * np.log(m / q)).sum() / BATCH
    return float(1 - np.clip(js, 0, 1))


def contrast(cached: bool) -> float:
    local, others = FEATURE.numpy(), drawn(11, BATCH, 7).numpy()
    if cached:
        local = np.concatenate([local, drawn(12, 4, 7).numpy()])
        others = np.concatenate([others, drawn(13, 4, 7).numpy()])
    local, others = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (local, others))
    rows = -np.log(np.diag(softmax(local @ others.T / 0.1)))
    return float(rows[:BATCH].mean() + (rows[BATCH:].mean() if cached else 0))


BN_ARGUMENTS = (INPUTS, MEANS, VARIANCES)
BANK = (drawn(12, 4, 7), drawn(13, 4, 7))
DAFL = 1 * CE_OWN + 5 * (PBAR * np.log10(PBAR)).sum() - 0.1 * np.abs(F).mean()
MSGAN = 1 / (np.abs(X[3:] - X[:3]).mean() / np.abs(LATENTS.numpy()[3:] - LATENTS.numpy()[:3]).mean() + 1e-5)
BALANCE = (PBAR * np.log(PBAR)).sum()
SUM_TV = sum(np.linalg.norm(one) for one in variation())
ONE = torch.tensor(0.7, dtype=torch.float64)
TARGETS = torch.softmax(drawn(14, BATCH, CLASSES), 1)

CASES = {
    "one_hot": (lambda: one_hot_loss(TEACHER), CE_OWN),
    "balance, natural": (lambda: class_balance_loss(TEACHER), BALANCE),
    "balance, base 10": (lambda: class_balance_loss(TEACHER, base="10"), (PBAR * np.log10(PBAR)).sum()),
    "activation": (lambda: feature_activation_loss(FEATURE), -np.abs(F).mean()),
    "diversity": (lambda: image_diversity_loss(IMAGES, TEACHER), DIVERSITY),
    "mode seeking": (lambda: mode_seeking_loss(IMAGES, LATENTS), MSGAN),
    "rdskd": (
        lambda: rdskd_generator_loss(IMAGES, TEACHER, authenticity_reference=0.3, balance_reference=ONE).total,
        math.exp(CE_OWN - 0.3) + math.exp(BALANCE - 0.7) + DIVERSITY,
    ),
    "dafl": (lambda: dafl_generator_loss(TEACHER, FEATURE), DAFL),
    "mskd": (lambda: mskd_generator_loss(IMAGES, LATENTS, TEACHER, FEATURE), DAFL + MSGAN),
    "statistics, norms": (lambda: batch_norm_loss(*BN_ARGUMENTS), norms()),
    "statistics, squares": (lambda: batch_norm_loss(*BN_ARGUMENTS, form="squares"), squares()),
    "variation, norms": (lambda: total_variation_loss(IMAGES), SUM_TV),
    "variation, magnitudes": (
        lambda: total_variation_loss(IMAGES, form="magnitudes"),
        sum(np.abs(one).mean() for one in variation()),
    ),
    "zskt": (lambda: disagreement_loss(STUDENT, TEACHER, reduction="mean"), -KL_ROWS.sum() / (BATCH * CLASSES)),
    "dfq, adversarial": (lambda: disagreement_loss(STUDENT, TEACHER), -KL_ROWS.mean()),
    "dfad": (lambda: disagreement_loss(STUDENT, TEACHER, measure="distance"), -np.abs(Z - V).mean()),
    "dfad, student": (lambda: logit_distance_loss(STUDENT, TEACHER), np.abs(Z - V).mean()),
    "cmi, adversarial": (
        lambda: decision_adversarial_loss(STUDENT, TEACHER),
        -(KL_ROWS * (V.argmax(1) == Z.argmax(1))).mean(),
    ),
    "competition": (lambda: competition_loss(STUDENT, TEACHER), competition()),
    "competition of sure nets": (lambda: competition_loss(20 * STUDENT, 20 * TEACHER), competition(20)),
    "contrast": (lambda: contrastive_loss(FEATURE, drawn(11, BATCH, 7)), contrast(cached=False)),
    "contrast with a bank": (lambda: contrastive_loss(FEATURE, drawn(11, BATCH, 7), *BANK), contrast(cached=True)),
    "dfq": (
        lambda: dfq_generator_loss(STUDENT, TEACHER, ONE),
        -KL_ROWS.mean() + 0.7 + CE_OWN + 20 * BALANCE,
    ),
    "gdfq": (lambda: gdfq_generator_loss(TEACHER, LABELS, ONE), CE_LABELS + 0.1 * 0.7),
    "gdfq, student": (
        lambda: gdfq_student_loss(STUDENT, TEACHER, LABELS),
        -np.log(Q[np.arange(BATCH), LABELS.numpy()]).mean()
        + 400 * (softmax(V / 20) * np.log(softmax(V / 20) / softmax(Z / 20))).sum() / (BATCH * CLASSES),
    ),
    "deep inversion": (
        lambda: deep_inversion_loss(IMAGES, TEACHER, LABELS, ONE, norm_weight=0.01),
        CE_LABELS + 10 * 0.7 + 2.5e-5 * SUM_TV + 0.01 * np.linalg.norm(X),
    ),
    "adaptive deep inversion": (
        lambda: deep_inversion_loss(IMAGES, TEACHER, LABELS, ONE, STUDENT, competition_weight=0.5),
        CE_LABELS + 10 * 0.7 + 2.5e-5 * SUM_TV + 0.5 * competition(),
    ),
    "cmi": (
        lambda: cmi_inversion_loss(TEACHER, LABELS, ONE, 2 * ONE, 3 * ONE),
        0.7 + 0.5 * CE_LABELS + 0.5 * 2.1 + 0.8 * 1.4,
    ),
    "impressions": (
        lambda: data_impression_loss(TEACHER, TARGETS),
        -(TARGETS.numpy() * np.log(softmax(V / 20))).sum(1).mean(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_formula(name: str) -> None:
    """Float64 in, float64 out, a scalar, and the published formula to 1e-9."""
    compute, expected = CASES[name]
    value = compute()
    assert value.dtype == torch.float64 and value.shape == ()
    assert value.item() == pytest.approx(expected, abs=1e-9, rel=1e-9)


# --- at their limits


def test_balance_is_least_for_uniform_classes_and_none_for_one() -> None:
    sure = torch.eye(CLASSES, dtype=torch.float64) * 1000
    assert class_balance_loss(sure).item() == pytest.approx(-math.log(CLASSES), abs=1e-12)
    assert class_balance_loss(sure[:1].expand(4, -1)).item() == pytest.approx(0, abs=1e-12)
    assert one_hot_loss(sure).item() == 0


def test_diversity_falls_as_images_move_apart_at_the_same_outputs() -> None:
    near, far = (image_diversity_loss(IMAGES * factor, TEACHER) for factor in (1, 3))
    assert far.item() == pytest.approx(near.item() / 3, rel=1e-9)


def test_rdskd_with_the_losses_as_references_is_two_and_the_diversity() -> None:
    first = rdskd_generator_loss(IMAGES, TEACHER)
    again = rdskd_generator_loss(
        IMAGES, TEACHER, authenticity_reference=first.authenticity, balance_reference=first.balance
    )
    assert again.total.item() == pytest.approx(2 + first.diversity.item(), abs=1e-12)


@pytest.mark.parametrize("grown", [-1.0, 0.0, 2.0])
def test_a_grown_loss_weighs_more(grown: float) -> None:
    loss = torch.tensor(1.0 + grown, dtype=torch.float64, requires_grad=True)
    exponential_increment(loss, 1.0).backward()
    assert loss.grad.item() == pytest.approx(math.exp(grown), rel=1e-12)


def test_the_limit_is_inactive_on_normal_values_and_keeps_the_slope_beyond() -> None:
    loss = torch.tensor(1000.0, requires_grad=True)
    value = exponential_increment(loss, 0.0)
    value.backward()
    assert value.item() == loss.grad.item() == pytest.approx(math.exp(20), rel=1e-6)
    assert exponential_increment(torch.tensor(19.9), 0.0).item() == pytest.approx(math.exp(19.9), rel=1e-5)


@pytest.mark.parametrize("form", ["norms", "squares"])
def test_statistics_are_zero_where_they_agree_and_the_variance_is_biased(form: str) -> None:
    entering = INPUTS[0].clone().requires_grad_()
    values = entering.detach().transpose(0, 1).flatten(1)
    loss = batch_norm_loss([entering], [values.mean(1)], [values.var(1, correction=0)], form=form)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14) and bool(entering.grad.isfinite().all())
    assert batch_norm_loss([entering], [values.mean(1)], [values.var(1)], form=form).item() > 1e-4


@pytest.mark.parametrize("measure", ["divergence", "distance"])
def test_the_generator_is_against_the_student(measure: str) -> None:
    theirs = disagreement_loss(STUDENT, TEACHER, measure=measure)
    ours = soft_target_loss(STUDENT, TEACHER, temperature=1) if measure == "divergence" else logit_distance_loss(
        STUDENT, TEACHER
    )  # fmt: skip
    assert theirs.item() == pytest.approx(-ours.item(), rel=1e-12)


def test_contrast_of_equal_views_tends_to_the_logarithm_of_the_batch() -> None:
    assert contrastive_loss(FEATURE, FEATURE, temperature=1e9).item() == pytest.approx(math.log(BATCH), abs=1e-8)
    views = FEATURE.clone().requires_grad_()
    contrastive_loss(FEATURE.clone().requires_grad_(), views).backward()
    assert views.grad is None, "global views are constants"


def test_similarities_of_a_nan_are_not_ones() -> None:
    rows = torch.eye(3)
    rows[0, 0] = torch.nan
    assert bool(class_similarity(rows).isnan().any()) and bool(dirichlet_concentrations(rows).isnan().any())


def test_class_similarities_and_beta() -> None:
    weights = drawn(20, CLASSES, 7).numpy()
    rows = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    cosines = rows @ rows.T
    expected = (cosines - cosines.min()) / (cosines.max() - cosines.min())
    similarity = class_similarity(torch.from_numpy(weights))
    np.testing.assert_allclose(similarity.numpy(), expected, atol=1e-12)
    row = (expected[1] - expected[1].min()) / (expected[1].max() - expected[1].min())
    for beta in (1.0, 0.1):
        found = dirichlet_concentrations(similarity, beta=beta)
        np.testing.assert_allclose(found[1].numpy(), beta * row + 1e-4, atol=1e-12)
        released = dirichlet_concentrations(similarity, beta=beta, compat="released")
        np.testing.assert_allclose(released[1].numpy(), row + 1e-4, atol=1e-12)
    assert bool((dirichlet_concentrations(class_similarity(torch.ones(3, 2))) > 0).all())


# --- degenerate inputs: finite in value and gradient, in float32


SURE = torch.zeros(BATCH, CLASSES).index_fill(1, torch.tensor([2]), 1e4)
DEGENERATE = {
    "diversity, saturated teacher": lambda x: image_diversity_loss(x, SURE + 0 * x.mean()),
    "diversity, equal images": lambda x: image_diversity_loss(x * 0 + 1, TEACHER.float()),
    "diversity, both": lambda x: image_diversity_loss(x * 0, SURE + x.mean()),
    "rdskd": lambda x: rdskd_generator_loss(x * 0, SURE * x.mean(), authenticity_reference=-1e4).total,
    "mode seeking, equal latents": lambda x: mode_seeking_loss(x, x * 0),
    "mode seeking, equal images": lambda x: mode_seeking_loss(x * 0, x),
    "balance": lambda x: class_balance_loss(SURE * (1 + x.mean())),
    "statistics of equal images": lambda x: batch_norm_loss([x * 0], [torch.zeros(2)], [torch.zeros(2)]),
    "variation of equal pixels": lambda x: total_variation_loss(x * 0),
    "competition": lambda x: competition_loss(SURE * x.mean(), SURE.flip(1)),
    "contrast of zeros": lambda x: contrastive_loss(x.flatten(1) * 0, x.flatten(1)),
    "agreement": lambda x: decision_adversarial_loss(SURE * (1 + x.mean()), SURE * x.mean()),
    "image of zeros": lambda x: deep_inversion_loss(x * 0, SURE, LABELS, x.sum() * 0, norm_weight=1),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_inputs_are_finite(name: str) -> None:
    images = IMAGES.float().requires_grad_()
    value = DEGENERATE[name](images)
    value.backward()
    assert bool(value.isfinite()) and bool(images.grad.isfinite().all())


@pytest.mark.parametrize(
    ("compute", "match"),
    [
        (lambda: one_hot_loss(torch.zeros(3, 1)), "at least 2 classes"),
        (lambda: class_balance_loss(torch.zeros(3, 1)), "at least 2 classes"),
        (lambda: class_balance_loss(TEACHER, base="2"), "base must be one of e, 10"),
        (lambda: feature_activation_loss(torch.zeros(0, 3)), "empty"),
        (lambda: image_diversity_loss(IMAGES[:5], TEACHER[:5]), "even number of images"),
        (lambda: mode_seeking_loss(IMAGES, LATENTS[:4]), "even number of images"),
        (lambda: exponential_increment(ONE, 0.0, limit=0), "limit must be positive"),
        (lambda: batch_norm_loss([], [], []), "without batch norm has no such statistics"),
        (
            lambda: batch_norm_loss(INPUTS, VARIANCES, VARIANCES[:1]),
            "equal numbers of means, variances and batch norm inputs",
        ),
        (lambda: batch_norm_loss(INPUTS, MEANS[::-1], VARIANCES), "statistics \\[channels\\]"),
        (lambda: batch_norm_loss(*BN_ARGUMENTS, form="l1"), "form must be one of"),
        (lambda: total_variation_loss(torch.zeros(2, 1, 1, 4)), "at least two pixels"),
        (lambda: disagreement_loss(STUDENT, TEACHER, measure="cosine"), "measure must be one of"),
        (lambda: disagreement_loss(STUDENT, TEACHER, reduction="sum"), "reduction must be one of"),
        (lambda: competition_loss(STUDENT, TEACHER, temperature=0), "temperature must be positive"),
        (lambda: contrastive_loss(FEATURE, FEATURE, BANK[0]), "belong together"),
        (lambda: contrastive_loss(FEATURE, FEATURE[:2]), "both views"),
        (lambda: contrastive_loss(FEATURE, FEATURE, BANK[0], BANK[1][:, :2]), "cached views"),
        (lambda: class_similarity(torch.zeros(1, 3)), "at least two classes"),
        (lambda: dirichlet_concentrations(torch.eye(2), compat="tf"), "compat must be one of paper, released"),
        (lambda: dirichlet_concentrations(torch.zeros(2, 3)), "at least two classes"),
        (lambda: data_impression_loss(TEACHER, TEACHER[:2]), "of the same shape"),
        (
            lambda: deep_inversion_loss(IMAGES, TEACHER, LABELS, ONE, competition_weight=1.0),
            "competition_weight needs student_logits",
        ),
    ],
)
def test_refusals(compute, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compute()
