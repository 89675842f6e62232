"""Parameter groups, learning-rate schedules, averaged weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qkd.config import TrainConfig
from qkd.testing import TinyNet
from qkd.training import Partner, WeightAverage, build_optimizer, learning_rate
from qkd.training.optimizer import set_learning_rate
from quantizers import QuantSpec, prepare, quantizer_scales


def config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"epochs": 10, "lr": 0.4, **changes})


def test_groups_of_a_student() -> None:
    student = prepare(TinyNet(), QuantSpec(weight_bits=2, act_bits=2), example_inputs=torch.zeros(2, 1, 8, 8))
    scales = quantizer_scales(student)
    optimizer = build_optimizer(student, config(scale_lr_factor=0.25, weight_decay=1e-3), scales)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert {id(p) for p in groups["scales"]["params"]} == {id(p) for p in scales} and len(scales) > 3
    assert all(p.dim() >= 2 for p in groups["weights"]["params"])
    assert all(p.dim() < 2 for p in groups["offsets"]["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(student.parameters()))
    assert {role: group["weight_decay"] for role, group in groups.items()} == {
        "weights": 1e-3, "offsets": 0.0, "scales": 0.0
    }  # fmt: skip
    set_learning_rate(optimizer, 0.2)
    assert {role: group["lr"] for role, group in groups.items()} == {"weights": 0.2, "offsets": 0.2, "scales": 0.05}


def test_a_low_bit_partner_has_scales_at_their_own_rate_and_without_decay() -> None:
    partner = prepare(TinyNet(), QuantSpec(weight_bits=4, act_bits=4), example_inputs=torch.zeros(2, 1, 8, 8))
    scales = quantizer_scales(partner)
    joined = Partner("peer", partner, 0.5, scales=lambda: scales)
    optimizer = build_optimizer(TinyNet(), config(scale_lr_factor=0.25, weight_decay=1e-3), (), [joined])
    weights, offsets, own = optimizer.param_groups[2:]
    assert {id(p) for p in own["params"]} == {id(p) for p in scales}
    assert any(p.dim() >= 2 for p in scales) and not {id(p) for p in scales} & {id(p) for p in weights["params"]}
    assert [group["lr_factor"] for group in (weights, offsets, own)] == [0.5, 0.5, 0.125]
    assert [group["weight_decay"] for group in (weights, offsets, own)] == [1e-3, 0.0, 0.0]


def test_kinds() -> None:
    sgd = build_optimizer(TinyNet(), config(momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["nesterov"] and sgd.defaults["momentum"] == 0.8
    assert not build_optimizer(TinyNet(), config(momentum=0.0)).defaults["nesterov"]
    assert isinstance(build_optimizer(TinyNet(), config(optimizer="adamw")), torch.optim.AdamW)
    assert [group["role"] for group in sgd.param_groups] == ["weights", "offsets"]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizer(TinyNet().requires_grad_(False), config())


def test_frozen_parameters_are_left_out() -> None:
    net = TinyNet()
    net.stem.requires_grad_(False)
    optimizer = build_optimizer(net, config())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in net.stem.parameters()} and trained


def rates(**changes: object) -> list[float]:
    return [learning_rate(config(**changes), step, 10) for step in range(100)]


def test_cosine() -> None:
    found = rates(schedule="cosine")
    assert found[0] == 0.4 and found[50] == pytest.approx(0.2) and 0 < found[-1] < 0.001
    assert all(a > b for a, b in zip(found, found[1:], strict=False))


def test_step() -> None:
    found = rates(schedule="step", milestones=(0.3, 0.6), gamma=0.5)
    assert (found[29], found[30], found[59], found[60], found[99]) == (0.4, 0.2, 0.2, 0.1, 0.1)


def test_constant() -> None:
    assert set(rates(schedule="constant")) == {0.4}


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_warm_up_rises_to_the_peak(schedule: str) -> None:
    found = rates(schedule=schedule, warmup_epochs=1.5)
    assert found[0] == pytest.approx(0.4 / 15) and found[14] == 0.4 and found[15] == 0.4
    assert found[7] == pytest.approx(0.4 * 8 / 15)


def test_cosine_after_the_warm_up_spans_the_rest() -> None:
    found = rates(schedule="cosine", warmup_epochs=2)
    assert found[60] == pytest.approx(0.2) and found[99] == pytest.approx(0.2 * (1 + math.cos(math.pi * 79 / 80)))


def test_a_warm_up_as_long_as_the_training_is_an_error() -> None:
    with pytest.raises(ValueError, match="`warmup_epochs` must be less than `epochs`"):
        rates(warmup_epochs=10)


def test_average_by_hand() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    average = WeightAverage(net, decay=0.5)
    by_hand = 1.0
    for step, value in enumerate([2.0, 4.0, 8.0, 16.0]):
        net.weight.data.fill_(value)
        average.update(net, step)
        decay = min(0.5, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * value
        assert average.tensors["weight"].item() == pytest.approx(by_hand)
    with average.applied(net):
        assert net.weight.item() == pytest.approx(by_hand)
    assert net.weight.item() == 16.0
    average.copy_to(net)
    assert net.weight.item() == pytest.approx(by_hand)


def test_average_takes_batch_norm_along_and_leaves_other_buffers() -> None:
    net = TinyNet()
    net.register_buffer("zero_point", torch.tensor(7.0))
    average = WeightAverage(net, decay=0.9)
    net.train()(torch.randn(4, 1, 8, 8))
    before = net.stem[1].running_mean.clone()
    average.update(net, 1000)
    with average.applied(net):
        torch.testing.assert_close(net.stem[1].running_mean, 0.1 * before)
        assert net.stem[1].num_batches_tracked == 1 and net.zero_point == 7
    assert torch.equal(net.stem[1].running_mean, before)


def test_average_of_equal_weights_is_exact() -> None:
    net = TinyNet()
    average = WeightAverage(net, decay=0.999)
    for step in range(20):
        average.update(net, step)
    assert all(torch.equal(average.tensors[name], p) for name, p in net.named_parameters())


def test_applied_restores_when_the_block_fails() -> None:
    net = TinyNet()
    average = WeightAverage(net, decay=0.9)
    net.head.weight.data.add_(1)
    now = net.head.weight.clone()
    with pytest.raises(KeyError), average.applied(net):
        raise KeyError
    assert torch.equal(net.head.weight, now)
