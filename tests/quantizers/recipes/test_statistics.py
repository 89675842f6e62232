"""Step sizes from statistics: their coefficients, what they follow, and that the file computes the same."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from export import check_parity, export_onnx
from quantizers import quant_layers, quantizer_scales, settle
from quantizers.computed import COEFFICIENTS, FITTED, StatsWeightQuant

SPREAD = np.linspace(-12, 12, 24001)
DENSITIES = {
    "normal": np.exp(-(SPREAD**2) / 2),
    "uniform": (np.abs(SPREAD) <= math.sqrt(3)).astype(float),
    "laplace": np.exp(-np.abs(SPREAD) * math.sqrt(2)),
    "logistic": 1 / np.cosh(SPREAD * math.pi / math.sqrt(12)) ** 2,
    "triangular": np.clip(math.sqrt(6) - np.abs(SPREAD), 0, None),
}


def moments(density: np.ndarray) -> tuple[np.ndarray, float, float]:
    share = density / density.sum()
    return share, float(np.sqrt((share * SPREAD**2).sum())), float((share * np.abs(SPREAD)).sum())


def best_step(share: np.ndarray, bits: int) -> float:
    """Return the step with the least squared error on the grid, to 0.1 %."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = np.geomspace(0.02, 2, 1600)
    errors = [(share * (np.clip(np.round(SPREAD / s), low, high) * s - SPREAD) ** 2).sum() for s in steps]
    return float(steps[int(np.argmin(errors))])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_coefficients_are_the_line_through_the_best_steps(bits: int) -> None:
    found = [moments(density) for density in DENSITIES.values()]
    shapes = np.array([rms / size for _, rms, size in found])
    steps = np.array([best_step(share, bits) / size for share, _, size in found])
    slope, offset = np.polyfit(shapes, steps, 1)
    assert (slope, -offset) == pytest.approx(COEFFICIENTS[bits], abs=0.02)
    assert (shapes.min(), shapes.max()) == pytest.approx(FITTED, abs=1e-3)


def weights(seed: int = 0, shape: tuple[int, ...] = (4, 3, 3, 3)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(values: list[float], bits: int) -> float:
    size = sum(abs(v) for v in values) / len(values)
    rms = math.sqrt(sum(v * v for v in values) / len(values))
    slope, offset = COEFFICIENTS[bits]
    return size * (slope * min(max(rms / size, FITTED[0]), FITTED[1]) - offset)


@pytest.mark.parametrize("bits", sorted(COEFFICIENTS))
def test_the_step_is_the_formula_of_each_channel_or_of_the_tensor(bits: int) -> None:
    weight, low, high = weights(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    channel = StatsWeightQuant(bits, low, high, weight, per_channel=True)
    assert channel.step.shape == (4, 1, 1, 1)
    for index in range(4):
        assert channel.step[index].item() == pytest.approx(by_hand(weight[index].flatten().tolist(), bits), rel=1e-6)
    whole = StatsWeightQuant(bits, low, high, weight, per_channel=False)
    assert whole.step.item() == pytest.approx(by_hand(weight.flatten().tolist(), bits), rel=1e-6)


def test_eight_bits_hold_the_whole_range_and_zeros_have_a_step() -> None:
    weight = weights()
    weight[1] = 0
    quant = StatsWeightQuant(8, -128, 127, weight, per_channel=True)
    assert quant.codes(weight).abs().flatten(1).amax(1).tolist() == [127.0, 0.0, 127.0, 127.0]
    assert float(StatsWeightQuant(2, -2, 1, torch.zeros(3, 2), per_channel=False).step) == pytest.approx(1e-3)


@pytest.mark.parametrize("bits", [2, 6])
def test_weights_on_two_values_get_a_positive_step(bits: int) -> None:
    weight = torch.tensor([[0.5, -0.5, 0.5, -0.5]])
    step = StatsWeightQuant(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, weight, per_channel=True).step
    assert float(step) == pytest.approx(0.5 * (COEFFICIENTS[bits][0] * FITTED[0] - COEFFICIENTS[bits][1]), rel=1e-5)


def test_the_gradient_passes_inside_the_grid_alone_and_the_step_has_none() -> None:
    weight = weights().requires_grad_()
    quant = StatsWeightQuant(2, -2, 1, weight, per_channel=True)
    quant.quantize(weight).sum().backward()
    units = weight.detach() / quant.step
    assert torch.equal(weight.grad, ((units > -2) & (units < 1)).float())
    assert list(quant.parameters()) == []


def test_a_bypassed_quantizer_gives_the_weights() -> None:
    weight = weights()
    quant = StatsWeightQuant(2, -2, 1, weight, per_channel=True)
    quant.bypass = True
    assert torch.equal(quant(weight)[0], weight)


def test_a_student_has_no_weight_scales_to_learn_and_its_step_follows_its_weights(make_student: Any) -> None:
    student = make_student("residual", 2, 2, weight_quantizer="stats", first_bits=2, last_bits=2)
    layers = quant_layers(student)
    assert not {id(p) for layer in layers.values() for p in layer.quant.parameters()} & {
        id(scale) for scale in quantizer_scales(student)
    }
    copied = quant_layers(copy.deepcopy(student))
    for name, layer in layers.items():
        before = layer.quant.step.clone()
        with torch.no_grad():
            layer.weight.mul_(2)
        torch.testing.assert_close(layer.quant.step, 2 * before, rtol=1e-6, atol=0)
        assert torch.equal(copied[name].quant.step, before)  # a copy follows its own weights


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_file_computes_what_the_student_does(
    make_student: Any, images: Any, tmp_path: Path, *, per_channel: bool
) -> None:
    student = make_student("residual", 2, 2, weight_quantizer="stats", per_channel=per_channel)
    settle(student)
    export_onnx(student.eval(), images(2), tmp_path / "s.onnx", flavor="ort")
    report = check_parity(student, tmp_path / "s.onnx", [images(6)])
    assert report.passed, report.faults
