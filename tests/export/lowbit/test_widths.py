"""Convolutions of other widths than two bits, against integer references, for every instruction set of this machine."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import beside
import numpy as np
import numpy.typing as npt
import pytest

kernels: Any = beside.load(Path(__file__).with_name("test_kernels.py"))

# Bits of weights and activations: by look-up everywhere, everywhere but on AVX2, and by sums of 16 bits on AVX2 alone.
LUT_WIDTHS = {
    "w3a3": (3, 3),
    "w2a4": (2, 4),
    "w2a3": (2, 3),
    "w3a2": (3, 2),
    "ternary a4": (2, 4),
    "w1a2": (1, 2),
    "w2a1": (2, 1),
}
DOT_WIDTHS = {"w4a4": (4, 4), "w8a4": (8, 4), "w3a3": (3, 3), "w4a8": (4, 8)}


def weights_of(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> npt.NDArray[np.int8]:
    kind = rng.integers(5)
    if kind == 0:
        return np.full(shape, low, np.int8)  # the most that a lane can be given
    if kind == 1:
        return np.full(shape, high, np.int8)
    if kind == 2:
        return rng.integers(low, high + 1, shape).astype(np.int8)
    weights = np.clip(np.rint(rng.normal(0, max(high, 1) / 2, shape)), low, high).astype(np.int8)
    weights[rng.random(shape[0]) < 0.2] = 0  # dead channels
    return weights


def highest_activation(bits: tuple[int, int]) -> int:
    """The highest code of the tables that may hold a layer: 15 beside weights of two bits, where 3 is not enough."""
    return 15 if bits[0] <= 2 < bits[1] else (1 << max(bits)) - 1


def layer_of(rng: np.random.Generator, name: str, bits: tuple[int, int], *, is_lut: bool) -> Any:
    """A random layer whose weights and codes are of a width, some on signed grids of activations."""
    layer = kernels.random_layer(rng, is_lut=is_lut)
    low, high = (-1, 1) if "ternary" in name or bits[0] == 1 else (-(1 << bits[0] - 1), (1 << bits[0] - 1) - 1)
    if bits[0] == 8:
        low, high = -128, 127
    span = (1 << bits[1]) - 1
    base = 0 if span == 255 else int(rng.choice([0, 0, 255 - span, 17]))
    layer.base = base
    layer.zero_in = base + int(rng.choice([0, (span + 1) // 2, 1]))
    codes = rng.integers(0, span + 1, layer.codes.shape) if rng.random() < 0.8 else np.full(layer.codes.shape, span)
    layer.codes = (codes + base).astype(np.uint8)
    weights = weights_of(rng, layer.weights.shape, low, high)
    most = 65534 // highest_activation(bits) if is_lut else 2**20
    while np.abs(weights.astype(np.int64)).reshape(weights.shape[0], -1).sum(1).max() > most:
        weights[:, rng.integers(weights.shape[1])] = 0  # totals of look-ups are 16 bits
    layer.weights = weights
    reach = np.sqrt(np.prod(weights.shape[1:])) * max(high, 1) * span / 4
    layer.scale = (rng.uniform(0.2, 4, weights.shape[0]) * rng.choice([4, 60]) / reach).astype(np.float32)
    layer.bias = rng.normal(0, reach, weights.shape[0]).astype(np.int32)
    return layer


def check(library: ctypes.CDLL, isa: str, name: str, bits: tuple[int, int], count: int, *, is_lut: bool) -> None:
    rng = np.random.default_rng([bits[0], bits[1], is_lut])
    for number in range(count):
        layer = layer_of(rng, name, bits, is_lut=is_lut)
        found = kernels.computed(library, isa, layer, is_parallel=number % 8 == 0)
        if isinstance(found, int):
            assert found == kernels.NO_KERNELS, f"layer {number} was refused"
            pytest.skip(f"this processor lacks {isa}")
        wrong = np.argwhere(found != kernels.reference(layer))
        assert not len(wrong), (number, wrong[:3], layer.weights.shape, layer.codes.shape, layer.strides, layer.pads)


@pytest.mark.parametrize("isa", kernels.ISAS)
@pytest.mark.parametrize("name", LUT_WIDTHS)
def test_look_ups_of_other_widths(library: ctypes.CDLL, isa: str, name: str) -> None:
    bits = LUT_WIDTHS[name]
    if isa in ("avx2", "neon") and bits[0] == 3:
        pytest.skip("no tables of 16 entries hold products of three bits")
    check(library, isa, name, bits, 3 if isa in kernels.SLOW_SETS else 15, is_lut=True)


@pytest.mark.parametrize("isa", kernels.ISAS)
@pytest.mark.parametrize("name", DOT_WIDTHS)
def test_dot_products_of_other_widths(library: ctypes.CDLL, isa: str, name: str) -> None:
    if isa == "neon" and DOT_WIDTHS[name][0] == 8:
        pytest.skip("NEON takes weights of -64..63")
    check(library, isa, name, DOT_WIDTHS[name], 3 if isa in kernels.SLOW_SETS else 15, is_lut=False)


@pytest.mark.slow
@pytest.mark.parametrize("isa", kernels.VECTORS)
@pytest.mark.parametrize("name", [*LUT_WIDTHS, *DOT_WIDTHS])
def test_many_layers_of_other_widths(library: ctypes.CDLL, isa: str, name: str) -> None:
    is_lut = name in LUT_WIDTHS and not (isa in ("avx2", "neon") and LUT_WIDTHS[name][0] == 3)
    if isa == "neon" and not is_lut and (LUT_WIDTHS | DOT_WIDTHS)[name][0] == 8:
        pytest.skip("NEON takes weights of -64..63")
    check(library, isa, name, (LUT_WIDTHS | DOT_WIDTHS)[name], 500, is_lut=is_lut)


@pytest.mark.parametrize("isa", kernels.ISAS)
@pytest.mark.parametrize(("weight", "span"), [(-8, 15), (7, 15), (-128, 15), (-64, 255), (63, 255)])
def test_sums_of_16_bits_never_overflow(library: ctypes.CDLL, isa: str, weight: int, span: int) -> None:
    """All weights and activations at their most: chunks end where the next product would not fit."""
    if isa == "neon" and weight < -64:
        pytest.skip("NEON takes weights of -64..63")
    for inputs, kernel in ((130, 3), (33, 1), (4, 7)):
        weights = np.full((17, inputs, kernel, kernel), weight, np.int8)
        codes = np.full((inputs, 9, 9), span, np.uint8)
        most = abs(weight) * span * inputs * kernel**2
        bias, scale = np.zeros(17, np.int32), np.full(17, 127 / most, np.float32)
        layer = kernels.Layer(codes, weights, bias, scale, (1, 1), (1, 1, 1, 1), 0, 128, 0, 255, is_lut=False)
        found = kernels.computed(library, isa, layer)
        if isinstance(found, int):
            assert found == kernels.NO_KERNELS
            pytest.skip(f"this processor lacks {isa}")
        np.testing.assert_array_equal(found, kernels.reference(layer))
