"""Average pooling inside a region gives the codes that the runtime gives."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beside
import numpy as np
import pytest

nets: Any = beside.load(Path(__file__).with_name("conftest.py"))


def pooled_net(seed: int, *, is_global: bool) -> tuple[bytes, tuple[int, int]]:
    """A net of a 2-bit convolution, an average of its output, and a sum or a 2-bit convolution of the average."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(5, 20)), int(rng.integers(5, 20)))
    net = nets.NetWriter(rng)
    x = net.quantize("images", 1 / 255, 0, np.uint8, (3, *size))
    width = int(rng.choice([16, 40, 64, 100]))
    real, spread = net.convolution(x, width, step=1 / 255, bits=8, kernel=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
    trunk = net.quantize(real, spread / 60, 0, np.uint8, net.shapes[real])
    low = net.low_bit(trunk, spread, by_saturation=False)
    real, spread = net.convolution(low, width, step=spread, bits=2, kernel=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
    zero = int(rng.choice([0, 128, 37]))
    codes = net.quantize(real, spread / 50, zero, np.uint8, net.shapes[real])
    scale = spread / 50 * float(rng.choice([1, rng.uniform(0.1, 2)]))
    height, columns = net.shapes[codes][1:]
    if is_global:
        mean, shape = net.node("GlobalAveragePool", [net.dequantize(codes)]), (width, 1, 1)
        scale /= 4
    else:
        kernel, strides = rng.integers(1, 5, 2), rng.integers(1, 3, 2)
        pads = np.concatenate([rng.integers(0, kernel), rng.integers(0, kernel)])
        options: dict[str, Any] = {"count_include_pad": 1} if rng.random() < 0.5 else {}
        mean = net.node(
            "AveragePool", [net.dequantize(codes)], kernel_shape=[int(k) for k in kernel],
            strides=[int(s) for s in strides], pads=[int(p) for p in pads], **options,
        )  # fmt: skip
        sides = (height + pads[0] + pads[2], columns + pads[1] + pads[3])
        shape = (width, *(int((side - k) // s + 1) for side, k, s in zip(sides, kernel, strides, strict=True)))
    average = net.quantize(mean, scale, int(rng.choice([0, zero])), np.uint8, shape)
    inner = net.low_bit(average, scale * 60, by_saturation=False)
    real, spread = net.convolution(inner, 32, step=scale * 60, bits=2, kernel=[1, 1], pads=[0, 0, 0, 0], strides=[1, 1])
    out = net.dequantize(net.quantize(real, spread / 50, 128, np.uint8, net.shapes[real]))
    outputs = [net.node("Identity", [net.dequantize(average)], "mean"), net.node("Identity", [out], "out")]
    return net.model(outputs, size), size


def check(
    seeds: range, make_session: Callable[..., Any], claimed: Callable[[], list[list[str]]], *, is_global: bool
) -> None:
    found = 0
    for seed in seeds:
        model, size = pooled_net(seed, is_global=is_global)
        plain, ours = make_session(model, provider=False), make_session(model, provider=True)
        for batch in (1, 2):
            rng = np.random.default_rng(seed)
            x = {"images": (rng.random((batch, 3, *size)) * rng.random((batch, 3, 1, 1))).astype(np.float32)}
            for a, b in zip(plain.run(None, x), ours.run(None, x), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"net {seed}, batch {batch}")
        del ours
        gc.collect()
        found += any("average" in kinds for kinds in claimed())
    assert found == len(seeds)


@pytest.mark.parametrize("is_global", [True, False])
def test_averages_are_the_runtimes(
    is_global: bool, make_session: Callable[..., Any], claimed: Callable[[], list[list[str]]]
) -> None:
    check(range(12), make_session, claimed, is_global=is_global)


@pytest.mark.slow
@pytest.mark.parametrize("is_global", [True, False])
def test_many_averages_are_the_runtimes(
    is_global: bool, make_session: Callable[..., Any], claimed: Callable[[], list[list[str]]]
) -> None:
    check(range(100, 300), make_session, claimed, is_global=is_global)
