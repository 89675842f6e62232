"""Rules of low-bit weights: each against its published formula, worked by hand, and what they do to groups."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from qkd.config import LowBitConfig, TrainConfig
from qkd.seeding import global_stream
from qkd.testing import TinyNet
from qkd.training.job import Moment
from qkd.training.low_bit.dampening import Dampening
from qkd.training.low_bit.oscillations import OscillationFreezing
from qkd.training.low_bit.rules import step_rules
from qkd.training.low_bit.transitions import GROUP, TransitionRate
from qkd.training.optimizer import build_optimizer, set_learning_rate
from quantizers import QuantSpec, Student, calibrate, prepare, quantizer_scales
from quantizers.recipes.codes import low_bit_layers, place, weight_codes

pytestmark = pytest.mark.usefixtures("eager")
CONFIG = TrainConfig(epochs=4, lr=0.1, weight_decay=0.01)


def make_student(bits: int = 2, **options: Any) -> Student:
    with global_stream(0, "init"):
        net = TinyNet()
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    student = prepare(net, QuantSpec(bits, 2, **options), images)
    calibrate(student, images)
    return student


def optimizer_of(student: Student, config: TrainConfig = CONFIG) -> Optimizer:
    return build_optimizer(student, config, quantizer_scales(student))


def moment(rate: float = 1.0, done: float = 0.0, steps: int = 20, peak: float = 0.1) -> Moment:
    return Moment(rate, peak, done, steps)


def has_gradient(layers: Any) -> None:
    for layer in layers.values():
        layer.weight.grad = torch.zeros_like(layer.weight)


def low_bit_rates(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups if group["role"] == GROUP]


def shift(layer: Any, where: Tensor, by: int) -> None:
    place(layer, weight_codes(layer) + by, where)


def first_ones(layer: Any, count: int) -> Tensor:
    """Return ``count`` weights that can go a code up and down again."""
    free = (weight_codes(layer) == -1).flatten() if layer.bn.weight.detach().min() > 0 else None
    assert free is not None and int(free.sum()) >= count
    chosen = torch.zeros_like(free)
    chosen[free.nonzero()[:count, 0]] = True
    return chosen.reshape(layer.weight.shape)


# groups


@pytest.mark.parametrize(("bits", "factor"), [(2, 0.25), (3, 0.5), (4, 1.0)])
def test_decay_by_bits_is_that_of_lsq_and_leaves_all_else(bits: int, factor: float) -> None:
    student = make_student(bits)
    optimizer = optimizer_of(student)
    before = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert step_rules(student, LowBitConfig(decay_by_bits=True), optimizer) == ()
    low = {id(layer.weight) for layer in low_bit_layers(student).values()}
    assert len(low) == 2
    after = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert after == {key: decay * (factor if key in low else 1) for key, decay in before.items()}
    assert all(after[id(scale)] == 0 for scale in quantizer_scales(student))
    assert len(low) == sum(len(group["params"]) for group in optimizer.param_groups if group["role"] == GROUP)


def test_no_rule_leaves_the_optimizer_alone() -> None:
    student = make_student()
    optimizer = optimizer_of(student)
    before = [dict(group) for group in optimizer.param_groups]
    assert step_rules(student, LowBitConfig(), optimizer) == ()
    assert [dict(group) for group in optimizer.param_groups] == before


def test_weights_without_a_place_are_refused() -> None:
    student = make_student(weight_quantizer="dorefa")
    with pytest.raises(ValueError, match="need weight_quantizer lsq or stats"):
        step_rules(student, LowBitConfig(dampening=1e-3), optimizer_of(student))


def test_frozen_weights_need_a_step_that_does_not_follow_them() -> None:
    """With statistics, freezing everything multiplies the step size again and again."""
    student = make_student(weight_quantizer="stats")
    with pytest.raises(ValueError, match="oscillation_thresholds needs weight_quantizer lsq"):
        step_rules(student, LowBitConfig(oscillation_thresholds=(0.04, 0.01)), optimizer_of(student))
    step_rules(student, LowBitConfig(dampening=1e-3), optimizer_of(student))


# the transition rate


def test_the_rate_follows_the_formula() -> None:
    student = make_student()
    optimizer = optimizer_of(student)
    (rule,) = step_rules(student, LowBitConfig(transition_rate=0.02), optimizer)
    assert isinstance(rule, TransitionRate)
    layers = low_bit_layers(student)
    count = sum(layer.weight.numel() for layer in layers.values())
    has_gradient(layers)
    layer = layers["left.0"]
    where, direction = first_ones(layer, 30), 1
    running, factor = 0.02, 1.0
    window = 20 / 20 * 1.0  # steps / 20
    for rate, moved in ((1.0, True), (1.0, False), (0.5, True)):
        set_learning_rate(optimizer, rate * 0.1)
        rule.before(moment(rate))
        assert [group["lr"] for group in optimizer.param_groups if group["role"] == GROUP] == [
            pytest.approx(0.1 * factor)
        ]
        assert all(
            group["lr"] == pytest.approx(rate * 0.1 * group["lr_factor"])
            for group in optimizer.param_groups
            if group["role"] != GROUP
        )
        if moved:
            shift(layer, where, direction)
            direction = -direction
        used = factor
        rule.after(moment(rate))
        running += ((30 / count if moved else 0.0) - running) / window
        factor = min(max(0.0, factor + 0.25 / window * (0.02 * rate - running) / 0.02), 4.0)
        assert rule.facts() == {
            "transition_rate": pytest.approx(running), "low_bit_lr_factor": pytest.approx(used)
        }  # fmt: skip


def test_settling_keeps_the_rate_of_the_schedule() -> None:
    student = make_student()
    optimizer = optimizer_of(student)
    (rule,) = step_rules(student, LowBitConfig(transition_rate=0.5), optimizer)
    has_gradient(low_bit_layers(student))
    rule.after(moment())
    before = rule.factor
    assert before is not None and before > 1
    settling = replace(moment(rate=0.1), settles=True)
    rule.before(settling)
    assert low_bit_rates(optimizer) == [pytest.approx(0.01)]
    rule.after(settling)
    assert rule.factor == before and rule.facts()["low_bit_lr_factor"] == 0.1, "what the step was taken with"
    again = step_rules(student, LowBitConfig(transition_rate=0.5), optimizer_of(student))[0]
    again.load(rule.state())
    assert again.facts() == rule.facts()
    again.load({"values": rule.state()["values"][:2]})  # as earlier versions saved it
    assert again.facts()["transition_rate"] == rule.facts()["transition_rate"]


def test_the_window_grows_with_the_training_up_to_the_published_momentum() -> None:
    for steps, window in ((20, 1.0), (400, 20.0), (10**6, 100.0)):
        student = make_student()
        (rule,) = step_rules(student, LowBitConfig(transition_rate=0.5), optimizer_of(student))
        has_gradient(low_bit_layers(student))
        rule.after(moment(steps=steps))  # nothing moved
        assert rule.facts()["transition_rate"] == pytest.approx(0.5 * (1 - 1 / window))


def test_a_step_that_moves_something_else_does_not_count() -> None:
    student = make_student()
    (rule,) = step_rules(student, LowBitConfig(transition_rate=0.5), optimizer_of(student))
    rule.after(moment())
    assert rule.facts()["transition_rate"] == 0.5


def test_a_target_out_of_reach_does_not_break_the_training() -> None:
    student = make_student()
    (rule,) = step_rules(student, LowBitConfig(transition_rate=0.9), optimizer_of(student))
    has_gradient(low_bit_layers(student))
    for _ in range(200):
        rule.after(moment())
    assert rule.factor == 4.0


def test_it_keeps_the_target_in_a_training() -> None:
    """Weights on a random walk: the share that changes its code comes to the target, whatever the noise's size."""
    student = make_student()
    optimizer = optimizer_of(student, TrainConfig(epochs=4, lr=0.1, momentum=0.0, weight_decay=0.0))
    target = 0.03
    (rule,) = step_rules(student, LowBitConfig(transition_rate=target), optimizer)
    layers, generator, seen = low_bit_layers(student), torch.Generator().manual_seed(0), []
    for step in range(600):
        for layer in layers.values():
            layer.weight.grad = 0.2 * torch.randn(layer.weight.shape, generator=generator)
        now = Moment(1.0, 0.1, step / 600, 600)
        set_learning_rate(optimizer, 0.1)
        rule.before(now)
        optimizer.step()
        rule.after(now)
        seen.append(rule.facts()["transition_rate"])
    assert sum(seen[300:]) / 300 == pytest.approx(target, rel=0.15)


# dampening


def test_dampening_adds_the_gradient_of_its_loss() -> None:
    student = make_student()
    (rule,) = step_rules(student, LowBitConfig(dampening=0.3), optimizer_of(student))
    assert isinstance(rule, Dampening)
    for done in (0.0, 0.5, 0.99):
        for layer in low_bit_layers(student).values():
            layer.weight.grad = torch.full_like(layer.weight, 2.0)
        rule.before(moment(done=done))
        weight = 0.3 * 0.5 * (1 - math.cos(math.pi * done))
        for layer in low_bit_layers(student).values():
            latent, sign = layer.weight.detach().clone().requires_grad_(), layer._sign()
            sign = 1.0 if sign is None else sign
            step, low, high = layer.quant.step.detach(), layer.quant.low, layer.quant.high
            turned = latent * sign
            ends = torch.maximum(torch.minimum(turned, high * step), low * step)
            (weight * ((layer.low_bit_weight().detach() * sign - ends) ** 2).sum()).backward()
            inside = (turned / step > low) & (turned / step < high)
            torch.testing.assert_close(layer.weight.grad, 2.0 + latent.grad * inside, rtol=1e-4, atol=1e-6)


# freezing


def test_a_weight_that_swings_is_frozen_where_it_was_most_of_the_time() -> None:
    student = make_student()
    config = LowBitConfig(oscillation_thresholds=(0.5, 0.5), oscillation_momentum=0.25)
    (rule,) = step_rules(student, config, optimizer_of(student))
    assert isinstance(rule, OscillationFreezing)
    layers = low_bit_layers(student)
    has_gradient(layers)
    layer = layers["left.0"]
    where, before = first_ones(layer, 3), layer.weight.detach().clone()
    frequency, mean, steps = 0.0, -1.0, 0
    for up in (True, False, True, False, True, False, True):
        shift(layer, where, 1 if up else -1)
        steps += 1
        oscillates = 0.0 if steps == 1 else 1.0  # the first change has no direction to be opposite to
        frequency += 0.25 * (oscillates - frequency)
        mean += 0.25 * ((0.0 if up else -1.0) - mean)
        rule.after(moment())
        if frequency > 0.5:
            break
        assert rule.facts()["frozen_weights"] == 0
    assert steps == 4 and frequency == pytest.approx(1 - 0.75**3)
    total = sum(one.weight.numel() for one in layers.values())
    assert rule.facts()["frozen_weights"] == pytest.approx(3 / total)
    kept = round(mean)
    torch.testing.assert_close(layer.weight[where], (kept * layer.quant.step).expand_as(layer.weight)[where])
    with torch.no_grad():  # whatever moves it, and whatever becomes of its step, it keeps the code
        layer.weight.add_(0.7 * layer.quant.step)
        layer.quant.scale.mul_(1.5)
    rule.after(moment())
    assert bool((weight_codes(layer)[where] == kept).all())
    torch.testing.assert_close(layer.weight[where], (kept * layer.quant.step).expand_as(layer.weight)[where])
    assert bool((layer.weight[~where] != before[~where]).all())  # the others go where the optimizer moves them


def test_a_weight_that_goes_one_way_is_not_frozen_and_the_threshold_falls() -> None:
    student = make_student()
    config = LowBitConfig(oscillation_thresholds=(0.9, 0.1), oscillation_momentum=0.1)
    (rule,) = step_rules(student, config, optimizer_of(student))
    layers = low_bit_layers(student)
    has_gradient(layers)
    layer = layers["left.0"]
    where = first_ones(layer, 1)
    for by in (1, 1):  # -1, 0, 1: no change of direction
        shift(layer, where, by)
        rule.after(moment(done=0.99))
    assert rule.facts()["frozen_weights"] == 0
    for by in (-1, 1):
        shift(layer, where, by)
        rule.after(moment(done=0.5))  # the threshold is 0.5; the frequency 0.19
    assert rule.facts()["frozen_weights"] == 0
    shift(layer, where, -1)
    rule.after(moment(done=0.999))  # 0.1
    assert rule.facts()["frozen_weights"] > 0


# state


def test_state_is_put_back_bit_for_bit() -> None:
    config = LowBitConfig(
        transition_rate=0.02, dampening=0.01, oscillation_thresholds=(0.3, 0.2), oscillation_momentum=0.1
    )

    def training() -> tuple[Student, Optimizer, Any]:
        student = make_student()
        optimizer = optimizer_of(student)
        return student, optimizer, step_rules(student, config, optimizer)

    def advance(student: Student, optimizer: Optimizer, rules: Any, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for parameter in student.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            now = Moment(1.0, 0.05, step / 12, 12)
            set_learning_rate(optimizer, 0.05)
            for rule in rules:
                rule.before(now)
            optimizer.step()
            for rule in rules:
                rule.after(now)

    whole = training()
    advance(*whole, 0, 12)
    cut = training()
    advance(*cut, 0, 7)
    resumed = training()
    resumed[0].load_state_dict(cut[0].state_dict())
    resumed[1].load_state_dict(cut[1].state_dict())
    for rule, before in zip(resumed[2], cut[2], strict=True):
        assert rule.name == before.name
        rule.load({name: tensor.clone() for name, tensor in before.state().items()})
    advance(*resumed, 7, 12)
    assert any(rule.facts().get("frozen_weights", 0) > 0 for rule in whole[2])
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, resumed[0].state_dict()[name]), name
    for rule, other in zip(whole[2], resumed[2], strict=True):
        assert rule.facts() == other.facts()


def test_nothing_of_a_rule_is_in_the_student() -> None:
    student = make_student()
    names = list(student.state_dict())
    optimizer = optimizer_of(student)
    step_rules(student, LowBitConfig(transition_rate=0.1, oscillation_thresholds=(0.04, 0.01)), optimizer)
    assert list(student.state_dict()) == names


# bounded step sizes


def test_a_step_changes_a_step_size_by_its_part_at_most() -> None:
    student = make_student()
    scales = list(quantizer_scales(student))
    optimizer = optimizer_of(student, CONFIG.model_copy(update={"momentum": 0.0}))
    (rule,) = step_rules(student, LowBitConfig(step_size_bound=0.1), optimizer)
    with torch.no_grad():
        scales[0].neg_()  # of a training without the bound: what is deployed is the magnitude
    before = [scale.detach().clone().abs() for scale in scales]
    for number, scale in enumerate(scales):  # far down, far up, and within the bound
        scale.grad = before[number] * (20.0, -20.0, 0.5)[number % 3]
    set_learning_rate(optimizer, 0.1)
    rule.before(moment())
    optimizer.step()
    rule.after(moment())
    for number, (scale, old) in enumerate(zip(scales, before, strict=True)):
        assert torch.allclose(scale, (0.9, 1.1, 0.95)[number % 3] * old, rtol=1e-5)
    assert rule.state() == {} and rule.facts() == {}


def test_a_bound_keeps_a_training_that_would_break_its_step_sizes() -> None:
    signs = {}
    for bound in (None, 0.1):
        student = make_student()
        optimizer = optimizer_of(student, CONFIG.model_copy(update={"lr": 5.0}))
        set_learning_rate(optimizer, 5.0)
        rules = step_rules(student, LowBitConfig(step_size_bound=bound), optimizer)
        images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(student(images), torch.arange(32) % 3).backward()
            for rule in rules:
                rule.before(moment())
            optimizer.step()
            for rule in rules:
                rule.after(moment())
        signs[bound] = all(bool((scale > 0).all()) for scale in quantizer_scales(student))
    assert signs == {None: False, 0.1: True}


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.1, float("nan")])
def test_a_bound_is_a_part(bound: float) -> None:
    with pytest.raises(ValueError, match="step_size_bound"):
        LowBitConfig(step_size_bound=bound)
