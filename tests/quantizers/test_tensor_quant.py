"""Step sizes: where they start, how their gradients are scaled, and what DoReFa and PACT compute."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantizers import NotCalibratedError
from quantizers.computed import DorefaWeightQuant
from quantizers.kernels import round_straight_through
from quantizers.tensor_quant import (
    ActQuant,
    DorefaActQuant,
    LsqActQuant,
    LsqWeightQuant,
    PactActQuant,
    RangeObserver,
    code_range,
)


def weights(seed: int = 0, shape: tuple[int, ...] = (4, 3, 3, 3)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(quant: ActQuant, x: Tensor) -> ActQuant:
    quant.observer, quant.bypass = RangeObserver(), True
    quant(x)
    quant.set_range(quant.observer)
    quant.set_step(quant.start_step(quant.observer))
    quant.observer, quant.bypass = None, False
    quant.mark_calibrated()
    return quant


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_lsq_weights_start_as_published(bits: int) -> None:
    low, high = code_range(bits, signed=True)
    weight = weights()
    quant = LsqWeightQuant(bits, low, high, weight, per_channel=True)
    assert quant.step.shape == (4, 1, 1, 1)
    for channel in range(4):
        values = [abs(v) for v in weight[channel].flatten().tolist()]
        expected = 2 * sum(values) / len(values) / math.sqrt(2 ** (bits - 1) - 1)
        assert quant.step[channel].item() == pytest.approx(expected, rel=1e-5)
    whole = LsqWeightQuant(bits, low, high, weight, per_channel=False)
    assert whole.step.shape == ()
    assert whole.step.item() == pytest.approx(2 * float(weight.abs().mean()) / math.sqrt(high), rel=1e-5)


def test_eight_bit_weights_start_with_their_whole_range() -> None:
    weight = weights()
    quant = LsqWeightQuant(8, -128, 127, weight, per_channel=True)
    assert quant.codes(weight).abs().flatten(1).amax(1).tolist() == [127.0] * 4
    assert (quant.quantize(weight) - weight).abs().max().item() <= 0.5001 * quant.step.max().item()


def test_lsq_weight_gradient_scale() -> None:
    weight = weights()
    channel = LsqWeightQuant(3, -4, 3, weight, per_channel=True)
    assert channel.grad_scale == pytest.approx(1 / math.sqrt(27 * 3))
    assert LsqWeightQuant(3, -4, 3, weight, per_channel=False).grad_scale == pytest.approx(1 / math.sqrt(4 * 27 * 3))
    channel.quantize(weight).sum().backward()
    assert channel.scale.grad is not None
    for index in range(4):
        step, slope = channel.step[index].item(), 0.0
        for value in weight[index].flatten().tolist():
            v = value / step
            slope += round(v) - v if -4 < v < 3 else (-4 if v <= -4 else 3)
        assert float(channel.scale.grad[index]) == pytest.approx(slope / math.sqrt(81), rel=1e-3, abs=1e-4)


def test_dead_channel_and_rescale() -> None:
    weight = weights()
    weight[1] = 0
    quant = LsqWeightQuant(2, -2, 1, weight, per_channel=True)
    assert bool((quant.step > 0).all()) and bool((quant.quantize(weight)[1] == 0).all())
    codes, before = quant.codes(weight), quant.quantize(weight).detach()
    quant.rescale(weight, torch.tensor([1.001, 1.0, 0.999, 1.002]))
    assert torch.equal(quant.codes(weight), codes)
    torch.testing.assert_close(quant.quantize(weight)[0], before[0] * 1.001)


@pytest.mark.parametrize("bits", [2, 4])
def test_dorefa_weights_follow_the_formula(bits: int) -> None:
    weight = weights(1, (8, 8, 3, 3))
    quant = DorefaWeightQuant(bits, 0, 0, weight, has_norm=True)
    levels = 2**bits - 1
    largest = max(abs(math.tanh(v)) for v in weight.flatten().tolist())
    got = quant.quantize(weight).flatten().tolist()
    for value, result in zip(weight.flatten().tolist(), got, strict=True):
        unit = math.tanh(value) / (2 * largest) + 0.5
        assert result == pytest.approx(2 * round(unit * levels) / levels - 1, abs=1e-6)
    odd = {round(v * levels) for v in got}
    assert odd <= set(range(-levels, levels + 1, 2)) and len(odd) == 2**bits, "odd multiples of 1 / (2**k - 1)"
    assert set(quant.codes(weight).flatten().tolist()) == odd
    assert quant.bits == bits + 1


def test_dorefa_gradient_passes_tanh_and_maximum() -> None:
    weight = torch.tensor([[0.5, -1.0, 0.25]], requires_grad=True)
    DorefaWeightQuant(2, 0, 0, weight.detach(), has_norm=True).quantize(weight)[0, 0].backward()
    assert weight.grad is not None
    # straight through the rounding: 2 * d/dw [tanh w0 / (2 max)], max = tanh(1) at w1 = -1
    largest = math.tanh(1.0)
    assert float(weight.grad[0, 0]) == pytest.approx((1 - math.tanh(0.5) ** 2) / largest, rel=1e-5)
    assert float(weight.grad[0, 1]) == pytest.approx(math.tanh(0.5) / largest**2 * (1 - largest**2), rel=1e-4)
    assert float(weight.grad[0, 2]) == 0.0


def test_dorefa_gain_restores_the_size_without_batch_norm() -> None:
    weight = weights(2) * 0.01
    quant = DorefaWeightQuant(2, 0, 0, weight, has_norm=False)
    assert quant.quantize(weight).abs().mean().item() == pytest.approx(float(weight.abs().mean()), rel=1e-4)
    assert float(DorefaWeightQuant(2, 0, 0, weight, has_norm=True).gain) == 1.0
    codes = quant.codes(weight)
    quant.rescale(weight, torch.tensor(1.001))
    assert torch.equal(quant.codes(weight), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_activations_start_as_published(bits: int) -> None:
    x = weights(3)
    quant = calibrated(LsqActQuant(bits, "unsigned"), x)
    rectified = [max(v, 0.0) for v in x.flatten().tolist()]
    expected = 2 * sum(rectified) / len(rectified) / math.sqrt(2**bits - 1)
    assert quant.step.item() == pytest.approx(expected, rel=1e-5)
    signed = calibrated(LsqActQuant(bits, "signed"), x)
    assert signed.step.item() == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(2 ** (bits - 1) - 1), rel=1e-5)


def test_wide_and_bounded_starts() -> None:
    x = torch.tensor([[-3.0, 1.0, 12.0]])
    assert calibrated(LsqActQuant(8, "unsigned"), x).step.item() == pytest.approx(12 / 255)
    assert calibrated(LsqActQuant(8, "signed"), x).step.item() == pytest.approx(12 / 127)
    assert calibrated(LsqActQuant(8, "unsigned", largest=6.0), x).step.item() == pytest.approx(6 / 255)
    shifted = calibrated(LsqActQuant(8, "shifted"), x)
    out, step, zero_point, bits = shifted(x)
    assert (int(zero_point), int(bits)) == (51, 8) and out[0, 0].item() == pytest.approx(-3.0, abs=step.item())
    assert float(shifted.high) - float(shifted.low) == 255
    assert calibrated(LsqActQuant(2, "unsigned"), -x.abs()).step.item() > 0, "a dead ReLU keeps a positive step"


def test_activation_gradient_scale_counts_values_of_one_image() -> None:
    x = torch.zeros(8, 3, 4, 4)
    assert LsqActQuant(2, "unsigned").grad_scale(x) == pytest.approx(1 / math.sqrt(48 * 3))
    assert LsqActQuant(4, "signed").grad_scale(x) == pytest.approx(1 / math.sqrt(48 * 7))
    assert LsqActQuant(4, "unsigned").grad_scale(x[:1]) == LsqActQuant(4, "unsigned").grad_scale(x)


def test_pact_alpha_moves_by_clipped_values_only() -> None:
    quant = PactActQuant(2, "unsigned")
    quant.set_step(0.5)
    quant.mark_calibrated()
    assert quant.alpha.item() == 1.5
    x = torch.tensor([[-1.0, 0.3, 1.4, 1.6, 9.0]], requires_grad=True)
    out = quant(x)[0]
    assert out.tolist() == [[0.0, 0.5, 1.5, 1.5, 1.5]]
    out.backward(torch.tensor([[1.0, 1.0, 1.0, 2.0, 4.0]]))
    assert quant.alpha.grad is not None and x.grad is not None
    assert float(quant.alpha.grad) == pytest.approx(6.0), "1 for each value at or above alpha"
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0]]


def test_dorefa_activations_are_fixed_at_one() -> None:
    quant = calibrated(DorefaActQuant(2, "unsigned"), torch.randn(2, 50) * 10)
    assert not list(quant.parameters())
    out = quant(torch.tensor([[-1.0, 0.2, 0.4, 7.0]]))[0]
    torch.testing.assert_close(out, torch.tensor([[0.0, 1 / 3, 1 / 3, 1.0]]))


@pytest.mark.parametrize("method", [LsqActQuant, PactActQuant, DorefaActQuant])
def test_shared_steps(method: type[ActQuant]) -> None:
    first, second, third = LsqActQuant(8, "unsigned"), method(8, "signed"), LsqActQuant(8, "signed")
    second.share(first)
    third.share(second)
    first.share(third)  # already one group: nothing happens, and nothing turns in circles
    third.set_step(0.125)
    assert [q.step.item() for q in (first, second, third)] == [0.125] * 3
    assert second.owner is third.owner is first
    assert not list(second.parameters()) and len(list(first.parameters())) == 1


def test_not_calibrated_names_the_way_out() -> None:
    with pytest.raises(NotCalibratedError, match=r"call quantizers\.calibrate\(student, batches\)"):
        LsqActQuant(2, "unsigned")(torch.zeros(1, 2))
    assert issubclass(NotCalibratedError, RuntimeError)


def test_a_state_without_calibration_is_not_taken_for_one_with_it() -> None:
    used = calibrated(LsqActQuant(2, "unsigned"), weights(5).abs())
    used(torch.zeros(1, 2))
    used.load_state_dict(LsqActQuant(2, "unsigned").state_dict())
    with pytest.raises(NotCalibratedError):
        used(torch.zeros(1, 2))


def test_calibrated_flag_travels_with_the_state() -> None:
    source = calibrated(LsqActQuant(4, "shifted"), weights(5))
    fresh = LsqActQuant(4, "shifted")
    fresh.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(fresh(weights(6))[0], source(weights(6))[0])


def test_steps_through_zero_stay_positive() -> None:
    quant = calibrated(LsqActQuant(2, "unsigned"), weights(5))
    for value in (0.0, -0.25):
        quant.scale.data.fill_(value)
        assert quant.step.item() > 0 and bool(torch.isfinite(quant(weights(6))[0]).all())


def test_observer() -> None:
    observer = RangeObserver()
    assert observer.is_empty
    observer.see(torch.tensor([-2.0, 1.0]))
    observer.see(torch.tensor([5.0, 0.0]))
    assert (observer.minimum, observer.maximum, observer.mean_abs, observer.is_empty) == (-2.0, 5.0, 2.0, False)


def test_rounding_straight_through() -> None:
    x = torch.tensor([0.5, 1.5, -0.4], requires_grad=True)
    out = round_straight_through(x)
    out.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert out.tolist() == [0.0, 2.0, 0.0] and x.grad is not None and x.grad.tolist() == [1.0, 2.0, 3.0]
