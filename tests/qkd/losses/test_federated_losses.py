"""Losses of federated distillation: formulas in plain numpy, limits and identities, and what each refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkd.losses import (
    class_logits_loss,
    class_mean_logits,
    cross_entropy_loss,
    fedgen_client_loss,
    fedgen_generator_loss,
    fedgen_weight,
    label_shares,
    latent_diversity_loss,
    proximal_loss,
)

Array = NDArray[np.float64]
LABELS = torch.tensor([0, 2, 1, 2])
COUNTS = torch.tensor([[5, 0, 1], [5, 3, 0]])


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def divergence(target: Array, own: Array) -> float:
    p, q = log_softmax(target), log_softmax(own)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def nll(logits: Array, labels: Array) -> Array:
    return np.asarray(-log_softmax(logits)[np.arange(len(labels)), labels])


def diversity(noise: Array, latents: Array) -> float:
    total = 0.0
    for i in range(len(noise)):
        for j in range(len(noise)):
            total += ((noise[i] - noise[j]) ** 2).mean() * np.abs(latents[i] - latents[j]).mean()
    return float(np.exp(-total / len(noise) ** 2))


def test_shares_are_of_each_class() -> None:
    expected = torch.tensor([[0.5, 0.0, 1.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(label_shares(COUNTS), expected)
    assert torch.equal(label_shares(torch.tensor([[4, 0]])), torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="none negative"):
        label_shares(torch.tensor([[-1]]))


def test_diversity_is_the_formula_and_one_for_a_constant_generator() -> None:
    noise, latents = drawn(0, 5, 3), drawn(1, 5, 4)
    value = latent_diversity_loss(noise, latents)
    assert value.dtype == torch.float64 and value.item() == pytest.approx(
        diversity(noise.numpy(), latents.numpy()), abs=1e-12
    )
    assert 0 < value.item() < 1
    assert latent_diversity_loss(noise, torch.ones(5, 4)).item() == 1
    with pytest.raises(ValueError, match="one batch"):
        latent_diversity_loss(noise, latents[:3])


@pytest.mark.parametrize(("alpha", "eta", "beta"), [(1.0, 1.0, 0.0), (0.5, 2.0, 0.3)])
def test_the_generators_loss_is_the_formula(alpha: float, eta: float, beta: float) -> None:
    logits, student, noise, latents = drawn(2, 2, 4, 3), drawn(3, 4, 3), drawn(4, 4, 2), drawn(5, 4, 6)
    weights = (COUNTS.numpy() / COUNTS.numpy().sum(0))[:, LABELS.numpy()]
    errors = np.stack([nll(one, LABELS.numpy()) for one in logits.numpy()])
    ensemble = (weights[:, :, None] * logits.numpy()).sum(0)
    expected = alpha * (weights * errors).mean(1).sum() + eta * diversity(noise.numpy(), latents.numpy())
    expected -= beta * divergence(ensemble, student.numpy())
    value = fedgen_generator_loss(
        logits, LABELS, label_shares(COUNTS), noise, latents, alpha=alpha, eta=eta, beta=beta, student_logits=student
    )
    assert value.item() == pytest.approx(expected, abs=1e-9)


def test_one_client_has_weight_one() -> None:
    """With one client the first term is the plain cross-entropy of its last layer."""
    logits = drawn(6, 1, 4, 3)
    shares = label_shares(torch.tensor([[2, 3, 4]]))
    value = fedgen_generator_loss(logits, LABELS, shares, drawn(0, 4, 2), torch.ones(4, 2), eta=0.0)
    assert value.item() == pytest.approx(cross_entropy_loss(logits[0], LABELS).item(), abs=1e-12)


def test_the_generators_loss_refuses() -> None:
    good = (drawn(2, 2, 4, 3), LABELS, label_shares(COUNTS), drawn(4, 4, 2), drawn(5, 4, 6))
    with pytest.raises(ValueError, match="needs student_logits"):
        fedgen_generator_loss(*good, beta=0.1)
    with pytest.raises(ValueError, match="the same shape"):
        fedgen_generator_loss(*good, student_logits=drawn(1, 4, 2))
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        fedgen_generator_loss(*good, alpha=-1.0)
    with pytest.raises(ValueError, match=r"shares \[clients, classes\]"):
        fedgen_generator_loss(good[0], LABELS, label_shares(COUNTS[:1]), good[3], good[4])


def test_the_clients_loss_is_the_formula_and_its_target_a_constant() -> None:
    logits, generated, target = drawn(7, 4, 3), drawn(8, 6, 3), drawn(9, 4, 3).requires_grad_()
    asked = torch.tensor([0, 1, 2, 0, 1, 2])
    own = logits.clone().requires_grad_()
    value = fedgen_client_loss(own, LABELS, generated, asked, target, weight=0.7)
    expected = nll(logits.numpy(), LABELS.numpy()).mean() + 6 / 4 * 0.7 * nll(generated.numpy(), asked.numpy()).mean()
    expected += 0.7 * divergence(target.detach().numpy(), logits.numpy())
    assert value.item() == pytest.approx(expected, abs=1e-9)
    value.backward()
    assert target.grad is None and own.grad is not None and bool(own.grad.any())
    plain = fedgen_client_loss(logits, LABELS, generated, asked, target, weight=0.0)
    assert plain.item() == pytest.approx(cross_entropy_loss(logits, LABELS).item(), abs=1e-12)


def test_the_weight_of_latents_falls_to_its_least() -> None:
    assert fedgen_weight(3) == pytest.approx(10 * 0.98**3, abs=1e-12)
    assert fedgen_weight(10_000) == 1e-4
    assert fedgen_weight(3, start=0.0) == 0 and fedgen_weight(3, start=1e-6) == 1e-6
    with pytest.raises(ValueError, match="rounds from 0"):
        fedgen_weight(-1)


def test_the_proximal_term_is_the_formula_and_pulls_back() -> None:
    own, sent = [drawn(1, 2, 3).requires_grad_(), drawn(2, 4).requires_grad_()], [drawn(3, 2, 3), drawn(4, 4)]
    value = proximal_loss(own, sent, mu=0.3)
    moved = sum(((a.detach().numpy() - b.numpy()) ** 2).sum() for a, b in zip(own, sent, strict=True))
    assert value.item() == pytest.approx(0.15 * moved, abs=1e-9)
    value.backward()
    assert torch.allclose(own[0].grad, 0.3 * (own[0].detach() - sent[0]), atol=1e-12)  # type: ignore[arg-type]
    assert proximal_loss(sent, sent, mu=1.0).item() == 0
    with pytest.raises(ValueError, match="same shapes"):
        proximal_loss(own, sent[:1], mu=1.0)
    with pytest.raises(ValueError, match="mu must be"):
        proximal_loss(own, sent, mu=-1.0)


def test_mean_logits_of_classes() -> None:
    logits = drawn(1, 4, 3)
    means, counts = class_mean_logits(logits, LABELS, classes=3)
    assert counts.tolist() == [1, 1, 2]
    assert torch.allclose(means[2], (logits[1] + logits[3]) / 2, atol=1e-12)
    means, counts = class_mean_logits(logits[:1], LABELS[:1], classes=3)
    assert counts.tolist() == [1, 0, 0] and not bool(means[1:].any())
    means, counts = class_mean_logits(torch.ones(70_000, 2).half(), torch.zeros(70_000).long(), classes=2)
    assert counts.tolist() == [70_000, 0] and means[0].tolist() == [1, 1] and means.dtype == torch.float32
    with pytest.raises(ValueError, match="logits must be floating"):
        class_mean_logits(torch.ones(4, 3).long(), LABELS, classes=3)
    with pytest.raises(ValueError, match="logits of 4 classes"):
        class_mean_logits(logits, LABELS, classes=4)


def test_following_mean_logits_is_the_formula() -> None:
    logits, rows, known = drawn(2, 4, 3), drawn(3, 3, 3), torch.tensor([1.0, 0.0, 1.0])
    value = class_logits_loss(logits, LABELS, rows, known, temperature=2.0)
    total = sum(
        divergence(rows[[label]].numpy() / 2, logits[[row]].numpy() / 2)
        for row, label in enumerate(LABELS.tolist()) if bool(known[label])
    )  # fmt: skip
    assert value.item() == pytest.approx(4 * total / 4, abs=1e-9)
    assert class_logits_loss(rows[LABELS], LABELS, rows, known).item() == pytest.approx(0, abs=1e-12)
    assert class_logits_loss(logits, LABELS, rows, torch.zeros(3)).item() == 0
    with pytest.raises(ValueError, match=r"class logits \[3, 3\]"):
        class_logits_loss(logits, LABELS, rows[:2], known)
