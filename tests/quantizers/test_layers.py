"""Layers: training with batch statistics, deployed arithmetic with everything folded, and hard batch norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import quantizers
from quantizers import (
    QuantSpec,
    RewriteError,
    act_quantizers,
    calibrate,
    freeze_batch_norm,
    integer_view,
    prepare,
    quant_layers,
)
from quantizers import integer as ir
from quantizers.layers import BIAS_LIMIT, GlobalAveragePool, QuantLinearBn, WindowGather
from quantizers.names import weight_quantizer


def conv_of(student: Any) -> Any:
    return quant_layers(student)["conv"]


def test_training_uses_batch_statistics(make_student: Any, images: Any) -> None:
    student = make_student("plain")
    layer, batch = conv_of(student).train(), torch.randn(4, 8, 5, 5)
    out = layer(batch)
    mean, var = layer.bn.running_mean.clone(), layer.bn.running_var.clone()
    raw = F.conv2d(batch, layer.weight_quant(layer.weight), padding=1)
    expected = F.batch_norm(raw, None, None, layer.bn.weight, layer.bn.bias, training=True, eps=layer.bn.eps)
    torch.testing.assert_close(out, expected)
    layer(batch)
    assert not torch.equal(mean, layer.bn.running_mean) and not torch.equal(var, layer.bn.running_var)


def test_eval_folds_batch_norm_and_rounds_the_bias(make_student: Any, images: Any) -> None:
    layer = conv_of(make_student("plain"))
    batch = torch.randint(0, 4, (4, 8, 5, 5)) * layer.source.quant.step.detach()
    with torch.no_grad():
        got = layer(batch)
        raw = F.conv2d(batch, layer.weight_quant(layer.weight), padding=1)
        exact = F.batch_norm(
            raw, layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias, eps=layer.bn.eps
        )
        _, scale, bias = layer.integers()
        unit = scale * layer.source.quant.step
    assert bool(((got - exact).abs() <= 0.5 * unit.reshape(1, -1, 1, 1) * 1.001 + 1e-5).all())
    assert torch.equal(bias, bias.round()) and bias.dtype == torch.float64


def test_negative_batch_norm_factors_flip_codes(make_student: Any, images: Any, compute: Any) -> None:
    student = make_student("plain")
    layer = conv_of(student)
    before = layer.integers()[0].clone()
    layer.bn.weight.data.mul_(torch.tensor([-1.0, 1.0] * 4))
    after, scale, _ = layer.integers()
    inside = before[0::2] > layer.quant.low_code
    assert bool(inside.any()) and torch.equal(after[0::2][inside], -before[0::2][inside])
    assert torch.equal(after[1::2], before[1::2])
    assert bool((scale > 0).all())
    _check_against_integers(student, images(3), compute)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_turned_round_codes_still_fit_their_bits(bits: int, make_student: Any, images: Any, compute: Any) -> None:
    student = make_student("plain", weight_bits=bits, overrides={"conv": {"weight_bits": bits, "act_bits": 4}})
    layer = conv_of(student)
    low, high = layer.quant.low_code, layer.quant.high_code
    with torch.no_grad():
        spread = torch.linspace(low - 1, high + 1, layer.weight[0].numel())  # in every channel
        layer.weight.copy_(spread.expand(8, -1).reshape(layer.weight.shape))
        layer.weight.mul_(layer.quant.step.reshape(-1, 1, 1, 1))
        layer.bn.weight.copy_(torch.tensor([-1.0, 0.5] * 4))
    codes, _, _ = layer.integers()
    assert int(codes.min()) == low and int(codes.max()) == high
    _check_against_integers(student, images(3), compute)


def test_training_sees_the_weights_that_are_deployed_where_batch_norm_turns_them(make_student: Any) -> None:
    layer = conv_of(make_student("plain"))
    with torch.no_grad():
        layer.bn.weight.copy_(torch.tensor([-1.0, 1.0] * 4))
        layer.weight[0] = 2 * layer.quant.low_code * layer.quant.step[0]
        layer.weight[1] = 2 * layer.quant.low_code * layer.quant.step[1]
        weight = layer.low_bit_weight() / layer.quant.step
        codes, _, _ = layer.integers()
    turned = torch.tensor([-1.0, 1.0] * 4).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(weight, (codes * turned).to(weight.dtype))
    assert float(weight[0].min()) == -layer.quant.high_code and float(weight[1].min()) == layer.quant.low_code


@pytest.mark.parametrize("options", [{}, {"per_channel": False}, {"weight_quantizer": "dorefa"}])
def test_dead_channel_with_a_large_shift(options: Any, make_student: Any, images: Any, compute: Any) -> None:
    """A batch-norm factor of zero: the channel is its bias, which must fit int32."""
    student = make_student("plain", **options)
    layer = conv_of(student)
    layer.bn.weight.data[2], layer.bn.bias.data[2] = 0.0, 5.0
    layer.bn.weight.data[3], layer.bn.bias.data[3] = 1e-30, -7.0
    _, scale, bias = layer.integers()
    assert bool((scale > 0).all()) and float(bias.abs().max()) <= BIAS_LIMIT
    with torch.no_grad():
        out = layer(torch.zeros(1, 8, 3, 3))
    torch.testing.assert_close(out[0, 2:4, 0, 0], torch.tensor([5.0, -7.0]), rtol=1e-4, atol=1e-4)
    _check_against_integers(student, images(3), compute)


def _check_against_integers(student: Any, batch: Tensor, compute: Any) -> None:
    view = integer_view(student)
    with torch.no_grad():
        expected, got = compute(view, batch)[view.outputs[0]], student(batch).double()
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)
    assert all(
        n.bias.dtype.name == "int32" for n in view.nodes if isinstance(n, (ir.Conv, ir.Linear)) and n.bias is not None
    )


@pytest.mark.parametrize("name", ["residual", "squeeze_excite", "dense"])
def test_frozen_training_is_the_deployed_arithmetic(name: str, make_student: Any, images: Any, train_step: Any) -> None:
    student = make_student(name)
    statistics = {k: v.clone() for k, v in student.state_dict().items() if "running" in k or "tracked" in k}
    with torch.no_grad():
        deployed = student(images(4))
    freeze_batch_norm(student, True)
    assert torch.equal(student.train()(images(4)).detach(), deployed)
    train_step(student, images(4))
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), parameter_name
    norms = [layer.bn for layer in quant_layers(student).values() if layer.bn is not None]
    assert all(bool(norm.weight.grad.any()) and bool(norm.bias.grad.any()) for norm in norms[:1])
    state = student.state_dict()
    assert statistics and all(torch.equal(state[key], value) for key, value in statistics.items())
    freeze_batch_norm(student, False)
    assert not torch.allclose(student(images(4)).detach(), deployed)
    state = student.state_dict()
    assert not all(torch.equal(state[key], value) for key, value in statistics.items())


def test_layers_without_batch_norm_round_their_bias_when_frozen(make_student: Any, images: Any) -> None:
    student = make_student("shapes")
    layer = quant_layers(student)["layers.8"]
    assert layer.bn is None
    weight, bias = layer.deployed()
    unit = layer.folded()[1] * layer.source.quant.step
    codes = (bias / unit).detach()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert not torch.equal(bias, layer.bias)
    bias.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.ones_like(layer.bias))  # rounding passes straight through


def test_relu_is_absorbed(make_student: Any) -> None:
    student = make_student("plain")
    assert not any(isinstance(m, nn.ReLU) for m in student.modules())
    assert {q.quant.kind for n, q in act_quantizers(student).items() if "relu" in n} == {"unsigned"}


def test_quantizer_error_names_the_place(make_net: Any, images: Any) -> None:
    student = quantizers.prepare(make_net("plain"), QuantSpec(), example_inputs=images(1))
    with pytest.raises(quantizers.NotCalibratedError, match="^relu: "):
        act_quantizers(student)["relu"](torch.zeros(1, 8, 2, 2))


def test_moving_modules() -> None:
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert WindowGather([0, 2], [3, 3, 1])(x).tolist() == [[[[3, 3, 1], [11, 11, 9]]]]
    assert GlobalAveragePool(keepdims=True)(x).shape == (1, 1, 1, 1)
    assert GlobalAveragePool(keepdims=False)(x).tolist() == [[5.5]]


def test_relu6_bounds_the_grid(make_student: Any) -> None:
    quantizers_of = act_quantizers(make_student("bottleneck", 8, 8))
    bounded = {name: q.quant for name, q in quantizers_of.items() if q.quant.largest is not None}
    assert {"blocks.0.1", "blocks.0.3", "relu6"} <= set(bounded) and "relu" not in bounded
    for quant in bounded.values():
        assert quant.largest == 6.0 and quant.step.item() * float(quant.high) <= 6.0 * 1.003


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 8), (4, 3, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_a_linear_layer_with_batch_norm_takes_rows_only(shape: tuple[int, ...], training: bool) -> None:
    """On more axes its features are the last, and batch norm works on axis 1."""
    layer = QuantLinearBn(nn.Linear(8, 8), nn.BatchNorm1d(8), weight_quantizer(4, "lsq", per_channel=True))
    layer.name = "body.linear"
    with pytest.raises(ValueError, match=r"body.linear: its batch norm works on axis 1, .*flatten to \[batch"):
        layer.train(training)(torch.randn(shape))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.BatchNorm3d(8), nn.BatchNorm1d(3)])
def test_a_batch_norm_of_another_axis_is_no_part_of_a_linear_layer(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"after Linear\(8, 8\) works on axis 1 and not on its features"):
        QuantLinearBn(nn.Linear(8, 8), norm, weight_quantizer(4, "lsq", per_channel=True))


def test_the_integer_view_refuses_a_linear_layer_with_a_batch_norm_of_another_axis(images: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Linear(12, 12))
    student = prepare(net, QuantSpec(), example_inputs=images(2))
    calibrate(student, images(4))
    quant_layers(student)["2"].bn = nn.BatchNorm1d(12).eval()
    with pytest.raises(RewriteError, match=r"2: its batch norm works on axis 1 of \[2, 8, 12, 12\]"):
        integer_view(student)


@pytest.mark.parametrize(("bits", "name"), [(8, "relu6"), (4, "relu6"), (8, "clamp")])
def test_the_first_pass_of_calibration_sees_the_bound_of_relu6(bits: int, name: str, images: Any) -> None:
    """Most features are beyond the bound, and what reads them must not see more than it."""
    bound = 6.0 if name == "relu6" else 1.5
    clip: nn.Module = nn.ReLU6() if name == "relu6" else nn.Hardtanh(0.0, bound)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), clip, nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        net[0].weight.mul_(20)
    student = prepare(net, QuantSpec(weight_bits=8, act_bits=bits), example_inputs=images(2))
    quantizer = act_quantizers(student)["1"]
    quantizer.quant.bypass = True
    x = torch.linspace(-3, 30, 100)
    torch.testing.assert_close(quantizer(x), clip(x), rtol=0, atol=0)
    torch.testing.assert_close(quantizer.quant.in_float(x), clip(x), rtol=0, atol=0)
    quantizer.quant.bypass = False
    calibrate(student, images(8))
    assert float(quantizer.quant.step.detach() * quantizer.quant.high) <= bound * 1.01
    with torch.no_grad():
        wanted, found = net.eval()(images(4)), student.eval()(images(4))
    error = float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    assert error < (0.05 if bits == 8 else 0.4)


class TwoClips(nn.Module):
    """ReLU and ReLU6 of one value that is often beyond 6, their difference read by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = 4 * self.conv(x)
        return self.head(F.relu(y) - F.relu6(y)).mean((2, 3))


def test_the_difference_of_two_clips_survives_calibration(images: Any) -> None:
    torch.manual_seed(11)
    net = TwoClips()
    with torch.no_grad():
        net.conv.weight.mul_(3)
    student = prepare(net, QuantSpec(weight_bits=8, act_bits=8), example_inputs=images(2))
    calibrate(student, images(16))
    with torch.no_grad():
        wanted, found = net.eval()(images(8)), student.eval()(images(8))
    assert float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()) < 0.08
