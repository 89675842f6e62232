"""settle: no reachable sum near a rounding tie, by changes nobody notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantizers import act_quantizers, integer_view, quant_layers, settle
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
