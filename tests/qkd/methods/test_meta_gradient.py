"""The quiz's gradient by the teacher: worked numbers, finite differences, limits, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from qkd.config import TermConfig
from qkd.losses.given import teacher_in_graph
from qkd.methods.meta_distil.gradient import meta_gradient
from qkd.terms import Outputs, build_terms

ORDERS = ("second", "first")


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("order", ORDERS)
def test_worked_number(order: Any) -> None:
    # l = (w - t)^2 / 2: a step of 0.1 from w = 1 toward t = 3 gives 1.2; Q = (w' - 2)^2 / 2 = 0.32, dQ/dw' = -0.8,
    # dw'/dt = 0.1, so dQ/dt = -0.08. l is quadratic, so finite differences are exact, too.
    teacher = number(3.0).requires_grad_()
    found = meta_gradient(
        lambda weights: (weights["w"] - teacher) ** 2 / 2,
        lambda weights: (weights["w"] - 2) ** 2 / 2,
        {"w": number(1.0)},
        (teacher,),
        inner_lr=0.1,
        order=order,
    )
    assert float(found.quiz_loss) == pytest.approx(0.32, abs=1e-12)
    assert float(found.gradients[0]) == pytest.approx(-0.08, abs=1e-12)
    assert not found.quiz_loss.requires_grad and not found.gradients[0].requires_grad


@pytest.mark.parametrize("order", ORDERS)
def test_worked_number_with_a_factor_and_weights_that_are_not_read(order: Any) -> None:
    # as above for w; s = 1 goes by 0.1 * 0.5 toward t = 3: 1.1, its quiz slope 1.1 - 2 = -0.9, ds'/dt = 0.05
    teacher, unread = number(3.0).requires_grad_(), number(7.0).requires_grad_()
    found = meta_gradient(
        lambda weights: sum((weights[name] - teacher) ** 2 / 2 for name in ("w", "s")) + weights["lone"] ** 2,
        lambda weights: sum((weights[name] - 2) ** 2 / 2 for name in ("w", "s")),
        {name: number(1.0) for name in ("w", "s", "lone", "idle")},
        (teacher, unread),
        inner_lr=0.1,
        order=order,
        lr_factors={"s": 0.5},
    )
    assert float(found.gradients[0]) == pytest.approx(0.1 * -0.8 + 0.05 * -0.9, abs=1e-12)
    assert float(found.gradients[1]) == 0.0


class _Case:
    """Two small MLPs of different widths in float64, a batch and a quiz."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.student = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        self.teacher = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4)).double()
        self.x, self.quiz_x = torch.randn(2, 8, 5, dtype=torch.float64)
        self.y, self.quiz_y = torch.randint(0, 4, (2, 8))
        terms = [TermConfig(loss="cross_entropy", weight=0.3), TermConfig(loss="soft_target", weight=0.7)]
        self.terms = build_terms(terms)
        self.weights = dict(self.student.named_parameters())
        self.taught = {name: weight.detach().requires_grad_() for name, weight in self.teacher.named_parameters()}

    def loss(self, weights: Mapping[str, Tensor], taught: Mapping[str, Tensor] | None = None) -> Tensor:
        with teacher_in_graph():
            logits = functional_call(self.student, dict(weights), (self.x,))
            others = functional_call(self.teacher, dict(self.taught if taught is None else taught), (self.x,))
            return self.terms(Outputs(logits, self.y, others))[0]

    def quiz(self, weights: Mapping[str, Tensor]) -> Tensor:
        return functional.cross_entropy(functional_call(self.student, dict(weights), (self.quiz_x,)), self.quiz_y)

    def after_a_step(self, taught: Mapping[str, Tensor], lr: float) -> float:
        """Return the quiz loss after a step toward a teacher, by nothing but first gradients."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        slopes = torch.autograd.grad(self.loss(leaves, taught), tuple(leaves.values()))
        with torch.no_grad():
            return float(self.quiz({n: w - lr * g for (n, w), g in zip(leaves.items(), slopes, strict=True)}))

    def gradient(self, lr: float, order: Any = "second") -> tuple[Tensor, ...]:
        found = meta_gradient(self.loss, self.quiz, self.weights, tuple(self.taught.values()), inner_lr=lr, order=order)
        assert float(found.quiz_loss) == pytest.approx(self.after_a_step(self.taught, lr), abs=1e-12)
        return found.gradients


def test_second_order_is_the_finite_difference_of_the_quiz() -> None:
    case, step = _Case(), 1e-5
    for (name, weight), gradient in zip(case.taught.items(), case.gradient(0.5), strict=True):
        for place in range(weight.numel()):
            shift = torch.zeros_like(weight).view(-1)
            shift[place] = step
            ahead, behind = (
                case.after_a_step({**case.taught, name: (weight + way * shift.view_as(weight)).detach()}, 0.5)
                for way in (1, -1)
            )
            assert float(gradient.view(-1)[place]) == pytest.approx((ahead - behind) / (2 * step), abs=1e-9)


def test_first_order_comes_close() -> None:
    case = _Case()
    exact, close = (torch.cat([one.flatten() for one in case.gradient(0.5, order)]) for order in ORDERS)
    assert float(exact.norm()) > 1e-3
    assert 0 < float((exact - close).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_step_the_teacher_is_out_of_it(order: Any) -> None:
    assert all(float(gradient.abs().max()) == 0.0 for gradient in _Case().gradient(0.0, order))


def test_small_steps_count_in_proportion() -> None:
    case = _Case()
    once, twice = (torch.cat([one.flatten() for one in case.gradient(lr)]) for lr in (1e-6, 2e-6))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=0)


def test_nothing_is_changed() -> None:
    case = _Case()
    before = {name: weight.detach().clone() for name, weight in case.weights.items()}
    case.gradient(0.5)
    assert all(torch.equal(before[name], weight) and weight.grad is None for name, weight in case.weights.items())
    assert all(weight.grad is None for weight in case.taught.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "loss",
    [
        lambda weights, teacher: weights["w"] ** 2,  # does not read it
        lambda weights, teacher: weights["w"] ** 2 * teacher.detach(),
    ],
)
def test_a_loss_without_the_teacher_is_refused(order: Any, loss: Callable[..., Tensor]) -> None:
    teacher = number(3.0).requires_grad_()
    with pytest.raises(ValueError, match="does not depend on the teacher.*soft_target"):
        meta_gradient(
            lambda weights: loss(weights, teacher), lambda weights: weights["w"] ** 2, {"w": number(1.0)}, (teacher,),
            inner_lr=0.1, order=order,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_lr": -0.1}, "inner_lr"),
        ({"inner_lr": math.nan}, "inner_lr"),
        ({"inner_lr": math.inf}, "inner_lr"),
        ({"order": "third"}, "second, first, got 'third'"),
        ({"lr_factors": {"v": 1.0}}, "not weights of the student: v"),
    ],
)
def test_raises(change: dict[str, Any], message: str) -> None:
    teacher = number(3.0).requires_grad_()
    with pytest.raises(ValueError, match=message):
        meta_gradient(
            lambda weights: (weights["w"] - teacher) ** 2, lambda weights: weights["w"] ** 2, {"w": number(1.0)},
            (teacher,), **{"inner_lr": 0.1, **change},
        )  # fmt: skip
