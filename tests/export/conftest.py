"""Small integer views built by hand, and what they compute, in exact numpy arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional as F  # noqa: N812

from export.runtime import open_session
from quantizers.integer import (
    Add,
    AveragePool,
    Concat,
    Conv,
    GlobalAveragePool,
    Grid,
    IntegerView,
    Linear,
    MaxPool,
    Mul,
    Node,
    Quantize,
    Shape,
)


class NetBuilder:
    """Adds nodes one by one; every scale is a power of two, so that float arithmetic in the runtime is exact."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.grids: dict[str, Grid] = {}

    def quantize(self, source: str, output: str, bits: int, scale: float, low: int = 0) -> str:
        grid = Grid(scale, low, low + 2**bits - 1)
        self.grids[output] = grid
        self.nodes.append(Quantize(f"{output}_quant", (source,), output, grid))
        return output

    def image(self, bits: int = 8) -> str:
        return self.quantize("x", "image", bits, 1 / 16, -(2 ** (bits - 1)))

    def conv(
        self,
        source: str,
        output: str,
        channels: tuple[int, int],
        *,
        kernel: tuple[int, int] = (3, 3),
        bits: int = 4,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (1, 1, 1, 1),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        per_channel: bool = True,
        bias: bool = True,
    ) -> str:
        shape = (channels[1], channels[0] // groups, *kernel)
        arrays = (self._weights(shape, bits), bits, self._scales(channels[1], per_channel))
        bias_codes = self._bias(channels[1], bias)
        self.nodes.append(Conv(output, (source,), output, *arrays, bias_codes, stride, padding, dilation, groups))
        return output

    def linear(self, source: str, output: str, features: tuple[int, int], *, bits: int = 8, bias: bool = True) -> str:
        weights = self._weights((features[1], features[0]), bits)
        scales = self._scales(features[1], per_channel=True)
        self.nodes.append(Linear(output, (source,), output, weights, bits, scales, self._bias(features[1], bias)))
        return output

    def keep(self, node: Node) -> str:
        """Add a node whose output is on the grid of its first input, if that is on one."""
        self.nodes.append(node)
        if node.inputs[0] in self.grids:
            self.grids[node.output] = self.grids[node.inputs[0]]
        return node.output

    def shape(self, source: str, output: str, op: str, **attributes: object) -> str:
        return self.keep(Shape(output, (source,), output, op=op, attributes=attributes))

    def real(self, node: Node) -> str:
        self.nodes.append(node)
        return node.output

    def view(self, *outputs: str) -> IntegerView:
        return IntegerView(tuple(self.nodes), dict(self.grids), ("x",), outputs)

    def _weights(self, shape: tuple[int, ...], bits: int) -> np.ndarray:
        limit = min(2 ** (bits - 1), 64)  # eight-bit weights keep to seven: x86 without VNNI
        return self.rng.integers(-limit, limit, shape).astype(np.int8)

    def _scales(self, channels: int, per_channel: bool) -> np.ndarray:
        size = channels if per_channel else 1
        return (2.0 ** self.rng.integers(-7, -4, size)).astype(np.float32)

    def _bias(self, channels: int, wanted: bool) -> np.ndarray | None:
        return self.rng.integers(-200, 200, channels).astype(np.int32) if wanted else None


def residual_view() -> IntegerView:
    """Return a net with every kind of layer that must run on integers."""
    net = NetBuilder()
    net.conv(net.image(), "conv1", (3, 8), bits=8)
    net.quantize("conv1", "a1", 4, 1 / 2)
    net.keep(MaxPool("pool", ("a1",), "pool", (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), False))
    net.quantize(net.conv("pool", "left", (8, 8)), "left_q", 8, 1 / 8, -128)
    net.quantize(
        net.conv("pool", "right", (8, 8), kernel=(1, 1), padding=(0, 0, 0, 0), bits=2), "right_q", 8, 1 / 8, -128
    )
    net.real(Add("sum", ("left_q", "right_q"), "sum"))
    net.quantize("sum", "a2", 8, 1 / 8)
    net.quantize("a2", "a2_low", 4, 0.5)
    net.quantize(net.conv("a2_low", "conv2", (8, 8), groups=8, bits=3), "a3", 4, 0.5)
    net.keep(Concat("cat", ("a2_low", "a3"), "cat", 1))
    net.quantize(net.conv("cat", "conv3", (16, 8), stride=(2, 2), bits=2), "a4", 8, 1 / 16)
    net.real(AveragePool("mean", ("a4",), "mean", (2, 2), (1, 1), (0, 0, 0, 0), False, True))
    net.quantize("mean", "a5", 8, 1 / 16)
    net.real(GlobalAveragePool("global", ("a5",), "global", False))
    net.quantize("global", "a6", 8, 1 / 64)
    return net.view(net.linear("a6", "fc", (8, 5)))


def reference(view: IntegerView, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return every edge: codes (int64) on a grid, else float64 values; exact where scales are powers of two."""
    edges: dict[str, np.ndarray] = {view.inputs[0]: images.astype(np.float64)}
    for node in view.nodes:
        edges[node.output] = _compute(node, view, edges)
    return edges


def _compute(node: Node, view: IntegerView, edges: dict[str, np.ndarray]) -> np.ndarray:
    first = node.inputs[0]
    scales = [view.grids[edge].scale if edge in view.grids else 1.0 for edge in node.inputs]
    real = [edges[edge] * scale for edge, scale in zip(node.inputs, scales, strict=True)]
    if isinstance(node, Quantize):
        return np.clip(np.rint(real[0] / node.grid.scale), node.grid.low, node.grid.high).astype(np.int64)
    if isinstance(node, (Conv, Linear)):
        total = (
            _convolve(edges[first], node) if isinstance(node, Conv) else edges[first] @ node.weights.T.astype(np.int64)
        )
        shape = (1, -1, 1, 1)[: total.ndim]
        total = total + (0 if node.bias is None else node.bias.astype(np.int64).reshape(shape))
        return total * (np.float64(node.weight_scale).reshape(shape) * scales[0])
    if isinstance(node, Add):
        return real[0] + real[1]
    if isinstance(node, Mul):
        return real[0] * real[1]
    if isinstance(node, Concat):
        return np.concatenate([edges[edge] for edge in node.inputs], node.axis)
    if isinstance(node, GlobalAveragePool):
        return real[0].mean((2, 3), keepdims=node.keepdims)
    if isinstance(node, MaxPool):
        codes = torch.tensor(edges[first]).double()
        top, left, bottom, right = node.padding
        padded = F.pad(codes, (left, right, top, bottom), value=-torch.inf)
        pooled = F.max_pool2d(padded, node.kernel, node.stride, 0, node.dilation, node.ceil_mode)
        return pooled.numpy().astype(np.int64)
    if isinstance(node, AveragePool):
        window = (node.kernel, node.stride, node.padding[:2], node.ceil_mode, node.count_include_pad)
        return F.avg_pool2d(torch.tensor(real[0]), *window).numpy()
    if isinstance(node, Shape):
        return _moved(node, edges[first])
    raise TypeError(type(node).__name__)


def _convolve(codes: np.ndarray, node: Conv) -> np.ndarray:
    """Sum products one kernel position at a time; zero padding is code zero."""
    top, left, bottom, right = node.padding
    padded = np.pad(codes, ((0, 0), (0, 0), (top, bottom), (left, right)))
    _, _, height, width = node.weights.shape
    (sy, sx), (dy, dx) = node.stride, node.dilation
    out_height = (padded.shape[2] - dy * (height - 1) - 1) // sy + 1
    out_width = (padded.shape[3] - dx * (width - 1) - 1) // sx + 1
    total = np.zeros((len(codes), node.weights.shape[0], out_height, out_width), np.int64)
    inputs, outputs = padded.shape[1] // node.groups, node.weights.shape[0] // node.groups
    for group in range(node.groups):
        ins, outs = slice(group * inputs, (group + 1) * inputs), slice(group * outputs, (group + 1) * outputs)
        for y in range(height):
            for x in range(width):
                rows = slice(y * dy, y * dy + (out_height - 1) * sy + 1, sy)
                columns = slice(x * dx, x * dx + (out_width - 1) * sx + 1, sx)
                weights = node.weights[outs, :, y, x].astype(np.int64)
                total[:, outs] += np.einsum("oi,nihw->nohw", weights, padded[:, ins, rows, columns])
    return total


def _moved(node: Shape, values: np.ndarray) -> np.ndarray:
    settings: Any = node.attributes
    if node.op == "flatten":
        return values.reshape(*values.shape[: settings["axis"]], -1)
    if node.op == "reshape":
        return values.reshape([values.shape[i] if size == 0 else size for i, size in enumerate(settings["shape"])])
    if node.op == "transpose":
        return values.transpose(settings["perm"])
    if node.op == "slice":
        return values.take(range(settings["start"], settings["end"], settings.get("step", 1)), settings["axis"])
    if node.op == "gather":
        return values.take(settings["indices"], settings["axis"])
    if node.op == "pad":
        return np.pad(values, list(zip(settings["before"], settings["after"], strict=True)))
    if node.op == "expand":
        return np.broadcast_to(values, (len(values), *settings["shape"][1:]))
    return values


def run_file(path: Path, images: np.ndarray, *, optimize: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the logits and, by quantizer, the codes that a file computes."""
    model = onnx.load(path)
    taps = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "quantizers"))
    tensors = sorted({tap["tensor"] for tap in taps})
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in tensors)
    session = open_session(model.SerializeToString(), optimize=optimize)
    logits, *stored = session.run(["logits", *tensors], {"images": images})
    found = dict(zip(tensors, stored, strict=True))
    return logits, {tap["name"]: found[tap["tensor"]].astype(np.int64) - tap["zero_point"] for tap in taps}


@pytest.fixture
def net() -> NetBuilder:
    return NetBuilder()


@pytest.fixture
def residual() -> IntegerView:
    return residual_view()


@pytest.fixture
def images() -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((5, 3, 15, 15)) * 3).astype(np.float32)


@pytest.fixture
def tools() -> Any:
    """Return the functions above: test files cannot import this one."""
    return type("Tools", (), {"reference": staticmethod(reference), "run_file": staticmethod(run_file)})
