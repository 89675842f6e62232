"""Turns each module that a student may contain into nodes of the integer view; refuses any other by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from quantizers import integer as ir
from quantizers.functions import FUNCTIONS, view_function
from quantizers.graph.form.canonical import Expand, Gather, Pad, Permute, Reshape, Slice
from quantizers.graph.form.kinds import DROPOUTS, is_pass
from quantizers.graph.spelling.call import pair
from quantizers.graph.trace import RewriteError
from quantizers.layers import (
    ActQuantizer,
    Concat,
    GlobalAveragePool,
    Probabilities,
    Product,
    QuantConvBn2d,
    QuantLinearBn,
    Sum,
    WindowGather,
)

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of a module in a student's graph.

    Args:
        name: Module path.
        inputs: Edges of its operands, in order; one that is used twice is listed twice.
        output: Edge of its result.
        shapes: Shape of each operand, batch first.
        shape: Shape of the result.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    shapes: tuple[Sizes, ...]
    shape: Sizes

    @property
    def common(self) -> tuple[str, tuple[str, ...], str]:
        """The leading fields of every node of the view."""
        return self.name, self.inputs, self.output


Viewer = Callable[[Call, Any], list[ir.Node]]


def view_module(call: Call, module: nn.Module) -> list[ir.Node]:
    """Return the nodes of one call; the last one produces ``call.output``.

    Raises:
        RewriteError: If it is not a module that a student may contain.
        ValueError: If a weight scale or bias is out of range (names the layer).
    """
    viewer = VIEWERS.get(type(module))
    if viewer is None and is_pass(module):
        viewer = _identity
    if viewer is None:
        raise RewriteError(
            f"{call.name}: {type(module).__name__} has no form in the integer view; a student may only contain what "
            "quantizers.prepare puts in, so change the float network and prepare it again"
        )
    return viewer(call, module)


def grid_of(quantizer: ActQuantizer) -> ir.Grid:
    """Return the grid of an activation quantizer.

    Args:
        quantizer: Calibrated.

    Returns:
        Its step (float), smallest and largest code.
    """
    quant = quantizer.quant
    return ir.Grid(float(quant.step.detach().float()), int(quant.low), int(quant.high))


def _quantizer(call: Call, module: ActQuantizer) -> list[ir.Node]:
    return [ir.Quantize(*call.common, grid=grid_of(module))]


def _conv(call: Call, layer: QuantConvBn2d) -> list[ir.Node]:
    fields = _layer_fields(call.name, layer)
    return [
        ir.Conv(
            *call.common, **fields, stride=pair(layer.stride), padding=_conv_padding(layer),
            dilation=pair(layer.dilation), groups=layer.groups,
        )
    ]  # fmt: skip


def _linear(call: Call, layer: QuantLinearBn) -> list[ir.Node]:
    """Return the nodes of a linear layer, between reshapes to rows of features and back if there are more axes."""
    fields = _layer_fields(call.name, layer)
    if len(call.shape) == 2:
        return [ir.Linear(*call.common, **fields)]
    if layer.bn is not None:
        raise RewriteError(
            f"{call.name}: its batch norm works on axis 1 of {list(call.shape)}, which are not its features; "
            "flatten before the layer"
        )
    rows, made = f"{call.output}.rows", f"{call.output}.made"
    flat = ir.Shape(f"{call.name}.rows", call.inputs, rows, "reshape", {"shape": (-1, call.shapes[0][-1])})
    back = ir.Shape(f"{call.name}.back", (made,), call.output, "reshape", {"shape": (-1, *call.shape[1:])})
    return [flat, ir.Linear(call.name, (rows,), made, **fields), back]


def _layer_fields(name: str, layer: QuantConvBn2d | QuantLinearBn) -> dict[str, Any]:
    codes, scale, bias = layer.integers()
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise ValueError(f"{name}: a weight scale is not a positive finite number; training has diverged")
    if bias is not None and (not bool(torch.isfinite(bias).all()) or float(bias.abs().max()) >= 2**31 - 1):
        raise ValueError(f"{name}: a bias does not fit int32 ({float(bias.abs().max()):.3g}); check its batch norm")
    return {
        "weights": codes.to(torch.int8).cpu().numpy(),
        "weight_bits": layer.quant.bits,
        "weight_scale": scale.float().cpu().numpy().astype(np.float32),
        "bias": None if bias is None else bias.to(torch.int32).cpu().numpy(),
    }


def _conv_padding(layer: QuantConvBn2d) -> tuple[int, int, int, int]:
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    if layer.padding == "same":
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        return (top, left, bottom, right)
    height, width = pair(layer.padding)
    return (height, width, height, width)


def _sum(call: Call, module: Sum) -> list[ir.Node]:
    return [ir.Add(*call.common)]


def _product(call: Call, module: Product) -> list[ir.Node]:
    return [ir.Mul(*call.common)]


def _concat(call: Call, module: Concat) -> list[ir.Node]:
    return [ir.Concat(*call.common, axis=module.axis % len(call.shape))]


def _max_pool(call: Call, pool: nn.MaxPool2d) -> list[ir.Node]:
    if pool.return_indices:
        raise RewriteError(f"{call.name}: pooling with indices has no integer form; use plain pooling")
    height, width = pair(pool.padding)
    return [
        ir.MaxPool(
            *call.common, kernel=pair(pool.kernel_size), stride=_stride(pool), padding=(height, width, height, width),
            dilation=pair(pool.dilation), ceil_mode=pool.ceil_mode,
        )
    ]  # fmt: skip


def _average_pool(call: Call, pool: nn.AvgPool2d) -> list[ir.Node]:
    if pool.divisor_override:
        raise RewriteError(f"{call.name}: pooling with another divisor has no integer form; use plain pooling")
    height, width = pair(pool.padding)
    return [
        ir.AveragePool(
            *call.common, kernel=pair(pool.kernel_size), stride=_stride(pool), padding=(height, width, height, width),
            ceil_mode=pool.ceil_mode, count_include_pad=pool.count_include_pad,
        )
    ]  # fmt: skip


def _stride(pool: nn.MaxPool2d | nn.AvgPool2d) -> tuple[int, int]:
    return pair(pool.kernel_size if pool.stride is None else pool.stride)


def _global_mean(call: Call, module: GlobalAveragePool) -> list[ir.Node]:
    return [ir.GlobalAveragePool(*call.common, keepdims=module.keepdims)]


def _probabilities(call: Call, module: Probabilities) -> list[ir.Node]:
    return [ir.Function(*call.common, module.function, {"axis": module.axis % len(call.shape)})]


def _function(call: Call, module: nn.Module) -> list[ir.Node]:
    return [ir.Function(*call.common, *view_function(module, len(call.shape)))]


# -- moves -------------------------------------------------------------------------------------------------------------


def _move(call: Call, op: str, **attributes: object) -> list[ir.Node]:
    return [ir.Shape(*call.common, op, attributes)]


def _identity(call: Call, module: nn.Module) -> list[ir.Node]:
    return _move(call, "identity")


def _reshape(call: Call, module: nn.Module) -> list[ir.Node]:
    # Only the batch is free: the example's other sizes are fixed in the network.
    return _move(call, "reshape", shape=(-1, *call.shape[1:]))


def _permute(call: Call, module: Permute) -> list[ir.Node]:
    return _move(call, "transpose", perm=module.order)


def _slice(call: Call, module: Slice) -> list[ir.Node]:
    return _move(call, "slice", axis=module.axis, start=module.start, end=module.end, step=module.step)


def _gather(call: Call, module: Gather) -> list[ir.Node]:
    return _move(call, "gather", axis=module.axis, indices=module.indices.tolist())


def _pad(call: Call, module: Pad) -> list[ir.Node]:
    return _move(call, "pad", before=module.before, after=module.after)


def _expand(call: Call, module: Expand) -> list[ir.Node]:
    return _move(call, "expand", shape=(1, *module.shape))


def _windows(call: Call, module: WindowGather) -> list[ir.Node]:
    between = f"{call.output}.rows"
    rows = {"axis": 2, "indices": module.rows.tolist()}
    columns = {"axis": 3, "indices": module.columns.tolist()}
    return [
        ir.Shape(f"{call.name}.rows", call.inputs, between, "gather", rows),
        ir.Shape(f"{call.name}.columns", (between,), call.output, "gather", columns),
    ]


# Every module that a student may contain (in addition to torchvision's StochasticDepth), by exact type.
VIEWERS: Mapping[type[nn.Module], Viewer] = {
    ActQuantizer: _quantizer,
    QuantConvBn2d: _conv,
    QuantLinearBn: _linear,
    Sum: _sum,
    Product: _product,
    Concat: _concat,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    GlobalAveragePool: _global_mean,
    Probabilities: _probabilities,
    WindowGather: _windows,
    nn.Flatten: _reshape,
    Reshape: _reshape,
    Permute: _permute,
    Slice: _slice,
    Gather: _gather,
    Pad: _pad,
    Expand: _expand,
    **dict.fromkeys(FUNCTIONS, _function),
    **dict.fromkeys((nn.Identity, *DROPOUTS), _identity),
}
