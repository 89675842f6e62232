"""Single operations of the provider's library against integer references, for every instruction set of this machine."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

ISAS = ("amx", "amx_emulated", "avx512", "avx2", "neon", "portable")
VECTORS = ISAS[:-1]
TILES = ("amx", "amx_emulated")  # no look-ups: all layers are dot products there
SLOW_SETS = ("amx_emulated", "portable")  # plain C++
DONE, NO_KERNELS, REFUSED = 0, 1, 2
Codes = npt.NDArray[np.uint8]


@dataclass
class Layer:
    """A convolution on codes and how its sums become codes."""

    codes: Codes  # [in, height, width]
    weights: npt.NDArray[np.int8]  # [out, in, kh, kw]
    bias: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    zero_in: int
    zero_out: int
    low: int
    high: int
    is_lut: bool
    base: int = 0  # the code that is looked up as activation 0
    is_depthwise: bool = False


def pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def random_weights(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    kind = rng.integers(6)
    if kind == 0:
        return np.full(shape, -2, np.int8)  # the most that a lane can be given
    if kind == 1:
        return np.full(shape, rng.integers(-1, 2), np.int8)
    if kind == 2:
        return rng.integers(-1, 2, shape).astype(np.int8)  # ternary
    if kind == 3:
        return rng.integers(-2, 2, shape).astype(np.int8)
    weights = np.clip(np.rint(rng.normal(size=shape)), -2, 1).astype(np.int8)
    weights[rng.random(shape[0]) < 0.2] = 0  # dead channels
    return weights


def random_layer(rng: np.random.Generator, *, is_lut: bool) -> Layer:
    inputs = int(rng.integers(16, 140)) if is_lut else int(rng.integers(1, 70))
    outputs = int(rng.choice([1, 7, 16, 33, 64, 65, 100, 128, 130, 192]))
    kernel = tuple(int(k) for k in rng.choice([1, 1, 2, 3, 3, 3, 5, 7], 2))
    if rng.random() < 0.6:
        kernel = (kernel[0], kernel[0])
    strides = tuple(int(s) for s in rng.choice([1, 1, 1, 2, 3], 2))
    pads = tuple(int(p) for p in rng.integers(0, 4, 4))
    height, width = (max(int(rng.integers(1, 17)), k - pads[i] - pads[i + 2]) for i, k in enumerate(kernel))
    shape = (outputs, inputs, *kernel)
    base = int(rng.choice([0, 0, 252, 17])) if is_lut else 0
    zero_in = base + int(rng.choice([0, 0, 2, 1])) if is_lut else int(rng.integers(256))  # 2: signed activations
    codes = (
        rng.integers(0, 4, (inputs, height, width)) + base if is_lut else rng.integers(0, 256, (inputs, height, width))
    )
    weights = random_weights(rng, shape) if is_lut else rng.integers(-64, 65, shape).astype(np.int8)
    spread = float(np.sqrt(np.prod(shape[1:])) * (1.5 if is_lut else 4000))
    scale = (rng.uniform(0.2, 4, outputs) * rng.choice([1, 60]) / spread).astype(np.float32)
    bias = rng.normal(0, spread, outputs).astype(np.int32)
    if rng.random() < 0.2:  # thresholds that nothing reaches, or everything
        bias = (rng.choice([-1, 1], outputs) * rng.integers(0, 10**6, outputs)).astype(np.int32)
    low, high = (0, 3) if rng.random() < 0.5 else (0, 255)
    zero_out = int(rng.choice([0, 128, 3])) if high == 255 else 0
    return Layer(
        codes.astype(np.uint8), weights, bias, scale, strides, pads, zero_in, zero_out, low, high, is_lut, base
    )


def reference(layer: Layer) -> Codes:
    top, left, bottom, right = layer.pads
    kernel_h, kernel_w = layer.weights.shape[2:]
    x = np.pad(layer.codes.astype(np.int64) - layer.zero_in, ((0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel_h, kernel_w), (1, 2))
    windows = windows[:, :: layer.strides[0], :: layer.strides[1]]
    terms = "chwij,cij->chw" if layer.is_depthwise else "chwij,ocij->ohw"
    weights = layer.weights[:, 0] if layer.is_depthwise else layer.weights
    sums = np.einsum(terms, windows, weights.astype(np.int64), optimize=True)
    real = (sums + layer.bias[:, None, None]).astype(np.int32).astype(np.float32) * layer.scale[:, None, None]
    real = np.clip(real, np.float32(-layer.zero_out), np.float32(255 - layer.zero_out))
    return np.clip(np.rint(real).astype(np.int64) + layer.zero_out, layer.low, layer.high).astype(np.uint8)


def computed(library: ctypes.CDLL, isa: str, layer: Layer, *, is_parallel: bool = False) -> Codes | int:
    expected = reference(layer)
    numbers = np.array(
        [
            *(layer.codes.shape[0], layer.weights.shape[0], *layer.codes.shape[1:], *layer.weights.shape[2:]),
            *(*layer.strides, *layer.pads, layer.zero_in, layer.zero_out, layer.low, layer.high),
            *(layer.is_lut and isa not in TILES, is_parallel, layer.base, layer.is_depthwise),
        ],
        np.int32,
    )
    out = np.full(expected.shape, 77, np.uint8)
    arrays = [np.ascontiguousarray(one) for one in (layer.weights, layer.bias, layer.scale, layer.codes)]
    answer = library.lowbit_test_conv(isa.encode(), pointer(numbers), *map(pointer, arrays), pointer(out))
    return out if answer == DONE else answer


def check_layers(library: ctypes.CDLL, isa: str, count: int, seed: int, *, is_lut: bool) -> None:
    rng = np.random.default_rng(seed)
    for number in range(count):
        layer = random_layer(rng, is_lut=is_lut)
        if isa == "neon":
            layer.weights = np.minimum(layer.weights, 63)  # 64 is not claimed there: `DotFormat`
        found = computed(library, isa, layer, is_parallel=number % 8 == 0)
        if isinstance(found, int):
            assert found == NO_KERNELS, f"layer {number} was refused"
            pytest.skip(f"this processor lacks {isa}")
        wrong = np.argwhere(found != reference(layer))
        assert not len(wrong), (number, wrong[:3], layer.weights.shape, layer.codes.shape, layer.strides, layer.pads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("is_lut", [True, False])
def test_convolutions_equal_integer_references(library: ctypes.CDLL, isa: str, is_lut: bool) -> None:
    """Any kernel, stride, padding and channel count, extreme weights and thresholds."""
    check_layers(library, isa, 6 if isa in SLOW_SETS else 50, 11, is_lut=is_lut)


@pytest.mark.parametrize("isa", VECTORS)
def test_layers_of_few_channels(library: ctypes.CDLL, isa: str) -> None:
    """On maps large enough for positions as lanes, where an instruction set has such kernels."""
    rng = np.random.default_rng(14)
    for number in range(3 if isa in SLOW_SETS else 30):
        layer = random_layer(rng, is_lut=True)
        outputs, kernel = int(rng.integers(1, 17)), layer.weights.shape[2:]
        inputs, height, width = int(rng.integers(16, 65)), *(int(side) for side in rng.integers(14, 40, 2))
        layer.weights = random_weights(rng, (outputs, inputs, *kernel))
        layer.codes = (rng.integers(0, 4, (inputs, height, width)) + layer.base).astype(np.uint8)
        layer.bias, layer.scale = (np.resize(one, outputs) for one in (layer.bias, layer.scale))
        layer.strides = (1, 1)
        found = computed(library, isa, layer, is_parallel=number % 4 == 0)
        if isinstance(found, int):
            assert found == NO_KERNELS
            pytest.skip(f"this processor lacks {isa}")
        np.testing.assert_array_equal(found, reference(layer), err_msg=str((number, layer.weights.shape)))


@pytest.mark.parametrize("isa", ISAS)
def test_depthwise_convolutions_equal_integer_references(library: ctypes.CDLL, isa: str) -> None:
    rng = np.random.default_rng(13)
    for number in range(6 if isa in SLOW_SETS else 60):
        layer = random_layer(rng, is_lut=False)
        kernel = layer.weights.shape[2:]
        limit = max(1, 32_767 // 255 // int(np.prod(kernel)))  # 255 sum |w| fits 16 bits
        channels = layer.codes.shape[0]
        layer.weights = rng.integers(-limit, limit + 1, (channels, 1, *kernel)).astype(np.int8)
        layer.bias, layer.scale = (np.resize(one, channels) for one in (layer.bias, layer.scale * 30))
        layer.is_depthwise = True
        found = computed(library, isa, layer)
        if isinstance(found, int):
            assert found == NO_KERNELS
            pytest.skip(f"this processor lacks {isa}")
        np.testing.assert_array_equal(found, reference(layer), err_msg=str((number, layer.weights.shape)))


@pytest.mark.slow
@pytest.mark.parametrize("isa", VECTORS)
@pytest.mark.parametrize("is_lut", [True, False])
def test_many_convolutions_equal_integer_references(library: ctypes.CDLL, isa: str, is_lut: bool) -> None:
    check_layers(library, isa, 60 if isa in SLOW_SETS else 600, 12, is_lut=is_lut)


@pytest.mark.parametrize("isa", ISAS)
def test_largest_layer_of_all_lowest_weights(library: ctypes.CDLL, isa: str) -> None:
    """10,922 weights of -2 against activations of 3 fill 16 bits to their end; one input channel more is refused."""
    rng = np.random.default_rng(3)
    for inputs, is_fine in ((10_922, True), (10_923, False)):
        layer = random_layer(rng, is_lut=True)
        layer.weights = np.full((64, inputs, 1, 1), -2, np.int8)
        layer.codes = np.full((inputs, 1, 2), 3, np.uint8)
        layer.codes[:, 0, 1] = 0
        layer.bias, layer.scale = np.full(64, 65_532, np.int32), np.full(64, 0.001, np.float32)
        layer.strides, layer.pads, layer.zero_in, layer.base, layer.zero_out = (1, 1), (0, 0, 0, 0), 0, 0, 0
        layer.low, layer.high = 0, 255
        found = computed(library, isa, layer)
        if found is NO_KERNELS:
            pytest.skip(f"this processor lacks {isa}")
        if is_fine or isa in TILES:
            np.testing.assert_array_equal(found, reference(layer))
        else:
            assert found == REFUSED


class AddJob(ctypes.Structure):
    """The library's own structure."""

    _fields_ = [
        ("is_fused", ctypes.c_bool),
        *((f"shift_{end}", ctypes.c_int) for end in "abc"),
        *((name, ctypes.c_float) for name in ("ratio_a", "ratio_b", "fixed", "scale_a", "scale_b", "scale_c")),
        *((f"zero_{end}", ctypes.c_int) for end in "abc"),
        ("low", ctypes.c_int),
        ("high", ctypes.c_int),
        *((name, ctypes.c_int32) for name in ("multiplier_a", "multiplier_b", "right")),
    ]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("is_fused", [True, False])
def test_sums_of_every_pair_of_codes(library: ctypes.CDLL, isa: str, is_fused: bool) -> None:
    """All 65,536 pairs, in both of the runtime's arithmetics; products and sums of float32 are exact in float64."""
    a, b = (np.ascontiguousarray(x.astype(np.uint8)) for x in np.meshgrid(np.arange(256), np.arange(256)))
    rng = np.random.default_rng(5)
    for _ in range(6):
        ratios = rng.uniform(0.01, 2, 2).astype(np.float32)
        job = AddJob(
            is_fused,
            *(0, 128, 128) if is_fused else (0, 0, 0),
            *ratios,
            np.float32(-7.25),
            *(ratios * 3),
            np.float32(0.7),
        )
        job.zero_a, job.zero_b, job.zero_c, job.low, job.high = (
            5,
            128,
            9,
            *(int(v) for v in sorted(rng.integers(0, 256, 2))),
        )
        out = np.zeros_like(a)
        answer = library.lowbit_test_add(
            isa.encode(), ctypes.byref(job), 64, 32, 32, pointer(a), pointer(b), pointer(out)
        )
        if answer == NO_KERNELS:
            pytest.skip(f"this processor lacks {isa}")
        f = np.float32
        if is_fused:
            part = ((b.astype(np.float64) - 128) * f(job.ratio_b) + f(job.fixed)).astype(f)
            real, zero = (a.astype(np.float64) * f(job.ratio_a) + part).astype(f), job.shift_c
        else:
            x, y = (a.astype(f) - 5) * f(job.scale_a), (b.astype(f) - 128) * f(job.scale_b)
            real, zero = (x + y) / f(job.scale_c), job.zero_c
        expected = np.clip(np.clip(np.rint(real).astype(np.int64) + zero, 0, 255), job.low, job.high)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("isa", ["neon", "portable"])
def test_sums_in_integers_round_halves_away_from_zero(library: ctypes.CDLL, isa: str) -> None:
    """As onnxruntime adds on Arm: all 65,536 pairs, ratios that make ties and ratios at their limits."""
    a, b = (np.ascontiguousarray(x.astype(np.uint8)) for x in np.meshgrid(np.arange(256), np.arange(256)))
    rng = np.random.default_rng(5)
    jobs = [(1 << 21, 1 << 21, 22), (1 << 21, (1 << 22) - 1, 13), (1, (1 << 22) - 1, 31)]
    jobs += [(*(int(m) for m in rng.integers(1, 1 << 22, 2)), int(rng.integers(13, 32))) for _ in range(6)]
    for multiplier_a, multiplier_b, right in jobs:
        job = AddJob(multiplier_a=multiplier_a, multiplier_b=multiplier_b, right=right, high=255)
        job.zero_a, job.zero_b, job.zero_c, job.low = (int(v) for v in rng.integers(0, 256, 4))
        out = np.zeros_like(a)
        pointers = map(pointer, (a, b, out))
        if library.lowbit_test_add(isa.encode(), ctypes.byref(job), 64, 32, 32, *pointers) == NO_KERNELS:
            pytest.skip(f"this processor lacks {isa}")
        total = multiplier_a * (a.astype(np.int64) - job.zero_a) + multiplier_b * (b.astype(np.int64) - job.zero_b)
        steps = np.sign(total) * ((np.abs(total) + (1 << right - 1)) >> right)
        np.testing.assert_array_equal(out, np.clip(np.clip(steps + job.zero_c, 0, 255), job.low, 255))


@pytest.mark.parametrize("isa", ISAS)
def test_maps_of_codes(library: ctypes.CDLL, isa: str) -> None:
    rng = np.random.default_rng(6)
    tables = [rng.integers(0, 256, 256), np.clip(np.arange(256) // 60, 0, 3), np.full(256, 7), np.arange(256)[::-1]]
    for table in (one.astype(np.uint8) for one in tables):
        for shape in ((64, 4, 4), (130, 3, 5), (20, 1, 1)):
            codes, out = rng.integers(0, 256, shape).astype(np.uint8), np.zeros(shape, np.uint8)
            answer = library.lowbit_test_map(isa.encode(), pointer(table), *shape, pointer(codes), pointer(out))
            if answer == NO_KERNELS:
                pytest.skip(f"this processor lacks {isa}")
            np.testing.assert_array_equal(out, table[codes])


@pytest.mark.parametrize("isa", ISAS)
def test_max_pooling(library: ctypes.CDLL, isa: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        channels, height, width = int(rng.choice([16, 64, 100, 192])), *(int(v) for v in rng.integers(3, 14, 2))
        kernel, strides = rng.integers(1, 4, 2), rng.integers(1, 4, 2)
        pads = np.concatenate([rng.integers(0, kernel), rng.integers(0, kernel)])
        codes = rng.integers(0, 256, (channels, height, width)).astype(np.uint8)
        x = np.pad(codes.astype(int), ((0, 0), (pads[0], pads[2]), (pads[1], pads[3])), constant_values=-1)
        windows = np.lib.stride_tricks.sliding_window_view(x, tuple(kernel), (1, 2))[:, :: strides[0], :: strides[1]]
        expected = windows.max((3, 4)).astype(np.uint8)
        out = np.zeros(expected.shape, np.uint8)
        numbers = np.array([channels, height, width, *kernel, *strides, *pads], np.int32)
        answer = library.lowbit_test_max_pool(isa.encode(), pointer(numbers), pointer(codes), pointer(out))
        if answer == NO_KERNELS:
            pytest.skip(f"this processor lacks {isa}")
        np.testing.assert_array_equal(out, expected)
