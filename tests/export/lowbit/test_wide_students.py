"""Students of other widths than two bits, run by the provider where it gains: one region, identical outputs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beside
import numpy as np
import onnx
import pytest

from export import lowbit

provider: Any = beside.load(Path(__file__).with_name("test_provider.py"))
SIZE = 16


def student(bits: tuple[int, int], folder: Path) -> Path:
    import torch

    from qkd.nets import build_net

    torch.manual_seed(0)
    net = build_net("resnet8", classes=10, channels=3, image_size=SIZE).train()
    image = torch.randn(16, 3, SIZE, SIZE)
    net(image)
    path: Path = provider.student_of(net, image, folder / "student.onnx", "ort", weight_bits=bits[0], act_bits=bits[1])
    return path


@pytest.mark.parametrize("bits", [(3, 3), (2, 4)])
def test_look_ups_of_more_bits(
    bits: tuple[int, int], tmp_path: Path, make_session: Callable[..., Any], claimed: Callable[[], list[list[str]]]
) -> None:
    if lowbit.availability().kernels != "avx512":
        pytest.skip("only the kernels for AVX-512 look all of these widths up")
    path = student(bits, tmp_path)
    plain, ours = make_session(path, provider=False), make_session(path, provider=True)
    x = {"images": np.random.default_rng(1).normal(size=(5, 3, SIZE, SIZE)).astype(np.float32)}
    np.testing.assert_array_equal(plain.run(None, x)[0], ours.run(None, x)[0])
    del ours
    gc.collect()
    (kinds,) = claimed()
    assert provider.look_ups(kinds) == 8 and kinds.count("dot_conv") == 1


KINDS = f"""
import gc, json, numpy as np, onnxruntime
from export import lowbit
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
x = {{"images": np.random.default_rng(1).normal(size=(5, 3, {SIZE}, {SIZE})).astype(np.float32)}}
providers = [lowbit.register(), "CPUExecutionProvider"]
ours = onnxruntime.InferenceSession("net.onnx", options, providers=providers, enable_fallback=0)
plain = onnxruntime.InferenceSession("net.onnx", options, providers=["CPUExecutionProvider"])
assert all(np.array_equal(a, b) for a, b in zip(ours.run(None, x), plain.run(None, x)))
del ours
gc.collect()
kinds = [op["kind"] for line in open("profile") for op in json.loads(line)["operations"]]
print(kinds.count("dot_conv"), kinds.count("lut_conv"))
"""


@pytest.mark.parametrize(("bits", "expected"), [((4, 4), "9 0"), ((3, 3), "9 0"), ((2, 4), "1 8"), ((2, 2), "1 8")])
def test_avx2_takes_four_bits(bits: tuple[int, int], expected: str, tmp_path: Path) -> None:
    """By sums of 16 bits; two bits of weights by look-up. In a separate process, where AVX2 is asked for."""
    content = student(bits, tmp_path).read_bytes()
    provider.run_script(KINDS, content, {"LOWBIT_ISA": "avx2", "LOWBIT_PROFILE": "profile"}, expected)


@pytest.mark.parametrize("isa", ["amx", "amx_emulated"])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (2, 4), (4, 4)])
def test_tiles_take_up_to_four_bits(bits: tuple[int, int], isa: str, tmp_path: Path) -> None:
    content = student(bits, tmp_path).read_bytes()
    provider.run_script(KINDS, content, {"LOWBIT_ISA": isa, "LOWBIT_PROFILE": "profile"}, "9 0")


@pytest.mark.parametrize("values", [(-1, 0, 1), (-1, 0), (0, 1), (-2, -1)])
def test_ternary_and_binary_weights_use_the_tables_of_two_bits(
    values: tuple[int, ...],
    random_net: Callable[[int], tuple[bytes, tuple[int, int]]],
    make_session: Callable[..., Any],
    claimed: Callable[[], list[list[str]]],
) -> None:
    content, size = random_net(12)
    model = onnx.load_from_string(content)
    for constant in model.graph.initializer:  # weights of two bits, and none of the first layer's eight
        codes = onnx.numpy_helper.to_array(constant)
        if codes.ndim == 4 and codes.dtype == np.int8 and codes.min() >= -2:
            few = np.asarray(values, np.int8)[codes.astype(int) % len(values)]
            constant.CopyFrom(onnx.numpy_helper.from_array(few, constant.name))
    counts = []
    for one in (content, model.SerializeToString()):
        plain, ours = make_session(one, provider=False), make_session(one, provider=True)
        x = {"images": provider.images(1, 2, size)}
        for a, b in zip(plain.run(None, x), ours.run(None, x), strict=True):
            np.testing.assert_array_equal(a, b)
        del ours
        gc.collect()
        counts.append(sum(map(provider.low_bit_layers, claimed())))
    assert counts[0] == counts[1] > 0
