"""Student ensembles: the loss against its formula, its value for one net and for equal ones, who gets a gradient."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.config import TermConfig
from qkd.losses import cross_entropy_loss
from qkd.methods.peers.step import Learner, PeerAdapters, StudentEnsembleStep, student_ensemble_loss
from qkd.seeding import global_stream
from qkd.terms import build_terms
from qkd.terms.step import DistillStep
from qkd.testing import TinyNet, synthetic_splits
from qkd.training.job import Batch, StepResult
from quantizers import QuantSpec, calibrate, freeze_batch_norm, prepare, quantizer_scales

pytestmark = pytest.mark.usefixtures("unfused")

TAPS = ("stem", "relu")


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net(width: int = 6, seed: int = 0) -> nn.Module:
    with global_stream(seed, "net"):
        return TinyNet(width=width)


def batch(size: int = 16) -> Batch:
    raw, labels = synthetic_splits().train.batch(torch.arange(size), "cpu")
    return Batch(raw.float() / 128 - 1, labels, raw, 0, 0)


LABELS = torch.tensor([0, 1, 2, 3, 0])


# --- the loss


def test_the_formula() -> None:
    logits = [2 * values(5, 4, seed=seed) for seed in range(3)]
    features = [[values(5, 3, 2, 2, seed=10 * seed + tap) for tap in range(2)] for seed in range(3)]
    loss = student_ensemble_loss(logits, LABELS, features, temperature=2.0)
    target = (torch.stack(logits).mean(0) / 2).softmax(1)
    by_labels = sum(functional.cross_entropy(one, LABELS) for one in logits)
    by_average = sum(4 * (target * (target.log() - (one / 2).log_softmax(1))).sum(1).mean() for one in logits)
    by_features = sum((features[0][tap] - features[net][tap]).square().mean() for net in (1, 2) for tap in (0, 1))
    for found, wanted in ((loss.labels, by_labels), (loss.features, by_features), (loss.ensemble, by_average)):
        assert found.shape == () and found.dtype == torch.float64
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.total, 0.7 * by_labels + 0.15 * by_features + 0.15 * by_average)


def test_two_nets_by_hand() -> None:
    # one image of class 0, to which the nets give 3/4 and 1/4; the mean of their logits is 0, so 1/2
    logits = [torch.tensor([[math.log(3), 0.0]]).double(), torch.tensor([[0.0, math.log(3)]]).double()]
    logits = [one - one.mean() for one in logits]
    features = [[torch.tensor([[1.0, 2.0]]).double()], [torch.tensor([[1.0, 4.0]]).double()]]
    loss = student_ensemble_loss(logits, torch.tensor([0]), features, temperature=1.0)
    assert loss.labels.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 4))
    assert loss.features.item() == pytest.approx((0 + 4) / 2)
    assert loss.ensemble.item() == pytest.approx(2 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)))


def test_one_net_learns_from_the_labels_alone() -> None:
    logits = (2 * values(5, 4)).requires_grad_()
    loss = student_ensemble_loss([logits], LABELS, [[values(5, 3)]])
    alone = 0.7 * cross_entropy_loss(logits, LABELS)
    assert loss.total.item() == alone.item() and loss.ensemble.item() == 0 == loss.features.item()
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, logits)[0], torch.autograd.grad(alone, logits)[0], rtol=0, atol=1e-17
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_nets_have_nothing_to_tell_each_other(count: int) -> None:
    logits, features = 2 * values(5, 4), [values(5, 3, 2, 2), values(5, 7)]
    loss = student_ensemble_loss([logits.clone() for _ in range(count)], LABELS, [features] * count)
    assert loss.ensemble.item() == 0 == loss.features.item()
    torch.testing.assert_close(loss.total, 0.7 * count * cross_entropy_loss(logits, LABELS))


def test_the_weights_of_the_average_sum_to_one() -> None:
    logits = [2 * values(5, 4, seed=seed) for seed in range(3)]
    plain = student_ensemble_loss(logits, LABELS)
    # moving every net by one constant an image moves the average by it: no probability changes
    shifted = student_ensemble_loss([one + 7 * values(5, 1, seed=9) for one in logits], LABELS)
    torch.testing.assert_close(shifted.ensemble, plain.ensemble, rtol=1e-10, atol=0)


def test_no_gradient_into_the_teacher_side() -> None:
    logits = [(2 * values(5, 4, seed=seed)).requires_grad_() for seed in range(2)]
    features = [[values(5, 3, seed=seed).requires_grad_()] for seed in range(2)]
    loss = student_ensemble_loss(logits, LABELS, features)
    lead, own = torch.autograd.grad(loss.features, [features[0][0], features[1][0]], allow_unused=True)
    assert lead is None and own is not None and bool(own.any())
    target = (torch.stack(logits).mean(0) / 3).softmax(1).detach()
    for one in logits:
        expected = 9 / 3 * ((one / 3).softmax(1) - target) / 5  # with the average held fast
        found = torch.autograd.grad(loss.ensemble, one, retain_graph=True)[0]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-15)


def test_gradcheck() -> None:
    logits = [values(5, 4, seed=seed).requires_grad_() for seed in range(2)]
    own, fixed = values(5, 3, seed=1).requires_grad_(), values(5, 3)
    # The average is a constant: against a difference quotient only a net that is not part of it can be checked.
    assert torch.autograd.gradcheck(
        lambda first, feature: (
            student_ensemble_loss([first, logits[1].detach()], LABELS, [[fixed], [feature]], ensemble_weight=0).total
        ),
        (logits[0], own),
    )


@pytest.mark.parametrize("kind", ["zero", "constant", "huge", "one hot"])
def test_extreme_inputs_stay_finite(kind: str) -> None:
    plain = values(5, 4, dtype=torch.float32)
    one_hot = torch.zeros(5, 4)
    one_hot[:, 1] = 1
    made = {"zero": torch.zeros(5, 4), "constant": torch.ones(5, 4), "huge": 1e4 * plain, "one hot": one_hot}[kind]
    for parts in ([made, plain], [plain, made], [made, -made], [made, made]):
        logits, features = [[part.clone().requires_grad_() for part in parts] for _ in range(2)]
        loss = student_ensemble_loss(logits, LABELS, [[feature] for feature in features])
        loss.total.backward()
        assert bool(loss.total.isfinite()) and loss.total.dtype == torch.float32
        leaves = [*logits, features[1]]
        assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logits": []}, "at least one model"),
        ({"logits": [torch.zeros(5, 4), torch.zeros(5, 3)]}, r"the same shape \[batch, classes\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
        ({"features": [[torch.zeros(5, 3)]]}, "features of every net or of none, got 1 for 2 nets"),
        ({"features": [[torch.zeros(5, 3)], []]}, "the same number of features as net 0, got 0 and 1"),
        ({"features": [[torch.zeros(5, 3)], [torch.zeros(5, 2)]]}, "features of the same shape"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"label_weight": -1.0}, "label_weight must be finite and not negative"),
        ({"feature_weight": math.nan}, "feature_weight must be finite and not negative"),
        ({"ensemble_weight": math.inf}, "ensemble_weight must be finite"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
    ],
)
def test_refused(change, match: str) -> None:
    arguments = {"logits": [torch.zeros(5, 4)] * 2, "labels": LABELS, **change}
    with pytest.raises(ValueError, match=match):
        student_ensemble_loss(**arguments)


# --- the step


def learners(*nets: nn.Module, taps: tuple[str, ...] = TAPS) -> list[Learner]:
    names = [*(f"peer_{number}" for number in range(len(nets) - 1)), "student"]
    return [Learner(name, one, taps, getattr(one, "tap_paths", None)) for name, one in zip(names, nets, strict=True)]


def run(step: StudentEnsembleStep, given: Batch) -> StepResult:
    with step.tapped():
        return step(given)


def test_adapters_are_identities_where_widths_agree() -> None:
    adapters = PeerAdapters([[(6, 8, 8), (6,)], [(6, 8, 8), (6,)], [(4, 8, 8), (3,)]])
    assert sorted(adapters.maps) == ["net_2_tap_0", "net_2_tap_1"]
    given = [values(2, 6, 8, 8), values(2, 6)]
    assert all(a is b for a, b in zip(adapters(given, 1), given, strict=True))
    adapted = adapters([values(2, 4, 8, 8).float(), values(2, 3).float()], 2)
    assert [tuple(feature.shape) for feature in adapted] == [(2, 6, 8, 8), (2, 6)]
    again = PeerAdapters([[(6, 8, 8), (6,)], [(6, 8, 8), (6,)], [(4, 8, 8), (3,)]])
    assert all(torch.equal(a, b) for a, b in zip(adapters.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="no adapter"):
        PeerAdapters([[(6, 8, 8)], [(6,)]])


def test_equal_nets_in_a_step() -> None:
    first = net()
    adapters = PeerAdapters([[(6, 8, 8)] * 2] * 3)
    result = run(StudentEnsembleStep(learners(first, copy.deepcopy(first), copy.deepcopy(first)), adapters), batch())
    assert result.terms["ensemble"].item() == 0 == result.terms["features"].item()
    alone = cross_entropy_loss(copy.deepcopy(first)(batch().images), batch().labels)
    torch.testing.assert_close(result.terms["labels"], 3 * alone)
    assert set(result.facts) == {"peer_0_accuracy", "peer_1_accuracy"}
    assert all(0 <= fact.item() <= 1 and not fact.requires_grad for fact in result.facts.values())


def test_bit_widths_and_widths_in_one_training() -> None:
    """Full precision, 4 bits, a narrower net and the 2-bit student: all learn, and calibrated scales move."""
    given = batch(64)
    nets: list[nn.Module] = [net()]
    for bits, width in ((4, 6), (4, 4), (2, 6)):
        spec = QuantSpec(weight_bits=bits, act_bits=bits)
        low = prepare(net(width, seed=bits), spec, example_inputs=torch.zeros(2, 1, 8, 8))
        calibrate(low, given.images)
        freeze_batch_norm(low, False)
        nets.append(low.train())
    shapes = [[(width, 8, 8)] * 2 for width in (6, 6, 4, 6)]
    adapters = PeerAdapters(shapes)
    assert len(adapters.maps) == 2
    step = StudentEnsembleStep(learners(*nets), adapters)
    parameters = [parameter for one in (*nets, adapters) for parameter in one.parameters()]
    before = [scale.detach().clone() for one in nets[1:] for scale in quantizer_scales(one)]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    results = []
    for _ in range(25):
        optimizer.zero_grad()
        results.append(run(step, given))
        results[-1].loss.backward()
        assert all(parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in parameters)
        optimizer.step()
    for name, share in (("labels", 0.8), ("features", 0.95)):
        assert results[-1].terms[name].item() < share * results[0].terms[name].item(), name
    assert all(bool(parameter.grad.any()) for parameter in adapters.parameters())
    after = [scale for one in nets[1:] for scale in quantizer_scales(one)]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_student_may_have_terms_of_its_own() -> None:
    first, student = net(), net(seed=1)
    adapters = PeerAdapters([[(6, 8, 8)] * 2] * 2)

    def own(given: Batch) -> StepResult:
        logits = student(given.images)
        loss = 2 * cross_entropy_loss(logits, given.labels)
        return StepResult(loss, {"mine": loss}, logits)

    plain = run(StudentEnsembleStep(learners(first, student), adapters), batch())
    more = run(StudentEnsembleStep(learners(first, student), adapters, own=own), batch())
    torch.testing.assert_close(more.loss, plain.loss + more.terms["mine"])
    assert set(more.terms) == {"labels", "features", "ensemble", "mine"}


def test_outside_the_block_the_nets_have_no_hooks() -> None:
    first, student = net(), net(seed=1)
    step = StudentEnsembleStep(learners(first, student), PeerAdapters([[(6, 8, 8)] * 2] * 2))
    run(step, batch())
    assert not any(module._forward_hooks for one in (first, student) for module in one.modules())


def test_refused_taps() -> None:
    nets = [net(), net(seed=1)]
    adapters = PeerAdapters([[(6, 8, 8)]] * 2)
    with pytest.raises(ValueError, match=r"the peer_0 has no module 'stemm'; did you mean .*`stem`"):
        StudentEnsembleStep(learners(*nets, taps=("stemm",)), adapters)
    uneven = [Learner("peer_0", nets[0], ("stem",)), Learner("student", nets[1], ())]
    with pytest.raises(ValueError, match=r"same number of taps, got \{'peer_0': 1, 'student': 0\}"):
        StudentEnsembleStep(uneven, adapters)


def test_facts_of_the_students_own_terms_stay() -> None:
    """The weights of soft targets by epoch are among them."""
    first = net()
    own = DistillStep(first, copy.deepcopy(first).eval(), build_terms([TermConfig(loss="soft_target")]))
    step = StudentEnsembleStep(
        learners(copy.deepcopy(first), first), PeerAdapters([[(6, 8, 8)] * 2] * 2), own=own, own_hold=own.tapped
    )
    facts = run(step, batch()).facts
    assert set(facts) == {*own(batch()).facts, "peer_0_accuracy"} and len(facts) > 1
