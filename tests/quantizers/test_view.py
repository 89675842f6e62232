"""The integer view computes what the student computes, code by code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantizers
from quantizers import QuantSpec, RewriteError, integer_view, layer_report
from quantizers import integer as ir

# Ties of wide (8-bit) grids are too many to keep every sum away from: a float32 sum may round to the neighbor.
WIDE_GRID_DIFFERING = 0.002


def student_values(student: Any, batch: Tensor) -> dict[str, Tensor]:
    """Return what every quantizer of the student puts out, by module path."""
    values: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: values.__setitem__(name, out.detach()))
        for name, module in quantizers.act_quantizers(student).items()
    ]
    with torch.no_grad():
        values["logits"] = student(batch)
    for handle in handles:
        handle.remove()
    return values


def test_every_code_of_every_net(
    net_name: str, make_student: Any, images: Any, compute: Callable[..., dict[str, Tensor]]
) -> None:
    _compare_codes(make_student(net_name, 2, 2), images, compute)


@pytest.mark.parametrize("name", ["bottleneck", "residual", "shapes"])
def test_every_code_at_four_bits(name: str, make_student: Any, images: Any, compute: Any) -> None:
    _compare_codes(make_student(name, 4, 4), images, compute)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_quantizer": "dorefa", "act_quantizer": "dorefa"},
        {"act_quantizer": "pact", "per_channel": False},
        {"first_bits": None, "last_bits": None, "sum_bits": 4},
    ],
)
def test_every_code_of_other_specs(options: Any, make_student: Any, images: Any, compute: Any) -> None:
    _compare_codes(make_student("residual", 3, 3, **options), images, compute)


def _compare_codes(student: Any, images: Any, compute: Callable[..., dict[str, Tensor]]) -> None:
    view, batch = integer_view(student), images(5, seed=9)
    edges, values = compute(view, batch), student_values(student, batch)
    quantize = [node for node in view.nodes if isinstance(node, ir.Quantize)]
    assert {node.name for node in quantize} == set(quantizers.act_quantizers(student))
    for node in quantize:
        codes = torch.round(values[node.name].double() / node.grid.scale)
        off = (codes - edges[node.output]).abs()
        assert float(off.max()) <= 1, node.name
        assert float((off > 0).double().mean()) <= WIDE_GRID_DIFFERING, node.name
    assert any(float(edges[node.output].std()) > 0 for node in quantize), "inputs must not give all zeros"
    torch.testing.assert_close(values["logits"].double(), edges[view.outputs[0]], rtol=0.02, atol=0.02)


def test_conv_and_batch_norm_by_hand(make_student: Any, images: Any) -> None:
    """Fake equals real: int64 arithmetic in plain loops gives the codes behind a convolution, atol=0."""
    student = make_student("residual", 2, 2)
    view = integer_view(student)
    conv = next(node for node in view.nodes if isinstance(node, ir.Conv) and node.name == "a.1.0")
    after = next(node for node in view.nodes if isinstance(node, ir.Quantize) and node.inputs == (conv.output,))
    for count in (1, 3):
        values = student_values(student, images(count, seed=count))
        source, grid = next((n.name, n.grid) for n in view.nodes if n.output == conv.inputs[0])  # type: ignore[attr-defined]
        codes = np.rint(values[source].numpy() / np.float32(grid.scale)).astype(np.int64)
        padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))
        sums = np.zeros((count, 8, *codes.shape[2:]), np.int64)
        for row in range(3):
            for column in range(3):
                window = padded[:, :, row : row + codes.shape[2], column : column + codes.shape[3]]
                sums += np.einsum("bchw,oc->bohw", window, conv.weights[:, :, row, column].astype(np.int64))
        assert conv.bias is not None
        sums += conv.bias.astype(np.int64)[None, :, None, None]
        units = conv.weight_scale.astype(np.float64) * grid.scale
        expected = np.clip(np.rint(sums * units[None, :, None, None] / after.grid.scale), 0, 3)
        got = np.rint(values[after.name].numpy() / np.float32(after.grid.scale))
        np.testing.assert_array_equal(got, expected)
        assert len(np.unique(got)) == 4


def test_grids_of_the_default_spec(make_student: Any) -> None:
    view = integer_view(make_student("plain", 2, 2))
    layers = {n.name: n for n in view.nodes if isinstance(n, (ir.Conv, ir.Linear))}
    bits = {name: (node.weight_bits, view.grids[node.inputs[0]].bits) for name, node in layers.items()}
    assert bits == {"stem.0": (8, 8), "conv": (2, 2), "head": (8, 8)}
    assert layers["conv"].weights.min() >= -2 and layers["conv"].weights.max() <= 1
    assert view.outputs == (view.nodes[-1].output,) and view.outputs[0] not in view.grids


def test_eight_bit_weights_keep_pair_sums_in_16_bits(make_student: Any) -> None:
    view = integer_view(make_student("plain", 8, 8))
    for node in view.nodes:
        if isinstance(node, (ir.Conv, ir.Linear)):
            assert node.weights.dtype == np.int8
            largest = int(np.abs(node.weights.astype(int)).max())
            assert 2 * 255 * largest <= 2**15 - 1
            assert largest > 32, "the narrower range is used"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's own remark
def test_same_padding_is_asymmetric_for_even_kernels(images: Any, compute: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, (4, 3), padding="same"), nn.ReLU(), nn.Conv2d(4, 5, 1))
    student = quantizers.prepare(net, QuantSpec(), example_inputs=images(1))
    quantizers.calibrate(student, [images(4)])
    view = integer_view(student.eval())
    node = next(n for n in view.nodes if isinstance(n, ir.Conv) and n.weights.shape[2:] == (4, 3))
    assert node.padding == (1, 1, 2, 1)
    expected = compute(view, images(2))[view.outputs[0]]
    torch.testing.assert_close(student(images(2)).detach().double(), expected, rtol=1e-3, atol=1e-3)


def test_functional_arguments_reach_the_view(make_student: Any) -> None:
    view = integer_view(make_student("functions"))
    leaky = next(n for n in view.nodes if isinstance(n, ir.Function) and n.op == "leaky_relu")
    assert leaky.attributes == {"negative_slope": 0.3}
    silu = next(n for n in integer_view(make_student("squeeze_excite")).nodes if getattr(n, "op", "") == "silu")
    assert silu.attributes == {}


def test_training_modes_are_left_alone(make_student: Any) -> None:
    student = make_student("plain").train()
    student.get_submodule("stem").eval()
    before = {name: module.training for name, module in student.named_modules()}
    integer_view(student)
    layer_report(student)
    assert {name: module.training for name, module in student.named_modules()} == before


def test_not_calibrated(make_net: Any, images: Any) -> None:
    student = quantizers.prepare(make_net("plain"), QuantSpec(), example_inputs=images(1))
    with pytest.raises(quantizers.NotCalibratedError, match=r"images_quant.*quantizers\.calibrate\(student, batches\)"):
        integer_view(student)


def test_diverged_scales_name_the_layer(make_student: Any) -> None:
    student = make_student("plain")
    student.get_submodule("conv").bn.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="conv: a weight scale is not a positive finite number"):
        integer_view(student)


def test_layer_report_sums(make_student: Any, make_net: Any) -> None:
    rows = {row["name"]: row for row in layer_report(make_student("plain", 2, 2))}
    assert list(rows) == ["stem.0", "conv", "head"]
    assert rows["stem.0"]["macs"] == 8 * 12 * 12 * 3 * 9
    assert rows["conv"]["macs"] == 8 * 12 * 12 * 8 * 9
    assert rows["head"]["macs"] == 5 * 8
    weights = sum(m.weight.numel() for m in make_net("plain").modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert sum(row["parameters"] for row in rows.values()) == weights + 8 + 8 + 5  # and an int32 bias each
    assert (rows["conv"]["range_low"], rows["conv"]["range_high"]) == (-2, 1)
    assert rows["conv"]["range_low"] <= rows["conv"]["code_min"] < rows["conv"]["code_max"] <= 1
    assert (rows["conv"]["kind"], rows["head"]["kind"]) == ("conv", "linear")
    assert (rows["conv"]["weight_bits"], rows["conv"]["act_bits"]) == (2, 2)


def test_a_call_that_somebody_wrote_into_a_student_is_refused_by_name(make_student: Any) -> None:
    student = make_student("plain")
    end = next(node for node in student.graph.nodes if node.op == "output")
    with student.graph.inserting_before(end):
        extra = student.graph.call_function(torch.relu, (end.args[0],))
    end.args = (extra,)
    student.recompile()
    with pytest.raises(RewriteError, match=r"relu_\d: a student only calls modules, but this is call_function"):
        integer_view(student)


def test_a_compiled_student_has_a_view_and_a_float_net_none(make_student: Any) -> None:
    student = make_student("residual", 2, 2)
    compiled = torch.compile(student, backend="eager")
    assert len(integer_view(compiled).nodes) == len(integer_view(student).nodes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes a student that quantizers\.prepare made, got Linear"):
        integer_view(nn.Linear(2, 2))  # type: ignore[arg-type]
