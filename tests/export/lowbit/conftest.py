"""Random quantized nets, and sessions with and without the provider."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import lowbit


class NetWriter:
    """Writes a net of quantized operators, edge by edge; an edge is a tensor of codes with its grid.

    Args:
        rng: Draws everything.
        is_signed: Whether signed grids are int8 (as flavor qcdq has them) or uint8 with a zero point of 128.
    """

    def __init__(self, rng: np.random.Generator, *, is_signed: bool = False) -> None:
        self.rng, self.is_signed = rng, is_signed
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.grids: dict[str, tuple[str, str]] = {}
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.count = 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"

    def constant(self, value: npt.ArrayLike, dtype: Any) -> str:
        name = self.name("c")
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, op: str, inputs: list[str], stem: str = "t", **attributes: Any) -> str:
        out = self.name(stem)
        self.nodes.append(helper.make_node(op, inputs, [out], **attributes))
        return out

    def quantize(self, real: str, scale: float, zero: int, dtype: Any, shape: tuple[int, int, int]) -> str:
        grid = self.constant(scale, np.float32), self.constant(zero, dtype)
        out = self.node("QuantizeLinear", [real, *grid], "codes")
        self.grids[out], self.shapes[out] = grid, shape
        return out

    def dequantize(self, codes: str) -> str:
        return self.node("DequantizeLinear", [codes, *self.grids[codes]], "real")

    def keep(self, op: str, codes: str, shape: tuple[int, int, int], *inputs: str, **attributes: Any) -> str:
        out = self.node(op, [codes, *inputs], "codes", **attributes)
        self.grids[out], self.shapes[out] = self.grids[codes], shape
        return out

    def low_bit(self, codes: str, scale: float, *, by_saturation: bool) -> str:
        """A copy on two bits, by a Clip or at the end of uint8."""
        real, shape = self.dequantize(codes), self.shapes[codes]
        if not by_saturation:
            wide = self.quantize(real, scale, 0, np.uint8, shape)
            return self.keep("Clip", wide, shape, self.constant(0, np.uint8), self.constant(3, np.uint8))
        nothing = self.node("DequantizeLinear", [self.constant(0, np.uint8), *self.grids[codes]], "nothing")
        return self.quantize(self.node("Add", [real, nothing]), scale, 252, np.uint8, shape)

    def convolution(self, codes: str, outputs: int, *, step: float, bits: int, **options: Any) -> tuple[str, float]:
        """A convolution; returns its real output and the spread of its values."""
        rng, (channels, height, width) = self.rng, self.shapes[codes]
        group, dilation = options.get("group", 1), options.get("dilation", 1)
        kernel = [int(k) for k in options.get("kernel", rng.choice([1, 3, 3, 5], 2))]
        strides = [int(s) for s in options.get("strides", rng.choice([1, 1, 2], 2))]
        pads = [int(p) for p in options.get("pads", [*(k // 2 for k in kernel)] * 2)]
        shape = (outputs, channels // group, *kernel)
        low, high = (-2, 1) if bits == 2 else (-64, 63)
        spread = 0.9 if bits == 2 else 25
        weights = np.clip(np.rint(rng.normal(0, spread, shape)), low, high).astype(np.int8)
        steps = (rng.uniform(0.5, 2, outputs) * 0.01).astype(np.float32)
        reach = spread * np.sqrt(np.prod(shape[1:])) * (1.5 if bits == 2 else 110)
        bias = rng.normal(0, reach / 2, outputs).astype(np.int32)
        stored = [
            self.constant(weights, np.int8),
            self.constant(steps, np.float32),
            self.constant(np.zeros(outputs), np.int8),
        ]
        biases = [
            self.constant(bias, np.int32),
            self.constant(np.float32(step) * steps, np.float32),
            self.constant(np.zeros(outputs), np.int32),
        ]
        inputs = [
            self.dequantize(codes),
            self.node("DequantizeLinear", stored, axis=0),
            self.node("DequantizeLinear", biases, axis=0),
        ]
        real = self.node(
            "Conv", inputs, kernel_shape=kernel, strides=strides, pads=pads, group=group, dilations=[dilation] * 2
        )
        sides = (height + pads[0] + pads[2], width + pads[1] + pads[3])
        sides = tuple(
            (side - dilation * (k - 1) - 1) // s + 1 for side, k, s in zip(sides, kernel, strides, strict=True)
        )
        self.shapes[real] = (outputs, *sides)
        return real, float(reach * step * 0.01)

    def model(self, outputs: list[str], size: tuple[int, int]) -> bytes:
        ends = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, *size])]
        outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", ends, outs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return bytes(model.SerializeToString())


def random_net(seed: int) -> tuple[bytes, tuple[int, int]]:
    """Return a net of 2-bit and other layers with sums, pooling and changes of grid, and its image size."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(9, 34)), int(rng.integers(9, 34)))
    net = NetWriter(rng, is_signed=bool(rng.random() < 0.4))
    signed: tuple[int, Any] = (0, np.int8) if net.is_signed else (128, np.uint8)
    x = net.quantize("images", 1 / 255, 0, np.uint8, (3, *size))
    width = int(rng.choice([16, 24, 64, 65, 128]))
    real, spread = net.convolution(x, width, step=1 / 255, bits=8, pads=[1, 1, 1, 1], kernel=[3, 3])
    trunk_scale = spread / 60
    trunk = net.quantize(real, trunk_scale, 0, np.uint8, net.shapes[real])
    if rng.random() < 0.5 and min(net.shapes[trunk][1:]) > 3:
        channels, height, columns = net.shapes[trunk]
        shape = (channels, (height - 1) // 2 + 1, (columns - 1) // 2 + 1)
        trunk = net.keep("MaxPool", trunk, shape, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for _ in range(int(rng.integers(1, 4))):
        step = trunk_scale * float(rng.uniform(15, 40))
        low = net.low_bit(trunk, step, by_saturation=bool(rng.random() < 0.5))
        if rng.random() < 0.3:  # a channel by itself
            real, spread = net.convolution(
                low, width, step=step, bits=2, group=width, kernel=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1]
            )
            low, step = (
                net.low_bit(
                    net.quantize(real, spread / 60, 0, np.uint8, net.shapes[real]), spread, by_saturation=False
                ),
                spread,
            )
        if rng.random() < 0.3 and min(net.shapes[low][1:]) > 2:  # side by side, pooled with windows that hang over
            low = net.keep("Concat", low, (2 * width, *net.shapes[low][1:]), low, axis=1)
            sides = [-(-(side - 2) // 2) + 1 for side in net.shapes[low][1:]]
            low = net.keep("MaxPool", low, (2 * width, *sides), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
        outputs = int(rng.choice([width, width, 32, 64, 100]))
        real, spread = net.convolution(low, outputs, step=step, bits=2)
        step = spread
        wide = net.quantize(real, step, 0, np.uint8, net.shapes[real])
        inner = net.keep("Clip", wide, net.shapes[real], net.constant(0, np.uint8), net.constant(3, np.uint8))
        odd = rng.random()
        options: dict[str, Any] = {"kernel": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}
        if odd < 0.15 and outputs % 2 == width % 2 == 0:
            options["group"] = 2  # not ours
        elif odd < 0.3:
            options |= {"dilation": 2, "pads": [2, 2, 2, 2]}
        elif odd < 0.6:  # through a signed grid of two bits
            real, spread = net.convolution(inner, outputs, step=step, bits=2, **options)
            grid = net.quantize(real, spread, 2, np.uint8, net.shapes[real])
            inner, step = (
                net.keep("Clip", grid, net.shapes[real], net.constant(0, np.uint8), net.constant(3, np.uint8)),
                spread,
            )
        real, spread = net.convolution(inner, width, step=step, bits=2, **options)
        branch = net.quantize(real, spread / 40, *signed, net.shapes[real])
        if net.shapes[branch] != net.shapes[trunk]:  # the other way round the block
            real, spread = net.convolution(
                low, width, step=float(net_scale(net, low)), bits=2, kernel=[1, 1], pads=[0, 0, 0, 0],
                strides=[ratio(net.shapes[trunk][i], net.shapes[branch][i]) for i in (1, 2)],
            )  # fmt: skip
            trunk = net.quantize(real, spread / 40, *signed, net.shapes[real])
        if net.shapes[branch] != net.shapes[trunk]:
            trunk_scale = spread / 40
            trunk = net.quantize(net.dequantize(branch), trunk_scale, 0, np.uint8, net.shapes[branch])
            continue
        total = net.node("Add", [net.dequantize(branch), net.dequantize(trunk)])
        trunk_scale = spread / 30
        trunk = net.quantize(total, trunk_scale, 0, np.uint8, net.shapes[branch])
    outputs_ = [net.node("Identity", [net.dequantize(trunk)], "out")]
    pooled = net.node("GlobalAveragePool", [net.dequantize(trunk)])
    outputs_.append(net.dequantize(net.quantize(pooled, trunk_scale / 4, 0, np.uint8, (width, 1, 1))))
    return net.model(outputs_, size), size


def net_scale(net: NetWriter, codes: str) -> float:
    """The scale of an edge."""
    return float(next(numpy_helper.to_array(c) for c in net.constants if c.name == net.grids[codes][0]))


def ratio(before: int, after: int) -> int:
    """A stride that makes one side of the other, if there is one."""
    return max(1, -(-before // after))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The provider's library, for calls of single functions."""
    try:
        return ctypes.CDLL(str(lowbit.library_path()))
    except lowbit.LowBitUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(name="random_net")
def give_random_net() -> Callable[[int], tuple[bytes, tuple[int, int]]]:
    return random_net


@pytest.fixture
def make_session(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A session on one thread; ``isa`` chooses kernels, None means the CPU provider alone."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def session(model: Any, *, provider: bool, threads: int = 1) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        names = ["CPUExecutionProvider"]
        if provider:
            try:
                names.insert(0, lowbit.register())
            except lowbit.LowBitUnavailableError as error:
                pytest.skip(str(error))
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=names, enable_fallback=0)

    return session


@pytest.fixture
def claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[list[str]]]:
    """The kinds of operations of each region that sessions had, once they are gone."""
    path = tmp_path / "profile.jsonl"
    monkeypatch.setenv("LOWBIT_PROFILE", str(path))

    def read() -> list[list[str]]:
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [[op["kind"] for op in json.loads(line)["operations"]] for line in lines]

    return read
