"""Calibration: scales and statistics from data, everything else unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers
from quantizers import QuantSpec, act_quantizers, calibrate, freeze_batch_norm, prepare, quant_layers


def fresh(make_net: Any, images: Any, name: str = "residual", **options: Any) -> Any:
    return prepare(make_net(name), QuantSpec(**{"weight_bits": 2, "act_bits": 2, **options}), example_inputs=images(1))


def test_modes_and_momenta_are_restored(make_net: Any, images: Any) -> None:
    student = fresh(make_net, images, "perceptron")
    student.get_submodule("drop").eval()
    layer = quant_layers(student)["stem.0"]
    layer.bn.momentum, layer.deployed_in_training = 0.37, True
    modes = {name: module.training for name, module in student.named_modules()}
    grads = [p.requires_grad for p in student.parameters()]
    calibrate(student, [images(4)])
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert layer.bn.momentum == 0.37 and layer.deployed_in_training
    assert [p.requires_grad for p in student.parameters()] == grads
    assert all(q.quant.observer is None and not q.quant.bypass for q in act_quantizers(student).values())


@pytest.mark.parametrize("set_from", [calibrate, quantizers.reestimate_batch_norm])
def test_one_batch_by_itself_is_a_batch(set_from: Any, make_net: Any, images: Any) -> None:
    batch, labels = images(4), torch.arange(4)
    states = []
    for given in ([batch], batch, (batch, labels), [(batch, labels)]):
        student = fresh(make_net, images)
        calibrate(student, [images(6, seed=3)])
        set_from(student, given)
        states.append(student.state_dict())
    for state in states[1:]:
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())


def test_everything_is_restored_on_failure(make_net: Any, images: Any) -> None:
    student = fresh(make_net, images)
    modes = {name: module.training for name, module in student.named_modules()}
    momenta = [m.momentum for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    with pytest.raises(ValueError, match=r"calibration batch 0 of shape \(2, 5, 8, 8\) cannot be passed through"):
        calibrate(student, [torch.randn(2, 5, 8, 8)])
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert [m.momentum for m in student.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert all(q.quant.observer is None and not q.quant.bypass for q in act_quantizers(student).values())


@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_are_the_average_over_the_batches(frozen: bool, make_net: Any, images: Any) -> None:
    student, batches = fresh(make_net, images), [images(4, seed=1), images(6, seed=2), images(5, seed=3)]
    freeze_batch_norm(student, frozen)
    calibrate(student, batches)
    layer = quant_layers(student)["stem.0"]
    source = act_quantizers(student)["images_quant"]
    means, variances = [], []
    with torch.no_grad():
        for batch in batches:
            raw = layer._conv_forward(source(batch), layer.weight_quant(layer.weight), layer.bias)
            means.append(raw.mean((0, 2, 3)))
            variances.append(raw.transpose(0, 1).flatten(1).var(dim=1, unbiased=True))
    torch.testing.assert_close(layer.bn.running_mean, torch.stack(means).mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.bn.running_var, torch.stack(variances).mean(0), rtol=1e-3, atol=1e-4)


def test_only_scales_move_more_than_a_hair(make_net: Any, images: Any) -> None:
    student = fresh(make_net, images)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    calibrate(student, [images(8)])
    for name, parameter in student.named_parameters():
        if "act_quant" not in name:  # settling moves batch norm and weight scales by at most 0.2 %
            torch.testing.assert_close(parameter.detach(), before[name], rtol=0.002, atol=0.02, msg=name)


def test_no_grid_lies_within_one_unit_of_what_it_reads(make_net: Any, images: Any) -> None:
    net = make_net("residual")
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        norms[0].weight.zero_()  # nothing comes out of the first layer, so nothing goes into the others
        for norm in norms:
            norm.bias.zero_()
    student = prepare(net, QuantSpec(weight_bits=2, act_bits=2), example_inputs=images(1))
    calibrate(student, [images(8)])
    for layer in quant_layers(student).values():
        unit = float((layer.folded()[1].max() * layer.source.quant.step).detach())
        for consumer in layer.consumers:
            assert float(consumer.quant.step.detach()) >= 0.99 * unit / 2**consumer.quant.bits


def test_scales_follow_the_images(make_net: Any, images: Any) -> None:
    small, large = fresh(make_net, images), fresh(make_net, images)
    calibrate(small, [images(8)])
    calibrate(large, [images(8) * 10])
    ratio = _step(large, "images_quant") / _step(small, "images_quant")
    assert ratio == pytest.approx(10, rel=0.01)
    values = images(8)
    grid = act_quantizers(small)["images_quant"].quant
    assert float(grid.low) < 0 < float(grid.high), "the zero point of an image with both signs"
    assert _step(small, "images_quant") == pytest.approx(float(values.max() - values.min()) / 255, rel=0.02)


def _step(student: Any, name: str) -> float:
    return float(act_quantizers(student)[name].quant.step.detach())


def test_order_of_calls_and_pairs(make_net: Any, images: Any) -> None:
    """Pairs (images, labels) and generators are fine, and a second call gives the same scales."""
    student = fresh(make_net, images)
    calibrate(student, ((images(4), torch.zeros(4)) for _ in range(2)))
    first = {name: _step(student, name) for name in act_quantizers(student)}
    calibrate(student, [images(4), images(4)])
    for name in first:
        assert _step(student, name) == pytest.approx(first[name], rel=0.1)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "calibrate needs at least one batch of images, got none"),
        ([torch.full((2, 3, 8, 8), float("nan"))], ValueError, "calibration batch 0 holds NaN or infinite values"),
        ([torch.ones(2, 3, 8, 8), torch.full((2, 3, 8, 8), float("inf"))], ValueError, "calibration batch 1 holds NaN"),
        ([torch.zeros(2, 3, 8, 8)], ValueError, "all calibration images are zero"),
        (
            [torch.ones(2, 3, 8, 8, dtype=torch.uint8)],
            TypeError,
            "batches must be float image tensors, got Tensor torch.uint8",
        ),
        (["images"], TypeError, "batches must be float image tensors, got str"),
        ([()], TypeError, "batches must be float image tensors, got tuple"),
        (None, TypeError, "batches must be image tensors, or tuples that start with one, got NoneType"),
        ({"images": torch.ones(2, 3, 8, 8)}, TypeError, "batches must be image tensors.* got dict"),
    ],
)
def test_bad_batches(batches: list[Tensor], error: type[Exception], message: str, make_net: Any, images: Any) -> None:
    student = fresh(make_net, images, "plain")
    with pytest.raises(error, match=message):
        calibrate(student, batches)
    assert not any(q.quant.is_calibrated for q in act_quantizers(student).values())
    with pytest.raises(quantizers.NotCalibratedError):
        student(images(2))


def test_one_batch_by_itself_is_enough(make_net: Any, images: Any) -> None:
    whole, listed = fresh(make_net, images), fresh(make_net, images)
    calibrate(whole, images(6, seed=4))
    calibrate(listed, [images(6, seed=4)])
    assert torch.equal(whole.eval()(images(2)), listed.eval()(images(2)))


class Cropped(nn.Module):
    """Crops the middle half and takes another path for large images, as sizes say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        y = y * 2 if y.shape[2] > 8 else y[:, :, y.shape[2] // 4 : 3 * y.shape[2] // 4]
        return self.head(y)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 8, 6), (2, 1, 8, 8)])
def test_batches_of_another_size_are_refused_with_both_sizes(shape: tuple[int, ...]) -> None:
    student = prepare(Cropped(), QuantSpec(), example_inputs=torch.randn(2, 3, 8, 8))
    found = ", ".join(map(str, shape[1:]))
    with pytest.raises(ValueError, match=rf"batch 0.*shape \({found}\).*prepared for \(3, 8, 8\).*example_inputs="):
        calibrate(student, [torch.randn(shape)])
    calibrate(student, [torch.randn(5, 3, 8, 8)])


def test_a_single_image_is_told_to_take_a_batch_axis() -> None:
    student = prepare(Cropped(), QuantSpec(), example_inputs=torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) is not a batch.*image\[None\]"):
        calibrate(student, [torch.randn(3, 8, 8)])


STUDENTS_ONLY: dict[str, Any] = {
    "calibrate": lambda net, images: calibrate(net, images),
    "reestimate_batch_norm": lambda net, images: quantizers.reestimate_batch_norm(net, images),
    "freeze_batch_norm": lambda net, _images: quantizers.freeze_batch_norm(net),
    "settle": lambda net, _images: quantizers.settle(net),
    "integer_view": lambda net, _images: quantizers.integer_view(net),
    "layer_report": lambda net, _images: quantizers.layer_report(net),
}


@pytest.mark.parametrize("name", STUDENTS_ONLY)
def test_a_float_net_is_refused_and_left_as_it_is(name: str, make_net: Any, images: Any) -> None:
    net = make_net("residual").eval()
    net(images(4))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(TypeError, match=r"takes a student that quantizers\.prepare made, got \w+; call prepare"):
        STUDENTS_ONLY[name](net, images(4))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with pytest.raises(TypeError, match="takes a student"):
        STUDENTS_ONLY[name]("student", images(4))
