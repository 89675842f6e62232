"""w_t of a loss: against gradients, against the one-term identity, and what a step logs of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qkd.config import TermConfig
from qkd.distill import build_terms, cross_entropy_loss, soft_target_loss
from qkd.distill.losses import gradient_rescaling, teacher_confidence_loss
from qkd.distill.rescaling import RESCALING_LIMIT, loss_rescaling, rescaling_facts, soft_targets, step_facts
from qkd.distill.step import DistillStep
from qkd.distill.terms import Outputs
from qkd.training import Batch

LABELS = torch.tensor([0, 3, 2, 1, 1])


def logits(seed: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms(*rows: tuple[str, float, dict[str, float | int | str | bool]]) -> list[TermConfig]:
    return [TermConfig(loss=loss, weight=weight, options=options) for loss, weight, options in rows]


def test_one_term_is_the_published_identity() -> None:
    targets = soft_targets(terms(("cross_entropy", 0.3, {}), ("soft_target", 0.7, {"temperature": 3.0})))
    assert targets is not None and targets.temperature == 3.0 and targets.total_weight == pytest.approx(1)
    expected = gradient_rescaling(logits(0), logits(1), LABELS, teacher_share=0.7, temperature=3.0)
    assert torch.allclose(loss_rescaling(logits(0), logits(1), LABELS, targets), expected, atol=1e-14)


def test_several_terms_are_the_ratio_of_gradients() -> None:
    config = terms(
        ("cross_entropy", 0.5, {}),
        ("soft_target", 0.9, {"temperature": 2.0, "reduction": "mean"}),
        ("teacher_confidence", 1.5, {"temperature": 5.0, "scale": 3.0}),
        ("soft_target", 0.0, {"temperature": 9.0}),
        ("hint", 4.0, {}),
    )
    targets = soft_targets(config)
    assert targets is not None and targets.temperature == 5.0 and len(targets.terms) == 2
    z, v = logits(0).requires_grad_(), logits(1)
    loss = 0.5 * cross_entropy_loss(z, LABELS) + 0.9 * soft_target_loss(z, v, temperature=2.0, reduction="mean")
    loss = loss + 1.5 * teacher_confidence_loss(z, v, LABELS, temperature=5.0, scale=3.0)
    wrong = torch.ones(5, 4, dtype=torch.float64).scatter(1, LABELS[:, None], 0.0)
    ours = (torch.autograd.grad(loss, z)[0] * wrong).sum(1)
    plain = (torch.autograd.grad(cross_entropy_loss(z, LABELS), z)[0] * wrong).sum(1)
    assert torch.allclose(loss_rescaling(z, v, LABELS, targets), ours / plain / 2.9, atol=1e-13)


def test_weights_decay_and_losses_without_soft_targets_have_none() -> None:
    config = [TermConfig(loss="cross_entropy"), TermConfig(loss="soft_target", weight=2.0, decay=0.5)]
    later = soft_targets(config, epoch=3)
    assert later is not None and (later.hard_weight, later.terms[0].weight) == (1.0, 0.25)
    assert later.terms[0].temperature == 4.0  # the table's default
    assert soft_targets(terms(("cross_entropy", 1.0, {}), ("hint", 1.0, {}))) is None


def test_facts_by_hand() -> None:
    w = torch.tensor([3.0, 0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1e30])  # the last counts as 10
    facts = {name: value.item() for name, value in rescaling_facts(w).items()}
    assert facts == pytest.approx({"w_mean": 5.0, "w_std": 10**0.5, "w_p10": 1.0, "w_p50": 5.0, "w_p90": 9.0})
    assert rescaling_facts(-w)["w_p10"].item() == -9 and rescaling_facts(w[:1])["w_std"].item() == 0
    for bad in (torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="at least one image"):
            rescaling_facts(bad)


@pytest.mark.parametrize("kind", ["zeros", "huge", "sure student", "bf16"])
def test_a_step_logs_finite_facts(kind: str) -> None:
    hot = torch.nn.functional.one_hot(LABELS, 4).float()
    student, teacher = {
        "zeros": (0 * hot, 0 * hot),
        "huge": (1e4 * hot, -1e4 * hot),
        "sure student": (200 * hot, hot),  # its own gradient is zero in float32
        "bf16": (logits(0).bfloat16(), logits(1).bfloat16()),
    }[kind]
    config = terms(("cross_entropy", 0.5, {}), ("soft_target", 0.5, {}))
    facts = step_facts(config, Outputs(student, LABELS, teacher), epoch=0)
    assert set(facts) == {"w_mean", "w_std", "w_p10", "w_p50", "w_p90"}
    assert all(torch.isfinite(value) and abs(value) <= RESCALING_LIMIT for value in facts.values())
    assert step_facts(config, Outputs(student, LABELS, None), epoch=0) == {}
    mixed = Outputs(student, LABELS, teacher, other_labels=LABELS, other_share=torch.zeros(5))
    assert step_facts(config, mixed, epoch=0) == {}


def test_the_distillation_step_gives_them() -> None:
    net, teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    config = terms(("cross_entropy", 0.5, {}), ("soft_target", 0.5, {"temperature": 2.0}))
    batch = Batch(torch.rand(5, 1, 2, 2), LABELS, torch.zeros(5, 1, 2, 2, dtype=torch.uint8), 0, 0)
    result = DistillStep(net, teacher, build_terms(config))(batch)
    with torch.no_grad():
        w = gradient_rescaling(net(batch.images), teacher(batch.images), LABELS, teacher_share=0.5, temperature=2.0)
    assert result.facts["w_mean"].item() == pytest.approx(w.mean().item(), rel=1e-5)
    assert not any(value.requires_grad for value in result.facts.values())
    assert DistillStep(net, teacher, build_terms(terms(("cross_entropy", 1.0, {}))))(batch).facts == {}
