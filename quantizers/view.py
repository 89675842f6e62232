"""Builds the integer view of a student: weights, scales and zero points as the deployed arithmetic uses them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn

from quantizers import integer as ir
from quantizers.calibrate import act_quantizers, eval_mode, quant_layers
from quantizers.graph.trace import FUNCTION_NAMES, RewriteError, pair
from quantizers.layers import (
    ActQuantizer,
    Concat,
    GlobalAveragePool,
    Product,
    QuantConvBn2d,
    QuantLinearBn,
    Sum,
    WindowGather,
)
from quantizers.student import Student
from quantizers.tensor_quant import NotCalibratedError

Common = tuple[str, tuple[str, ...], str]  # name, input edges, output edge


def grid_of(quantizer: ActQuantizer) -> ir.Grid:
    """Return the grid of an activation quantizer."""
    quant = quantizer.quant
    return ir.Grid(float(quant.step.detach().float()), int(quant.low), int(quant.high))


def integer_view(student: Student) -> ir.IntegerView:
    """Return a calibrated student as integers; the student is left as it is.

    Raises:
        NotCalibratedError: If an activation quantizer has no scale yet.
        ValueError: If a bias does not fit int32 or a scale is not finite (names the layer).
    """
    for name, quantizer in act_quantizers(student).items():
        if not quantizer.quant.is_calibrated:
            raise NotCalibratedError(name)
    with eval_mode(student), torch.no_grad():
        return _Viewer(student).view()


class _Viewer:
    def __init__(self, student: Student) -> None:
        self.student = student
        self.modules = dict(student.named_modules())
        self.nodes: list[ir.Node] = []
        self.grids: dict[str, ir.Grid] = {}
        self.edges: dict[fx.Node, Any] = {}
        self.inputs: list[str] = []
        self.outputs: tuple[str, ...] = ()

    def view(self) -> ir.IntegerView:
        for node in self.student.graph.nodes:
            if node.op == "placeholder":
                self.edges[node] = node.name
                self.inputs.append(node.name)
            elif node.op == "output":
                result = node.args[0]
                results = result if isinstance(result, (tuple, list)) else (result,)
                self.outputs = tuple(self.edges[r] for r in results)
            elif node.meta.get("shape") is not None:
                self._tensor(node)
        return ir.IntegerView(tuple(self.nodes), self.grids, tuple(self.inputs), self.outputs)

    def _tensor(self, node: fx.Node) -> None:
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        inputs = tuple(self.edges[n] for n in node.all_input_nodes if n.meta.get("shape") is not None)
        name = str(node.target) if module is not None else node.name
        if module is None:
            self._call(node, name, inputs)
            return
        made, keeps = self._module(node, name, module, inputs)
        self._add(node, made, grid=made.grid if isinstance(made, ir.Quantize) else None, keeps=keeps)

    def _add(self, node: fx.Node, made: ir.Node, *, grid: ir.Grid | None = None, keeps: bool = False) -> None:
        self.nodes.append(made)
        self.edges[node] = made.output
        if grid is None and keeps:
            grid = self.grids.get(made.inputs[0])
        if grid is not None:
            self.grids[made.output] = grid

    def _module(self, node: fx.Node, name: str, module: nn.Module, inputs: tuple[str, ...]) -> tuple[ir.Node, bool]:
        common: Common = (name, inputs, node.name)
        if isinstance(module, ActQuantizer):
            return ir.Quantize(*common, grid=grid_of(module)), False
        if isinstance(module, (QuantConvBn2d, QuantLinearBn)):
            return _layer(common, module), False
        if isinstance(module, Sum):
            return ir.Add(*common), False
        if isinstance(module, Product):
            return ir.Mul(*common), False
        if isinstance(module, Concat):
            return ir.Concat(*common, axis=module.axis), True
        if isinstance(module, nn.MaxPool2d):
            return _max_pool(common, module), True
        if isinstance(module, nn.AvgPool2d):
            return _average_pool(common, module), False
        if isinstance(module, GlobalAveragePool):
            return ir.GlobalAveragePool(*common, keepdims=module.keepdims), False
        return self._moving_module(node, common, module)

    def _moving_module(self, node: fx.Node, common: Common, module: nn.Module) -> tuple[ir.Node, bool]:
        if isinstance(module, WindowGather):
            return self._gather(node, common, module), True
        if isinstance(module, nn.Flatten):
            return _reshape(common, node), True
        if type(module) in FUNCTION_NAMES:
            return ir.Function(*common, FUNCTION_NAMES[type(module)], _attributes(module)), False
        if isinstance(module, nn.ReLU):
            return ir.Function(*common, "relu6" if isinstance(module, nn.ReLU6) else "relu"), False
        return ir.Shape(*common, "identity"), True  # drop-out and its kin

    def _gather(self, node: fx.Node, common: Common, module: WindowGather) -> ir.Node:
        name, inputs, output = common
        rows = ir.Shape(
            f"{name}.rows", inputs, f"{output}_rows", "gather", {"axis": 2, "indices": module.rows.tolist()}
        )
        self.nodes.append(rows)
        if inputs[0] in self.grids:
            self.grids[rows.output] = self.grids[inputs[0]]
        attributes = {"axis": 3, "indices": module.columns.tolist()}
        return ir.Shape(f"{name}.columns", (rows.output,), output, "gather", attributes)

    def _call(self, node: fx.Node, name: str, inputs: tuple[str, ...]) -> None:
        target = node.target if node.op == "call_function" else str(node.target)
        label = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        common: Common = (name, inputs, node.name)
        if label in ("chunk", "split"):
            self._pieces(node, inputs[0])
        elif label == "getitem":
            self._piece(node)
        elif label in ("view", "reshape", "flatten", "squeeze", "unsqueeze"):
            self._add(node, _reshape(common, node), keeps=True)
        elif label in ("permute", "transpose"):
            self._add(node, ir.Shape(*common, "transpose", {"perm": _permutation(node, label)}), keeps=True)
        elif label in ("contiguous", "clone"):
            self._add(node, ir.Shape(*common, "identity"), keeps=True)
        elif target in FUNCTION_NAMES:
            self._add(node, ir.Function(*common, FUNCTION_NAMES[target], _arguments(node)))
        elif label in ("relu", "relu_", "relu6"):
            self._add(node, ir.Function(*common, "relu6" if label == "relu6" else "relu"))
        else:
            raise RewriteError(f"{name}: {label} has no place in the integer view")

    def _pieces(self, node: fx.Node, edge: str) -> None:
        axis = _dimension(node, 2, "dim") % len(node.meta["shape"][0])
        pieces, start = [], 0
        for index, shape in enumerate(node.meta["shape"]):
            attributes = {"axis": axis, "start": start, "end": start + shape[axis]}
            piece = ir.Shape(f"{node.name}.{index}", (edge,), f"{node.name}_{index}", "slice", attributes)
            start += shape[axis]
            pieces.append(piece.output)
            self.nodes.append(piece)
            if edge in self.grids:
                self.grids[piece.output] = self.grids[edge]
        self.edges[node] = pieces

    def _piece(self, node: fx.Node) -> None:
        source, index = node.args
        pieces = self.edges[source]  # type: ignore[index]
        if isinstance(pieces, str):
            raise RewriteError(f"{node.name}: indexing a tensor has no integer form; use chunk or split")
        self.edges[node] = pieces[index]


def _layer(common: Common, layer: QuantConvBn2d | QuantLinearBn) -> ir.Node:
    codes, scale, bias = layer.integers()
    name = common[0]
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise ValueError(f"{name}: a weight scale is not a positive finite number; the training has diverged")
    if bias is not None and (not bool(torch.isfinite(bias).all()) or float(bias.abs().max()) >= 2**31 - 1):
        raise ValueError(f"{name}: a bias does not fit int32 ({float(bias.abs().max()):.3g}); check its batch norm")
    fields: dict[str, Any] = {
        "weights": codes.to(torch.int8).cpu().numpy(),
        "weight_bits": layer.quant.bits,
        "weight_scale": scale.float().cpu().numpy().astype(np.float32),
        "bias": None if bias is None else bias.to(torch.int32).cpu().numpy(),
    }
    if isinstance(layer, QuantLinearBn):
        return ir.Linear(*common, **fields)
    return ir.Conv(
        *common, **fields, stride=pair(layer.stride), padding=_conv_padding(layer),
        dilation=pair(layer.dilation), groups=layer.groups,
    )  # fmt: skip


def _conv_padding(layer: QuantConvBn2d) -> tuple[int, int, int, int]:
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    if layer.padding == "same":
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        return (top, left, bottom, right)
    height, width = pair(layer.padding)
    return (height, width, height, width)


def _max_pool(common: Common, pool: nn.MaxPool2d) -> ir.Node:
    height, width = pair(pool.padding)
    return ir.MaxPool(
        *common, kernel=pair(pool.kernel_size), stride=pair(pool.stride), padding=(height, width, height, width),
        dilation=pair(pool.dilation), ceil_mode=pool.ceil_mode,
    )  # fmt: skip


def _average_pool(common: Common, pool: nn.AvgPool2d) -> ir.Node:
    height, width = pair(pool.padding)
    return ir.AveragePool(
        *common, kernel=pair(pool.kernel_size), stride=pair(pool.stride), padding=(height, width, height, width),
        ceil_mode=pool.ceil_mode, count_include_pad=pool.count_include_pad,
    )  # fmt: skip


def _reshape(common: Common, node: fx.Node) -> ir.Node:
    # Only the batch is free: the example's other sizes are those of the network.
    return ir.Shape(*common, "reshape", {"shape": (-1, *node.meta["shape"][1:])})


def _permutation(node: fx.Node, label: str) -> tuple[int, ...]:
    rank = len(node.meta["shape"])
    if label == "transpose":
        first, second = (_dimension(node, i, key) % rank for i, key in ((1, "dim0"), (2, "dim1")))
        order = list(range(rank))
        order[first], order[second] = order[second], order[first]
        return tuple(order)
    dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return tuple(int(d) % rank for d in dims)  # type: ignore[arg-type]


def _dimension(node: fx.Node, position: int, key: str) -> int:
    return int(node.args[position] if len(node.args) > position else node.kwargs.get(key, 0))  # type: ignore[arg-type]


def _attributes(module: nn.Module) -> dict[str, object]:
    names = ("negative_slope", "alpha", "approximate", "beta", "threshold")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _arguments(node: fx.Node) -> dict[str, object]:
    """Return the parameters of a functional form by the names its module has."""
    positions = {"leaky_relu": ("negative_slope",), "elu": ("alpha",), "softplus": ("beta", "threshold")}
    positional = dict(zip(positions.get(FUNCTION_NAMES[node.target], ()), node.args[1:], strict=False))
    return {**positional, **{key: value for key, value in node.kwargs.items() if key not in ("input", "inplace")}}


def layer_report(student: Student) -> list[dict[str, Any]]:
    """Return a row a convolution or linear layer: bits, codes in use, parameters and multiply-accumulates an image."""
    view = integer_view(student)
    shapes = {n.name: n.meta.get("shape") for n in student.graph.nodes}
    layers = quant_layers(student)
    rows = []
    for node in view.nodes:
        if not isinstance(node, (ir.Conv, ir.Linear)):
            continue
        grid, shape = view.grids[node.inputs[0]], shapes[node.output]
        outputs = int(np.prod(shape[1:])) if shape else 0
        layer = layers[node.name]
        rows.append(
            {
                "name": node.name,
                "kind": type(node).__name__.lower(),
                "weight_bits": node.weight_bits,
                "act_bits": grid.bits,
                "code_min": int(node.weights.min()),
                "code_max": int(node.weights.max()),
                "range_low": layer.quant.low_code,
                "range_high": layer.quant.high_code,
                "parameters": int(node.weights.size) + (0 if node.bias is None else int(node.bias.size)),
                "macs": outputs * int(np.prod(node.weights.shape[1:])),
            }
        )
    return rows
