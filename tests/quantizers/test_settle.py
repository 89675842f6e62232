"""settle: no reachable sum near a rounding tie, by changes nobody notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from export import check_parity, export_onnx
from quantizers import QuantSpec, act_quantizers, calibrate, integer_view, prepare, quant_layers, settle
from quantizers import integer as ir
from quantizers.settle import LARGEST_CHANGE

# Ties of narrow grids end at least this far from the integers; float32 sums are off by a millionth.
LEAST_MARGIN = 5e-4
NETS = ["plain", "residual", "dense", "shapes", "bottleneck"]


def shake(student: Any) -> Any:
    """Move every parameter as training does."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.05 * torch.rand(parameter.shape, generator=generator))
    return student


def codes_of(student: Any) -> list[Any]:
    return [n.weights for n in integer_view(student).nodes if isinstance(n, (ir.Conv, ir.Linear))]


def margins(student: Any) -> list[float]:
    """Return the least distance of a reachable tie from an accumulator, a layer that feeds a grid of 2 to 4 bits."""
    view, found = integer_view(student), []
    layers = {n.output: n for n in view.nodes if isinstance(n, (ir.Conv, ir.Linear))}
    for node in view.nodes:
        layer = layers.get(node.inputs[0]) if isinstance(node, ir.Quantize) and node.grid.bits <= 4 else None
        if layer is None:
            continue
        source = view.grids[layer.inputs[0]]
        reach = max(-source.low, source.high) * float(
            abs(layer.weights.astype(int)).sum(axis=tuple(range(1, layer.weights.ndim))).max()
        )
        for scale in layer.weight_scale.tolist():
            for code in range(node.grid.low, node.grid.high):
                tie = (code + 0.5) * node.grid.scale / (scale * source.scale)
                if abs(tie) <= reach:
                    found.append(abs(tie - round(tie)))
    return found


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", NETS)
def test_no_reachable_tie(name: str, bits: int, make_student: Any) -> None:
    student = shake(make_student(name, bits, bits))
    before = margins(student)
    settle(student)
    after = margins(student)
    assert len(after) >= 8 and min(after) >= LEAST_MARGIN
    assert min(before) < LEAST_MARGIN or min(after) >= min(before) - 1e-6


@pytest.mark.parametrize("name", NETS)
def test_changes_are_small_and_codes_stay(name: str, make_student: Any, images: Any) -> None:
    student = shake(make_student(name))
    weights, steps = codes_of(student), _steps(student)
    scales = {n: layer.folded()[1].detach().clone() for n, layer in quant_layers(student).items()}
    shifts = {n: layer.folded()[2] for n, layer in quant_layers(student).items()}
    with torch.no_grad():
        before = student(images(8))
        settle(student)
        after = student(images(8))
    assert all((a == b).all() for a, b in zip(weights, codes_of(student), strict=True))
    limit = LARGEST_CHANGE * 1.001
    for quantizer, step in _steps(student).items():
        assert step == pytest.approx(steps[quantizer], rel=limit)
    for layer_name, layer in quant_layers(student).items():
        torch.testing.assert_close(layer.folded()[1], scales[layer_name], rtol=limit, atol=1e-12)
        if shifts[layer_name] is not None:  # the real bias stays
            torch.testing.assert_close(layer.folded()[2], shifts[layer_name], rtol=1e-4, atol=1e-4)
    assert float((after - before).abs().mean()) <= 0.1 * float(before.std())


def _steps(student: Any) -> dict[str, float]:
    return {name: float(q.quant.step.detach()) for name, q in act_quantizers(student).items()}


@pytest.mark.parametrize("name", ["residual", "shapes"])
def test_a_second_call_changes_almost_nothing(name: str, make_student: Any, images: Any) -> None:
    student = shake(make_student(name))
    settle(student)
    first = {key: value.clone() for key, value in student.state_dict().items()}
    with torch.no_grad():
        before = student(images(4))
        settle(student)
        assert float((student(images(4)) - before).abs().mean()) <= 0.05 * float(before.std())
    for key, value in student.state_dict().items():
        if key.endswith("bn.bias"):  # follows its factor times the mean, so that the real bias stays
            continue
        torch.testing.assert_close(value, first[key], rtol=LARGEST_CHANGE * 1.01, atol=1e-12, msg=key)


def test_per_tensor_and_dorefa(make_student: Any) -> None:
    for options in ({"per_channel": False}, {"weight_quantizer": "dorefa"}, {"act_quantizer": "pact"}):
        student = shake(make_student("residual", **options))
        weights = codes_of(student)
        settle(student)
        assert all((a == b).all() for a, b in zip(weights, codes_of(student), strict=True))
        assert min(margins(student)) >= LEAST_MARGIN


class Borders(torch.nn.Module):
    """Means over windows of which those at the border hold fewer values."""

    def __init__(self, pool: torch.nn.AvgPool2d) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.ReLU(), pool
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.relu(self.conv(x))).mean((2, 3)))


POOLS = {
    "ceil": torch.nn.AvgPool2d(3, 2, ceil_mode=True),
    "not counted": torch.nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    "both": torch.nn.AvgPool2d((3, 2), 2, padding=1, ceil_mode=True, count_include_pad=False),
    "starts in padding": torch.nn.AvgPool2d(2, 2, padding=1, ceil_mode=True),
}


@pytest.mark.parametrize("name", POOLS)
def test_no_mean_of_a_border_window_lies_on_a_tie(name: str) -> None:
    """Every number of values that occurs keeps its ties off: every possible sum is looked at."""
    torch.manual_seed(5)
    batch = torch.randn(8, 3, 10, 10)
    student: Any = prepare(Borders(POOLS[name]), QuantSpec(weight_bits=4, act_bits=4), example_inputs=batch)
    calibrate(student, [batch])
    quantizer = act_quantizers(student)["pool_quant"]
    kept = torch.nn.functional.avg_pool2d(
        torch.ones(1, 1, 10, 10).double(), POOLS[name].kernel_size, POOLS[name].stride, POOLS[name].padding,
        POOLS[name].ceil_mode, POOLS[name].count_include_pad, divisor_override=1,
    )  # fmt: skip
    if not POOLS[name].count_include_pad:
        assert set(kept.flatten().int().tolist()) == set(quantizer.origin.counts)
    assert len(quantizer.origin.counts) > 1 or name == "starts in padding"
    source, step = quantizer.origin.sources[0].quant, float(quantizer.quant.step.detach())
    unit = float(source.step.detach())
    for count in quantizer.origin.counts:
        sums = torch.arange(int(source.high) * count + 1, dtype=torch.float64)
        value = sums * unit / count / step
        inside = value <= float(quantizer.quant.high) + 0.5
        off = ((value - value.floor() - 0.5).abs() * count * step / unit)[inside]
        assert float(off.min()) >= 1e-3  # accumulator units


@pytest.mark.parametrize("name", POOLS)
def test_kernels_and_file_agree_on_border_windows(name: str, tmp_path: Any) -> None:
    torch.manual_seed(6)
    batch = torch.randn(64, 3, 10, 10)
    student: Any = prepare(Borders(POOLS[name]), QuantSpec(weight_bits=8, act_bits=8), example_inputs=batch)
    calibrate(student, [batch])
    export_onnx(student.eval(), batch, tmp_path / "n.onnx")
    report = check_parity(student, tmp_path / "n.onnx", [batch])
    row = next(layer for layer in report.layers if "pool" in layer.name)
    assert row.values > 5000 and (row.differing, row.differing_on) == (0, 0)
