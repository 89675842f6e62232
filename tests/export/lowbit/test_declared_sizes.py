"""What a graph declares and a run does not keep: sizes behind pools that round up, free batches, NaN."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beside
import numpy as np
import numpy.typing as npt
import onnx
import pytest

nets: Any = beside.load(Path(__file__).with_name("conftest.py"))
Session = Callable[..., Any]
Claimed = Callable[[], list[list[str]]]
FLOAT = onnx.TensorProto.FLOAT
STEP, TOP = 0.5, 3
GRID = (0.1, 128)


def writer() -> Any:
    return nets.NetWriter(np.random.default_rng(0))


def two_bits(net: Any, image: str, shape: tuple[int, int, int]) -> str:
    codes = net.quantize(image, STEP, 0, np.uint8, shape)
    clipped: str = net.keep("Clip", codes, shape, net.constant(0, np.uint8), net.constant(TOP, np.uint8))
    return clipped


def convolved(net: Any, codes: str) -> str:
    """Return the codes of a 2-bit convolution of codes."""
    real, spread = net.convolution(codes, 32, step=STEP, bits=2, kernel=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
    made: str = net.quantize(real, spread / 50, 128, np.uint8, net.shapes[real])
    return made


def model_of(net: Any, inputs: dict[str, list[Any]], output: str, opset: int = 17) -> bytes:
    port = onnx.helper.make_tensor_value_info
    ends = [port(name, FLOAT, shape) for name, shape in inputs.items()]
    graph = onnx.helper.make_graph(net.nodes, "net", ends, [port(output, FLOAT, None)], net.constants)
    opsets = [onnx.helper.make_opsetid("", opset)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def assert_same(model: bytes, feeds: dict[str, npt.NDArray[np.float32]], make_session: Session) -> None:
    plain, ours = (make_session(model, provider=used).run(None, feeds)[0] for used in (False, True))
    assert plain.shape == ours.shape and np.array_equal(plain, ours, equal_nan=True)
    assert plain.size == 0 or np.unique(plain).size > 5


@pytest.mark.parametrize("opset", [13, 17, 21, 22])
@pytest.mark.parametrize(("side", "is_certain"), [(17, False), (18, True)])
def test_a_window_wholly_in_the_padding(
    opset: int,
    side: int,
    is_certain: bool,
    make_session: Session,
    claimed: Claimed,  # noqa: FBT001
) -> None:
    """Shape inference counts it up to opset 21; the runtime leaves it out. 18 pixels leave no such window."""
    net = writer()
    codes = two_bits(net, "images", (32, side, side))
    sides = -(-side // 3) + (side % 3 == 0)
    pooled = net.keep(
        "MaxPool", codes, (32, sides, sides), kernel_shape=[2, 2], strides=[3, 3], pads=[1] * 4, ceil_mode=1
    )
    model = model_of(net, {"images": ["n", 32, side, side]}, net.dequantize(convolved(net, pooled)), opset)
    images = np.random.default_rng(1).uniform(0, 2, (2, 32, side, side)).astype(np.float32)
    assert_same(model, {"images": images}, make_session)
    gc.collect()
    assert bool(claimed()) == is_certain


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(("side", "kernel", "stride"), [(17, 1, 3), (19, 2, 7), (17, 2, 20)])
def test_a_window_outside_a_tensor_without_padding(
    op: str, side: int, kernel: int, stride: int, make_session: Session
) -> None:
    """A stride longer than the kernel makes one, too."""
    net = writer()
    real = net.dequantize(two_bits(net, "images", (32, side, side)))
    pooled = net.node(op, [real], kernel_shape=[kernel] * 2, strides=[stride] * 2, ceil_mode=1)
    codes = two_bits(net, pooled, (32, 1, 1))
    model = model_of(net, {"images": ["n", 32, side, side]}, net.dequantize(convolved(net, codes)))
    images = np.random.default_rng(1).uniform(0, 2, (2, 32, side, side)).astype(np.float32)
    assert_same(model, {"images": images}, make_session)


@pytest.mark.parametrize("axis", [0, -4])
def test_a_sum_with_another_batch_by_concatenation(axis: int, make_session: Session) -> None:
    net = writer()
    image = two_bits(net, "images", (32, 9, 9))
    first = convolved(net, image)
    twice = net.node("Concat", [net.dequantize(first)] * 2, axis=axis)
    wide = net.dequantize(net.quantize(twice, *GRID, np.uint8, (32, 9, 9)))
    total = net.quantize(net.node("Add", [net.dequantize(convolved(net, image)), wide]), 0.2, 128, np.uint8, (32, 9, 9))
    model = model_of(net, {"images": ["n", 32, 9, 9]}, net.dequantize(total))
    assert_same(
        model, {"images": np.random.default_rng(1).uniform(0, 2, (1, 32, 9, 9)).astype(np.float32)}, make_session
    )


@pytest.mark.parametrize("batches", [(2, 2), (1, 3), (3, 1), (1, 0)])
def test_a_sum_of_two_free_batches(batches: tuple[int, int], make_session: Session) -> None:
    """One of them may be broadcast over the other."""
    net = writer()
    parts = [net.dequantize(convolved(net, two_bits(net, name, (32, 9, 9)))) for name in ("a", "b")]
    total = net.quantize(net.node("Add", parts), 0.2, 128, np.uint8, (32, 9, 9))
    model = model_of(net, {"a": ["n", 32, 9, 9], "b": ["m", 32, 9, 9]}, net.dequantize(total))
    rng = np.random.default_rng(1)
    feeds = {name: rng.uniform(0, 2, (n, 32, 9, 9)).astype(np.float32) for name, n in zip("ab", batches, strict=True)}
    assert_same(model, feeds, make_session)


def test_a_sum_of_one_batch_is_claimed_though_the_batch_is_free(make_session: Session, claimed: Claimed) -> None:
    net = writer()
    image = two_bits(net, "images", (32, 9, 9))
    parts = [net.dequantize(convolved(net, image)) for _ in range(2)]
    total = net.quantize(net.node("Add", parts), 0.2, 128, np.uint8, (32, 9, 9))
    model = model_of(net, {"images": [None, 32, 9, 9]}, net.dequantize(total))
    assert_same(
        model, {"images": np.random.default_rng(1).uniform(0, 2, (3, 32, 9, 9)).astype(np.float32)}, make_session
    )
    gc.collect()
    assert "add" in claimed()[0]


def by_saturation(net: Any, real: str) -> bytes:
    """A model of a 2-bit convolution whose codes are bounded by a Relu and the end of uint8."""
    codes = net.quantize(net.node("Relu", [real]), STEP, 252, np.uint8, (32, 9, 9))
    return model_of(net, {"images": ["n", 32, 9, 9]}, net.dequantize(convolved(net, codes)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(value: float, make_session: Session) -> None:
    """Relu leaves NaN: a code of it can be any, also below the zero point that saturation relies on."""
    images = np.random.default_rng(1).normal(size=(2, 32, 9, 9)).astype(np.float32)
    images[0, 3, 4, 4] = value
    assert_same(by_saturation(writer(), "images"), {"images": images}, make_session)


def not_numbers(net: Any, real: str, kind: str) -> str:
    """Return what becomes NaN in places though all constants are finite."""
    channels = (32, 1, 1)

    def constant(value: float, shape: tuple[int, ...] = channels) -> str:
        made: str = net.constant(np.where(np.arange(32) == 3, value, 1).reshape(shape), np.float32)
        return made

    if kind == "variance":
        plain = net.constant(np.ones(32), np.float32)
        return str(net.node("BatchNormalization", [real, plain, plain, plain, constant(-1.0, (32,))]))
    if kind == "overflow":
        huge = net.node("Mul", [net.node("Mul", [real, constant(3e38)]), constant(3e38)])
        return str(net.node("Mul", [huge, constant(0.0)]))
    if kind == "difference":
        huge = net.node("Mul", [net.node("Mul", [real, constant(3e38)]), constant(3e38)])
        return str(net.node("Sub", [huge, huge]))
    if kind == "mean":
        huge = net.node("Mul", [net.node("Mul", [real, constant(1e30)]), constant(1e7)])
        mean = net.node("AveragePool", [huge], kernel_shape=[9, 9], pads=[4] * 4)
        return str(net.node("Sub", [mean, mean]))
    if kind == "bound":
        return str(net.node("Clip", [real, net.constant(np.nan, np.float32)]))
    return str(net.node("LeakyRelu", [real], alpha=float("nan")))


@pytest.mark.parametrize("kind", ["variance", "overflow", "difference", "mean", "bound", "slope"])
def test_numbers_that_become_none(kind: str, make_session: Session) -> None:
    net = writer()
    first = net.dequantize(convolved(net, two_bits(net, "images", (32, 9, 9))))
    images = np.random.default_rng(1).uniform(0, 2, (2, 32, 9, 9)).astype(np.float32)
    model = by_saturation(net, not_numbers(net, first, kind))
    plain, ours = (make_session(model, provider=used).run(None, {"images": images})[0] for used in (False, True))
    assert np.array_equal(plain, ours, equal_nan=True)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_the_same_with_look_up_kernels(isa: str) -> None:
    """Tiles of AMX multiply codes of any size; look-ups rely on the bounds."""
    root = Path(__file__).resolve().parents[3]
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__, "-k", "not look_up"]
    done = subprocess.run(words, cwd=root, env={**os.environ, "LOWBIT_ISA": isa}, capture_output=True, text=True,
                          timeout=600, check=False)  # fmt: skip
    if "is not one that this processor" in done.stdout:
        pytest.skip("this processor lacks that instruction set")
    assert done.returncode == 0, done.stdout[-3000:]


def test_saturation_is_still_relied_upon_behind_codes(make_session: Session, claimed: Claimed) -> None:
    net = writer()
    first = convolved(net, two_bits(net, "images", (32, 9, 9)))
    real = net.node("Relu", [net.dequantize(first)])
    codes = net.quantize(real, STEP, 252, np.uint8, (32, 9, 9))
    model = model_of(net, {"images": ["n", 32, 9, 9]}, net.dequantize(convolved(net, codes)))
    images = np.random.default_rng(1).uniform(0, 2, (2, 32, 9, 9)).astype(np.float32)
    images[0, 3, 4, 4] = np.nan
    assert_same(model, {"images": images}, make_session)
    gc.collect()
    assert claimed()
