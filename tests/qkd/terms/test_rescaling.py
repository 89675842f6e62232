"""w_t of a loss: against gradients, against the one-term identity, and what a step logs of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qkd.config import TermConfig
from qkd.losses import cross_entropy_loss, gradient_rescaling, soft_target_loss, teacher_confidence_loss
from qkd.terms import build_terms
from qkd.terms.rescaling import LEAST_DOUBT, image_gradients, rescaling_facts, soft_targets, step_facts, summarize
from qkd.terms.step import DistillStep
from qkd.terms.weighting import Outputs
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
    hard, loss = image_gradients(logits(0), logits(1), LABELS, targets)
    assert torch.allclose(hard, 1 - logits(0).softmax(1)[range(5), LABELS], atol=1e-14)
    assert torch.allclose(loss / hard, expected, atol=1e-14)


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
    hard, mixed = image_gradients(z, v, LABELS, targets)
    assert torch.allclose(mixed, 5 * ours / 2.9, atol=1e-13)  # losses are means over five images
    assert torch.allclose(hard, 5 * plain, atol=1e-13) and not mixed.requires_grad


def test_weights_decay_and_losses_without_soft_targets_have_none() -> None:
    config = [TermConfig(loss="cross_entropy"), TermConfig(loss="soft_target", weight=2.0, decay=0.5)]
    later = soft_targets(config, epoch=3)
    assert later is not None and (later.hard_weight, later.terms[0].weight) == (1.0, 0.25)
    assert later.terms[0].temperature == 4.0  # the table's default
    assert soft_targets(terms(("cross_entropy", 1.0, {}), ("hint", 1.0, {}))) is None


def test_facts_by_hand() -> None:
    hard = torch.tensor([0.5, 0.25, LEAST_DOUBT / 2, 0.0])  # w_t is 1, 3, and of no account twice
    facts = rescaling_facts(hard, torch.tensor([0.5, 0.75, 7.0, -1.0]))
    values = {name: value.item() for name, value in facts.items()}
    assert values == pytest.approx(
        {"hard_gradient": 0.775 / 4, "loss_gradient": 7.25 / 4, "w_counted": 0.5, "w_sum": 1.0, "w_square": 2.5}
    )
    assert summarize(values) == pytest.approx({"w_mean": 2, "w_std": 1, "w_share": 0.5, "w_total": 7.25 / 0.775})
    nothing = summarize({name: value.item() for name, value in rescaling_facts(0 * hard, hard).items()})
    assert nothing == {"w_mean": None, "w_std": None, "w_share": 0, "w_total": None}


def test_facts_of_batches_average_to_those_of_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    hard, loss = (torch.rand(12, generator=generator, dtype=torch.float64) for _ in range(2))
    hard[3] = 0.01
    parts = [rescaling_facts(hard[start : start + 4], loss[start : start + 4]) for start in (0, 4, 8)]
    means = {name: sum(float(part[name]) for part in parts) / 3 for name in parts[0]}
    w = (loss / hard)[hard >= LEAST_DOUBT]
    found = summarize(means)
    assert (found["w_mean"], found["w_std"]) == pytest.approx((w.mean().item(), w.std(correction=0).item()))
    assert found["w_total"] == pytest.approx((loss.sum() / hard.sum()).item())


def test_what_is_refused() -> None:
    for hard, loss in (
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(2, 2), torch.zeros(2, 2)),
        (torch.ones(2), torch.ones(3)),
    ):
        with pytest.raises(ValueError, match="at least one image"):
            rescaling_facts(hard, loss)
    targets = soft_targets(terms(("soft_target", 1.0, {})))
    assert targets is not None
    for student, teacher, labels, message in (
        (logits(0), logits(1)[:4], LABELS, "of the same shape"),
        (logits(0)[:, :1], logits(1)[:, :1], LABELS, "at least 2 classes"),
        (logits(0), logits(1), LABELS[:4], "and labels"),
    ):
        with pytest.raises(ValueError, match=message):
            image_gradients(student, teacher, labels, targets)


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
    assert set(facts) == {"hard_gradient", "loss_gradient", "w_counted", "w_sum", "w_square"}
    assert all(bool(torch.isfinite(value)) and value.shape == () for value in facts.values())
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
    told = summarize({name: value.item() for name, value in result.facts.items()})
    assert told["w_share"] == 1 and told["w_mean"] == pytest.approx(w.mean().item(), rel=1e-5)
    assert told["w_std"] == pytest.approx(w.std(correction=0).item(), rel=1e-3)
    assert not any(value.requires_grad for value in result.facts.values())
    assert DistillStep(net, teacher, build_terms(terms(("cross_entropy", 1.0, {}))))(batch).facts == {}
