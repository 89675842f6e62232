"""settle: no reachable sum near a rounding tie, by changes nobody notices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

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


FUNCTIONS = [
    nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(), nn.Tanh(), nn.Mish(), nn.Softplus(), nn.ELU(), nn.Hardswish(),
    nn.LeakyReLU(), nn.PReLU(8, init=0.1),
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_values_of_functions_keep_off_the_ties_of_their_grid(function: nn.Module, images: Any) -> None:
    """Every code of the operand, through the function in float64: no value within a thousandth of a step of a tie."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), function, nn.Conv2d(8, 4, 3))
    if isinstance(function, nn.PReLU):
        function.weight.data.uniform_(-0.3, 0.9)
    student = prepare(net, QuantSpec(weight_bits=4, act_bits=4), example_inputs=images(2))
    calibrate(student, images(16))
    settle(shake(student))
    for quantizer in act_quantizers(student).values():
        if quantizer.origin is None or quantizer.origin.kind != "function":
            continue
        source, grid = quantizer.origin.sources[0].quant, quantizer.quant
        codes = torch.arange(int(source.low), int(source.high) + 1, dtype=torch.float64)[:, None]
        call = copy.deepcopy(quantizer.origin.function).double()
        values = call(codes.expand(-1, 8) * source.step.item()).detach() / grid.step.item()
        inside = values[(values > float(grid.low)) & (values < float(grid.high))]
        assert inside.numel() > 10 and float((inside - inside.floor() - 0.5).abs().min()) > 1e-3
        break
    else:
        pytest.fail("no quantizer reads the function")


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


# -- ties that no scale of a layer can move ----------------------------------------------------------------------------


class Averaged(torch.nn.Module):
    """A value and its mean in one sum or one concatenation.

    Args:
        combine: Makes of ``[batch, 6, 8, 8]`` features what a head of ``width`` inputs reads.
        width: Channels of that.
    """

    def __init__(self, combine: Any, width: int = 6) -> None:
        super().__init__()
        self.conv, self.combine, self.head = torch.nn.Conv2d(3, 6, 3, padding=1), combine, torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.combine(F.relu(self.conv(x))), 2).mean(2))


AVERAGED = {
    "mean and maximum": lambda y: F.adaptive_avg_pool2d(y, 1) + F.adaptive_max_pool2d(y, 1),
    "maximum and mean": lambda y: F.adaptive_max_pool2d(y, 1) + y.mean((2, 3), keepdim=True),
    "a mean of every place": lambda y: y + y.mean((2, 3), keepdim=True),
    "windows": lambda y: F.avg_pool2d(y, 2) + F.max_pool2d(y, 2),
    "by way of a third": lambda y: (F.avg_pool2d(y, 2) + F.relu(y[:, :, ::2, ::2] - 0.5)) + y[:, :, ::2, ::2],
    "mean of a mean": lambda y: F.avg_pool2d(F.avg_pool2d(y, 2), 2) + y[:, :, ::4, ::4],
    "a product": lambda y: y * y + y,
    "a product and another": lambda y: y * torch.sigmoid(y) + y,
}


def least_margin(student: Any) -> float:
    """Return the least distance of a reachable tie from an integer, over all that quantizers read."""
    found = [0.5]
    for quantizer in act_quantizers(student).values():
        origin, quant = quantizer.origin, quantizer.quant
        if origin is None or origin.kind in ("grid", "function"):
            continue
        steps = [float(source.quant.step.detach()) for source in origin.sources]
        reach = [max(-float(source.quant.low), float(source.quant.high)) for source in origin.sources]
        is_product = origin.kind == "mul"
        for count in origin.counts:
            unit = (steps[0] * steps[1] if is_product else steps[0]) / count
            largest = reach[0] * reach[1] if is_product else sum(reach) if origin.kind == "add" else reach[0] * count
            codes = torch.arange(int(quant.low), int(quant.high), dtype=torch.float64) + 0.5
            ties = codes * (float(quant.step.detach()) / unit)
            ties = ties[ties.abs() <= largest]
            found += (ties - ties.round()).abs().tolist()
    return min(found)


@pytest.mark.parametrize("name", AVERAGED)
def test_a_mean_does_not_lie_on_the_step_of_what_it_averages(name: str, tmp_path: Any) -> None:
    torch.manual_seed(7)
    batch = torch.randn(16, 3, 8, 8)
    student: Any = prepare(Averaged(AVERAGED[name]), QuantSpec(weight_bits=4, act_bits=4), example_inputs=batch)
    calibrate(student, [batch])
    assert least_margin(student) >= 1e-3  # accumulator units; exact ties gave 0
    for flavor in ("ort", "qcdq"):  # the runtime would join two plain pairs of eight bits that follow each other
        export_onnx(student.eval(), batch, tmp_path / "n.onnx", flavor=flavor)
        report = check_parity(student, tmp_path / "n.onnx", [batch])
        assert report.layers and [(row.differing, row.differing_on) for row in report.layers if row.max_steps_on] == []
        assert not report.faults and report.on.differing == 0 and report.on.max_steps < 0.01


def test_a_mean_in_a_concatenation_gets_a_grid_of_its_own() -> None:
    torch.manual_seed(8)
    batch = torch.randn(4, 3, 8, 8)
    net = Averaged(lambda y: torch.cat([F.avg_pool2d(y, 2), F.max_pool2d(y, 2)], 1), width=12)
    student: Any = prepare(net, QuantSpec(weight_bits=4, act_bits=4), example_inputs=batch)
    calibrate(student, [batch])
    means = [q for q in act_quantizers(student).values() if q.origin is not None and q.origin.is_even_mean]
    assert means and all(mean.quant.owner is not mean.origin.sources[0].quant.owner for mean in means)
    assert least_margin(student) >= 1e-3


def test_a_mean_of_nine_may_share_the_step() -> None:
    """Its ties are halves, as far from the integers as can be: no copy is made."""
    torch.manual_seed(9)
    batch = torch.randn(4, 3, 9, 9)
    net = Averaged(lambda y: F.avg_pool2d(y, 3) + F.max_pool2d(y, 3))
    student: Any = prepare(net, QuantSpec(weight_bits=4, act_bits=4), example_inputs=batch)
    calibrate(student, [batch])
    quantizer = act_quantizers(student)["avg_pool2d_quant"]
    assert quantizer.quant.owner is quantizer.origin.sources[0].quant.owner and least_margin(student) >= 1e-3


class Halves(torch.nn.Module):
    """A frozen constant whose result is on the step of the images, behind two ReLUs; ``x + relu(relu(c x))``."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip, self.head = clip, torch.nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((F.relu(self.clip(-0.3 * x)) + x).mean((2, 3)))


@pytest.mark.parametrize("clip", [F.relu, F.relu6, lambda x: F.relu(F.max_pool2d(x, 3, 1, 1))])
def test_a_layer_behind_two_clips_is_settled(clip: Any, tmp_path: Any) -> None:
    torch.manual_seed(244)
    batch = torch.randn(32, 3, 8, 8)
    student: Any = prepare(Halves(clip), QuantSpec(weight_bits=4, act_bits=4), example_inputs=batch)
    calibrate(student, [batch])
    first = next(iter(quant_layers(student).values()))
    assert first.consumers, "the quantizer behind the clips reads this layer"
    export_onnx(student.eval(), batch, tmp_path / "n.onnx")
    report = check_parity(student, tmp_path / "n.onnx", [batch])
    assert sum(row.values for row in report.layers) > 10_000
    assert [(row.differing, row.differing_on) for row in report.layers if row.differing or row.differing_on] == []


@pytest.mark.parametrize("affine", [True, False])
def test_one_step_for_all_channels_is_settled_for_all(affine: bool) -> None:
    """Without factors of batch norm, the one step of the weights must suit every channel."""
    torch.manual_seed(10)
    batch = torch.randn(8, 3, 8, 8)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4, affine=affine), torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    )  # fmt: skip
    spec = QuantSpec(weight_bits=2, act_bits=2, per_channel=False)
    student: Any = prepare(net, spec, example_inputs=batch)
    calibrate(student, [batch])
    shake(student)
    weights = codes_of(student)
    settle(student)
    assert all((a == b).all() for a, b in zip(weights, codes_of(student), strict=True))
    assert min(margins(student)) >= LEAST_MARGIN


class Residual(torch.nn.Module):
    """A signed sum that a convolution reads on four bits and a second sum on eight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = (torch.nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = x + self.first(x)
        return self.head(F.relu(y + self.second(y)))


def test_a_tie_just_beyond_the_last_code_counts() -> None:
    """EfficientNet-B6, W4A4: the tie at 128.00009 lay beyond the reach of code -128, and kernels rounded it apart."""
    torch.manual_seed(11)
    batch = torch.randn(4, 3, 5, 5)
    student: Any = prepare(Residual(), QuantSpec(weight_bits=4, act_bits=4), example_inputs=batch)
    calibrate(student, [batch])
    changed = next(q for q in act_quantizers(student).values() if int(q.quant.high) == 7 and q.origin is not None)
    (source,) = changed.origin.sources
    assert (int(source.quant.low), int(changed.quant.low)) == (-128, -8)
    changed.quant.owner.set_step(source.quant.step.item() * 128.00009 / 3.5)
    settle(student)
    codes = torch.arange(-128, 128, dtype=torch.float64) * source.quant.step.item() / changed.quant.step.item()
    assert float((codes - codes.floor() - 0.5).abs().min()) > 1e-3


@pytest.mark.parametrize("offset", [30.0, 100.0, 300.0])
def test_the_bias_is_part_of_the_sum(offset: float) -> None:
    """Ties far beyond the sum of products are reached with the bias; there float32 rounds more, too."""
    torch.manual_seed(0)
    batch = torch.randn(16, 3, 10, 14)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    student: Any = prepare(net, QuantSpec(weight_bits=2, act_bits=2), example_inputs=batch)
    with torch.no_grad():
        student.get_submodule("0").bias += offset
    calibrate(student, [batch])
    view = integer_view(student)
    layer = next(node for node in view.nodes if isinstance(node, ir.Conv))
    grid = next(node.grid for node in view.nodes if isinstance(node, ir.Quantize) and node.inputs[0] == layer.output)
    source = view.grids[layer.inputs[0]]
    assert layer.bias is not None
    products = max(-source.low, source.high) * abs(layer.weights.astype(int)).reshape(8, -1).sum(1)
    assert max(abs(layer.bias)) > max(products)
    found = []
    for scale, bias, most in zip(layer.weight_scale.tolist(), layer.bias.tolist(), products.tolist(), strict=True):
        for code in range(grid.low, grid.high):
            tie = (code + 0.5) * grid.scale / (scale * source.scale)
            if abs(tie - bias) <= most:
                found.append(abs(tie - round(tie)) / max(1.0, abs(tie) * 2**-22 / 0.125))
    assert found and min(found) >= 0.03
