"""Linear layers in blocks: the kernel's own quantization changes nothing, and only exact layers get them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from export import ExportError, check_parity, export_onnx, write_view
from export.conversion.repack import fit_storage
from export.runtime import open_session
from export.storage.blocked import HEAVY_WEIGHTS, choose_blocks, is_exact, pack_blocks, runtime_is_fast, unpack_blocks
from export.storage.packing import Blocks
from quantizers import QuantSpec, calibrate, prepare
from quantizers.integer import Grid, IntegerView, Linear, Quantize

GRID = Grid(0.5, 0, 15)


def linear(weights: np.ndarray, bits: int = 4, bias: np.ndarray | None = None, scale: float = 0.25) -> Linear:
    return Linear("fc", ("a",), "y", weights.astype(np.int8), bits, np.full(len(weights), scale, np.float32), bias)


def view_of(layer: Linear, grid: Grid = GRID) -> IntegerView:
    return IntegerView((Quantize("q", ("x",), "a", grid), layer), {"a": grid}, ("x",), ("y",))


@settings(max_examples=60)
@given(
    outputs=st.integers(1, 5), features=st.integers(1, 300), seed=st.integers(0, 99),
    blocks=st.sampled_from([Blocks(2, 128), Blocks(4, 256), Blocks(4, 32), Blocks(2, 16)]),
)  # fmt: skip
def test_packing_is_undone(outputs: int, features: int, seed: int, blocks: Blocks):
    half = 2 ** (blocks.bits - 1)
    codes = np.random.default_rng(seed).integers(-half, half, (outputs, features)).astype(np.int8)
    packed = pack_blocks(codes, blocks)
    assert packed.shape == (outputs, blocks.count(features), blocks.size * blocks.bits // 8)
    assert np.array_equal(unpack_blocks(packed, features, blocks), codes)
    assert blocks.bytes_of(codes.shape) == packed.nbytes + 4 * outputs * blocks.count(features)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", [GRID, Grid(0.5, -8, 7), Grid(0.5, 0, 3), Grid(0.5, 0, 127), Grid(0.5, -2, 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_sums_are_exact(bits: int, grid: Grid, has_bias: bool, tmp_path):
    rng = np.random.default_rng(bits)
    half = 2 ** (bits - 1)
    weights = rng.integers(-half, half, (33, 700))
    bias = rng.integers(-(10**6), 10**6, 33) if has_bias else None
    view = view_of(linear(weights, bits, bias), grid)
    exported = write_view(view, [(1, 700)], tmp_path / "n.onnx", linear="matmul_nbits", strict=True)
    assert exported.layers[0].kernel == "MatMulNBits" and exported.layers[0].storage.startswith("blocks of ")
    codes = rng.integers(grid.low, grid.high + 1, (5, 700))
    codes[0] = grid.high  # a whole block at the end of the grid, and one of zeros
    codes[1] = 0
    wanted = (codes @ weights.T + (0 if bias is None else bias)) * 0.5 * 0.25
    for optimize in (False, True):
        session = open_session(tmp_path / "n.onnx", optimize=optimize)
        (found,) = session.run(None, {"images": (codes * 0.5).astype(np.float32)})
        assert np.array_equal(found, wanted.astype(np.float32)), optimize


def test_without_sentinels_the_kernel_would_not_be_exact(tmp_path, monkeypatch):
    """The trap that the sentinel is there for: codes 0 ... 15 quantized again to multiples of 15 / 127."""
    from export.storage import blocked

    rng = np.random.default_rng(0)
    layer = linear(rng.integers(-8, 8, (16, 254)))
    codes = rng.integers(0, 16, (1, 254))
    exact = (codes @ layer.weights.T.astype(int) * 0.5 * 0.25).astype(np.float32)
    for sentinel, is_right in ((127, True), (0, False)):
        monkeypatch.setattr(blocked, "SENTINEL", sentinel)
        monkeypatch.setattr(blocked, "is_exact", lambda *_: True)
        write_view(view_of(layer), [(1, 254)], tmp_path / "n.onnx", linear="matmul_nbits")
        images = (codes * 0.5).astype(np.float32)
        (found,) = open_session(tmp_path / "n.onnx", optimize=True).run(None, {"images": images})
        assert np.array_equal(found, exact) == is_right


@pytest.mark.parametrize(
    ("layer", "grid"),
    [
        (linear(np.ones((2, 8)), bits=5), GRID),  # no kernel for the width
        (linear(np.ones((2, 8))), Grid(0.5, 0, 255)),  # codes that int8 does not hold
        (linear(np.ones((2, 8))), Grid(0.5, -128, 127)),
        (linear(np.full((2, 200_000), -8)), GRID),  # 24 million: past what float32 holds
        (linear(np.ones((2, 8)), bias=np.array([0, 2**24])), GRID),
        (linear(np.ones((2, 8))), None),
    ],
)
def test_what_would_not_be_exact_stays_a_gemm(layer: Linear, grid: Grid | None):
    assert not is_exact(layer, grid)
    view = view_of(layer, grid or GRID)
    if grid is not None:
        assert choose_blocks(view, "matmul_nbits") == {}


def test_choice():
    light, heavy = view_of(linear(np.ones((8, 64)))), view_of(linear(np.ones((HEAVY_WEIGHTS // 1024, 1024))))
    assert choose_blocks(light, "auto") == {} and choose_blocks(heavy, "gemm") == {}
    assert choose_blocks(light, "matmul_nbits") == {"fc": Blocks(4, 256)}
    assert choose_blocks(view_of(linear(np.ones((8, 64)), bits=2)), "matmul_nbits") == {"fc": Blocks(2, 128)}
    assert bool(choose_blocks(heavy, "auto")) == runtime_is_fast(Blocks(4, 256))
    with pytest.raises(ExportError, match=r"linear must be one of auto, gemm, matmul_nbits, got 'fast'"):
        choose_blocks(light, "fast")


def test_int8_storage_is_portable_unless_told_otherwise(tmp_path):
    view = view_of(linear(np.ones((HEAVY_WEIGHTS // 1024, 1024))))
    exported = write_view(view, [(1, 1024)], tmp_path / "n.onnx", pack="int8")
    assert exported.layers[0].kernel == "QGemm" and not exported.packed
    forced = write_view(view, [(1, 1024)], tmp_path / "n.onnx", pack="int8", linear="matmul_nbits")
    assert forced.layers[0].kernel == "MatMulNBits" and forced.packed
    assert {entry.domain for entry in onnx.load(tmp_path / "n.onnx").opset_import} == {"", "com.microsoft"}
    with pytest.raises(ExportError, match="it needs flavor 'ort', got 'qcdq'"):
        write_view(view, [(1, 1024)], tmp_path / "q.onnx", flavor="qcdq", linear="matmul_nbits")
    assert not (tmp_path / "q.onnx").exists()


def test_a_runtime_that_unpacks_to_float_is_found_out():
    assert not runtime_is_fast(replace(Blocks(2, 128), size=512)), "no integer kernel has such blocks"


class Heavy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.classifier = nn.Sequential(
            nn.Linear(8 * 12 * 12, 64), nn.ReLU(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 5)
        )

    def forward(self, x):
        return self.classifier(torch.relu(self.conv(x)).flatten(1))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_student_and_its_file_agree_and_the_cost_is_the_same(bits: int, tmp_path):
    from export import cost_of_file

    torch.manual_seed(bits)
    images = torch.randn(16, 3, 12, 12)
    student = prepare(Heavy(), QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=images)
    calibrate(student, [images])
    exported = export_onnx(student, images, tmp_path / "n.onnx", linear="matmul_nbits", strict=True)
    assert [layer.kernel for layer in exported.layers] == ["QLinearConv", "MatMulNBits", "MatMulNBits", "QGemm"]
    report = check_parity(student, tmp_path / "n.onnx", [images])
    assert report.off.top1_agreement == report.on.top1_agreement == 1.0
    assert report.layers and not any(layer.differing or layer.differing_on for layer in report.layers)
    plain = export_onnx(student, images, tmp_path / "g.onnx", linear="gemm")
    assert {layer.kernel for layer in plain.layers} == {"QLinearConv", "QGemm"}
    assert cost_of_file(tmp_path / "n.onnx").layers == cost_of_file(tmp_path / "g.onnx").layers


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("grid", [GRID, Grid(0.5, -2, 5)])
@pytest.mark.parametrize("features", [700, 508, 3])
def test_a_file_in_blocks_is_repacked_for_a_runtime_without_them(bits: int, grid: Grid, features: int, tmp_path):
    rng = np.random.default_rng(features)
    half = 2 ** (bits - 1)
    weights, bias = rng.integers(-half, half, (17, features)), rng.integers(-500, 500, 17)
    view = view_of(replace(linear(weights, bits, bias), weight_scale=rng.uniform(0.1, 1, 17).astype(np.float32)), grid)
    path = tmp_path / "n.onnx"
    write_view(view, [(1, features)], path, linear="matmul_nbits")
    write_view(view, [(1, features)], tmp_path / "g.onnx", linear="gemm", pack="int8")
    images = rng.uniform(-2, 8, (4, features)).astype(np.float32)

    def run(model: object, *, optimize: bool) -> np.ndarray:
        return np.asarray(open_session(model, optimize=optimize).run(None, {"images": images})[0])

    blocks = f"blocks of {128 if bits == 2 else 256} x {bits} bits"
    for loads, opset, operator in ((("int8",), 17, "Gemm"), (("int8", "int4"), 21, "Gemm"), (("int8", blocks), 17, "")):
        fitted = fit_storage(path, loads)
        if not operator:
            assert fitted.content == path
            continue
        model = onnx.load_from_string(fitted.content)
        assert [entry.domain for entry in model.opset_import] == [""] and model.opset_import[0].version == opset
        assert [node.op_type for node in model.graph.node].count("Gemm") == 1
        assert {entry.name for entry in model.graph.initializer} <= {name for n in model.graph.node for name in n.input}
        for optimize in (False, True):
            found, plain = run(fitted.content, optimize=optimize), run(tmp_path / "g.onnx", optimize=optimize)
            assert np.array_equal(found, plain)
            # a Gemm with optimizations off multiplies first and adds in float
            np.testing.assert_allclose(run(path, optimize=optimize), found, rtol=1e-5, atol=1e-4)
