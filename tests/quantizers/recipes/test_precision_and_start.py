"""Codes of latent weights, a student of more precision for a while, another start, and fresh statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantizers import QuantSpec, act_quantizers, calibrate, prepare, quant_layers, reestimate_batch_norm
from quantizers.recipes.carrying import carry_over
from quantizers.recipes.codes import can_be_placed, distance_to_codes, low_bit_layers, place, weight_codes
from quantizers.recipes.precision import stochastic_precision


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turn(student: nn.Module) -> None:
    """Give every second channel a negative batch-norm factor."""
    for layer in quant_layers(student).values():
        if layer.bn is not None:
            layer.bn.weight.data[::2] *= -1


# codes


@pytest.mark.parametrize("method", ["lsq", "stats", "dorefa"])
def test_codes_times_the_step_are_the_low_bit_weights(make_student: Any, method: str) -> None:
    student = make_student("residual", 3, 3, weight_quantizer=method)
    turn(student)
    layers = low_bit_layers(student)
    assert layers
    assert set(layers) == {name for name, layer in quant_layers(student).items() if layer.quant.count <= 16}
    for layer in layers.values():
        codes = weight_codes(layer)
        assert torch.equal(codes, codes.round())
        torch.testing.assert_close(codes * layer.quant.step, layer.low_bit_weight().detach(), rtol=1e-5, atol=1e-7)
        assert can_be_placed(layer) == (method != "dorefa")


def test_eight_bit_and_frozen_layers_have_no_low_bit_weights(make_student: Any) -> None:
    student = make_student("residual", 4, 4)
    names = list(low_bit_layers(student))
    quant_layers(student)[names[0]].weight.requires_grad_(False)
    assert list(low_bit_layers(student)) == names[1:]
    assert not {"stem.0", "head"} & set(names)  # 8 bits


def test_placed_weights_have_their_codes_and_no_distance(make_student: Any) -> None:
    student = make_student("residual", 2, 2)
    turn(student)
    for layer in low_bit_layers(student).values():
        before, off = layer.weight.detach().clone(), distance_to_codes(layer)
        torch.testing.assert_close(
            off[off != 0], (before - layer.low_bit_weight().detach())[off != 0], rtol=1e-5, atol=1e-7
        )
        some = torch.rand(before.shape, generator=generator()) < 0.5
        codes = weight_codes(layer)
        place(layer, codes, some)
        assert torch.equal(weight_codes(layer), codes)
        assert torch.equal(layer.weight[~some], before[~some])
        assert float(distance_to_codes(layer)[some].abs().max()) < 1e-6


# stochastic precision


def running(student: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in student.named_buffers() if "running" in name or "tracked" in name]


def test_precision_is_drawn_and_given_back(make_student: Any, images: Any) -> None:
    student, batch = make_student("residual", 2, 2).train(), images(4)
    low = {name for name, one in act_quantizers(student).items() if one.quant.bits < 8}
    before, momenta = running(student), [m.momentum for m in student.modules() if hasattr(m, "momentum")]
    with stochastic_precision(student, generator(), low_share=0.0) as finer, torch.no_grad():
        precise = student(batch)
        assert set(finer) == low
        for name in finer:  # 2 bits: 0 ... 3 becomes 0 ... 255 on the same range
            assert act_quantizers(student)[name].quant.finer == 85
    with stochastic_precision(student, generator(), low_share=1.0) as finer, torch.no_grad():
        assert finer == () and torch.equal(student(batch), student(batch))
    with stochastic_precision(student, generator(1)) as one, torch.no_grad():
        assert set(one) < low
    with stochastic_precision(student, generator(1)) as again:
        assert one == again
    assert all(torch.equal(a, b) for a, b in zip(before, running(student), strict=True))
    assert [m.momentum for m in student.modules() if hasattr(m, "momentum")] == momenta
    with torch.no_grad():
        assert not torch.equal(precise, student(batch))


def test_the_finer_grid_has_the_own_codes_and_the_same_range(make_student: Any) -> None:
    student = make_student("plain", 2, 2)
    quantizer = next(one for one in act_quantizers(student).values() if one.quant.bits == 2)
    step = quantizer.quant.step.item()
    x = torch.linspace(-step, 5 * step, 1001)
    own = quantizer(x).detach()
    quantizer.quant.finer = 85
    fine = quantizer(x).detach()
    quantizer.quant.finer = 1
    assert float(fine.max()) == pytest.approx(float(own.max())) and float(fine.min()) == float(own.min())
    assert len(fine.unique()) == 256
    assert float((fine - x)[(x > 0) & (x < 3 * step)].abs().max()) <= step / 85 / 2 * 1.001


def test_an_impossible_share_is_refused(make_student: Any) -> None:
    student = make_student("plain", 2, 2)
    refused = pytest.raises(ValueError, match=r"low_share must be in \[0, 1\], got low_share=1.5")
    with refused, stochastic_precision(student, generator(), low_share=1.5):
        pass


# another start


@pytest.mark.parametrize("widths", [(8, 8), (4, 4), (3, 8)])
def test_weights_and_batch_norm_are_carried_over_and_steps_start_anew(
    make_net: Any, images: Any, widths: tuple[int, int]
) -> None:
    net, batch = make_net("residual"), images(4)
    earlier = prepare(net, QuantSpec(*widths), batch)
    calibrate(earlier, batch)
    with torch.no_grad():
        for layer in quant_layers(earlier).values():
            layer.weight.mul_(3)
    student = prepare(net, QuantSpec(2, 2), batch)
    grids = {name: one.quant.step.clone() for name, one in act_quantizers(student).items()}
    carry_over(student, earlier.state_dict())
    before = quant_layers(earlier)
    for name, layer in quant_layers(student).items():
        assert torch.equal(layer.weight, before[name].weight)
        if layer.bn is not None:
            assert torch.equal(layer.bn.running_var, before[name].bn.running_var)
        if layer.quant.bits == 2:  # LSQ: 2 mean|w| / sqrt(1)
            expected = 2 * layer.weight.abs().flatten(1).mean(1)
            torch.testing.assert_close(layer.quant.step.flatten(), expected, rtol=1e-5, atol=0)
    assert all(torch.equal(one.quant.step, grids[name]) for name, one in act_quantizers(student).items())
    calibrate(student, batch)
    assert bool(student(batch).isfinite().all())


def test_the_state_of_another_net_is_refused_and_nothing_changes(make_student: Any) -> None:
    student, other = make_student("residual", 2, 2), make_student("plain", 4, 4)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match="the state is from another net: .* of the same net"):
        carry_over(student, other.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


# fresh statistics


def test_statistics_are_the_mean_over_the_batches(make_student: Any, images: Any) -> None:
    student, batches = make_student("plain", 2, 2), [images(8, seed=1), images(8, seed=2)]
    layer = quant_layers(student)["stem.0"]
    means = []
    for batch in batches:
        with torch.no_grad():
            grid = layer.source(batch)
            means.append(layer._conv_forward(grid, layer.low_bit_weight(), layer.bias).mean((0, 2, 3)))
    layer.bn.running_mean.fill_(7.0)
    layer.deployed_in_training = True
    student.train()
    reestimate_batch_norm(student, iter(batches))
    torch.testing.assert_close(layer.bn.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    assert student.training and layer.deployed_in_training


def test_no_batch_is_an_error(make_student: Any) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_batch_norm(make_student("plain", 2, 2), [])
