"""Turns a float network into a trainable low-bit student: decides where grids lie, then writes the new graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantizers.graph.plan import Plan, weight_range
from quantizers.graph.pooling import adaptive_pool, pool_module, spatial_mean
from quantizers.graph.trace import (
    ADAPTIVE,
    ADD,
    AVGPOOL,
    CAT,
    CONV,
    FINAL,
    FUNCTION,
    LINEAR,
    MAXPOOL,
    MEAN,
    MUL,
    NORM,
    OUTPUT,
    PASS,
    PLACEHOLDER,
    RELU,
    SHAPE,
    VALUE,
    RewriteError,
    Traced,
    trace,
)
from quantizers.layers import (
    ActQuantizer,
    Concat,
    Origin,
    Product,
    QuantConvBn2d,
    QuantLinearBn,
    Sum,
    WindowGather,
    window_counts,
)
from quantizers.names import act_quantizer, weight_quantizer
from quantizers.spec import QuantSpec
from quantizers.student import Student, assemble


@dataclass
class _Value:
    """A tensor of the new graph: its node, the quantizer whose grid it is on (None: real), and re-quantised copies."""

    node: fx.Node
    quantizer: ActQuantizer | None = None
    lower: dict[int, _Value] = field(default_factory=dict)
    cats: frozenset[fx.Node] = frozenset()
    origin: Origin | None = None
    producer: QuantConvBn2d | QuantLinearBn | None = None


def prepare(model: nn.Module, spec: QuantSpec, example_inputs: Tensor | tuple[Tensor]) -> Student:
    """Return a low-bit student of a float CNN: the same function on grids, weights copied, ready to calibrate.

    Convolutions and linear layers (with the batch norm behind them) become Brevitas layers with low-bit weights.
    Activations become quantizers; the operands of a residual sum share one scale, those of a concatenation one grid.
    ``student.tap_paths`` maps module paths of ``model`` to the student's modules that give the same (dequantised)
    output; a layer whose batch norm is folded in has none of its own. The structure depends on the structure of
    ``model`` and on ``spec`` only, so the state of one student loads strictly into another prepared alike.

    Args:
        model: A network torch.fx can trace, made of torch layers; it is not changed.
        spec: Bits and quantizers.
        example_inputs: Images as the network takes them, float, ``[batch, channels, height, width]`` (or a tuple of one
            such tensor).

    Returns:
        A graph module in training mode if ``model`` is, on the device of ``model``. Call :func:`calibrate` next.

    Raises:
        RewriteError: If a part of the network has no low-bit form (names the layer and the way out), or a pattern of
            ``spec.overrides`` matches no layer.
        TypeError: If ``example_inputs`` is not one tensor.
    """
    if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 1:
        example_inputs = example_inputs[0]
    if not isinstance(example_inputs, Tensor):
        raise TypeError(f"example_inputs must be one image tensor, got {type(example_inputs).__name__}")
    traced = trace(model, example_inputs)
    student = _Writer(traced, spec).write()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return student.to(device).train(model.training)


class _Writer:
    """Walks the float graph in order and writes the student's, asking the plan where a grid is wanted."""

    def __init__(self, traced: Traced, spec: QuantSpec) -> None:
        self.traced, self.spec = traced, spec
        self.plan = Plan(traced, spec)
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.values: dict[fx.Node, _Value] = {}
        self.cat_members: dict[fx.Node, ActQuantizer] = {}

    def write(self) -> Student:
        for node in self.traced.graph.nodes:
            if node.meta["kind"] == OUTPUT:
                self.graph.output(fx.map_arg(node.args[0], lambda n: self.values[n].node))
            elif node in self.plan.folded:
                self.values[node] = self.values[self.plan.norm_host[node]]
            else:
                self.values[node] = self._emit(node)
        return assemble(self.graph, self.modules, tap_paths=self._tap_paths(), spec=self.spec)

    # -- one float node -> new nodes -------------------------------------------------------------------------------

    def _emit(self, node: fx.Node) -> _Value:
        kind = node.meta["kind"]
        emitters = {
            PLACEHOLDER: self._placeholder, CONV: self._layer, LINEAR: self._layer, NORM: self._norm,
            RELU: self._relu, ADD: self._joint, MUL: self._joint, CAT: self._cat, MAXPOOL: self._maxpool,
            AVGPOOL: self._avgpool, ADAPTIVE: self._adaptive, MEAN: self._mean, PASS: self._pass, SHAPE: self._copy,
            FUNCTION: self._function, VALUE: self._copy, FINAL: self._copy,
        }  # fmt: skip
        return emitters[kind](node)

    def _placeholder(self, node: fx.Node) -> _Value:
        new = self.graph.placeholder(node.name)
        new.meta["shape"] = node.meta["shape"]
        return self._settle(node, _Value(new))

    def _layer(self, node: fx.Node) -> _Value:
        original = self.traced.module(node)
        norm_node = self.plan.norm_of.get(node)
        norm = self.traced.module(norm_node) if norm_node is not None else None
        weight_bits, act_bits = self.plan.layer_bits[node]
        return self._compute(norm_node or node, node, original, norm, weight_bits, act_bits)

    def _compute(
        self, root: fx.Node, node: fx.Node, original: Any, norm: Any, weight_bits: int, act_bits: int
    ) -> _Value:
        operand = self._on_grid(_operand(node), act_bits)
        source = operand.quantizer
        if source is None:
            raise RewriteError(f"{self.traced.path(node)}: its input is on no grid")
        method = self.spec.weight_quantizer if weight_bits < 8 else "lsq"
        injector = weight_quantizer(weight_bits, method, per_channel=self.spec.per_channel)
        options: dict[str, Any] = weight_range(weight_bits, source.quant.bits, method)
        if method == "dorefa":
            options["has_norm"] = norm is not None
        kind = QuantConvBn2d if isinstance(original, nn.Conv2d) else QuantLinearBn
        layer = kind(original, norm, injector, **options)
        layer.connect(source=source)
        new = self._call(self.traced.path(node), layer, (operand.node,), root.meta["shape"])
        return self._settle(root, _Value(new, producer=layer))

    def _norm(self, node: fx.Node) -> _Value:
        """A batch norm that follows no layer becomes a depthwise 1x1 convolution of ones with that batch norm."""
        norm = self.traced.module(node)
        if not isinstance(norm, nn.BatchNorm2d):
            raise RewriteError(f"{self.traced.path(node)}: batch norm after no linear layer; put it behind one")
        channels = norm.num_features
        identity = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        nn.init.ones_(identity.weight)
        identity.weight.requires_grad_(norm.weight is None or norm.weight.requires_grad)  # frozen stays frozen, whole
        return self._compute(node, node, identity, norm, 8, self.spec.sum_bits)

    def _relu(self, node: fx.Node) -> _Value:
        operand = self.values[_operand(node)]
        quantizer = operand.quantizer
        is_bounded = quantizer is not None and (self.plan.largest(node) is None or quantizer.quant.largest is not None)
        if quantizer is not None and quantizer.quant.kind == "unsigned" and is_bounded:
            return operand
        bits = self.plan.bits(node)
        if bits is None:
            return _Value(self._copied(node))
        if quantizer is not None:
            operand = _Value(operand.node, origin=Origin("grid", (quantizer,)))
        return self._quantized(self.traced.path(node), node, operand, bits)

    def _joint(self, node: fx.Node) -> _Value:
        kind = node.meta["kind"]
        a, b = (self._on_grid(arg, self.spec.sum_bits, exact=True) for arg in node.args[:2])  # type: ignore[arg-type]
        if a.quantizer is None or b.quantizer is None:
            raise RewriteError(f"{self.traced.path(node)}: an operand is on no grid")
        if kind == ADD:
            b.quantizer.quant.share(a.quantizer.quant)
        module = Sum() if kind == ADD else Product()
        new = self._call(self.traced.path(node), module, (a.node, b.node), node.meta["shape"])
        return self._settle(node, _Value(new, origin=Origin(kind, (a.quantizer, b.quantizer))))

    def _cat(self, node: fx.Node) -> _Value:
        inputs, axis = _cat_arguments(node)
        bits, parts = self.plan.bits(node) or self.spec.sum_bits, []
        for position, source in enumerate(inputs):
            value = self.values[source]
            if value.quantizer is None or node not in value.cats or value.quantizer.quant.bits != bits:
                value = self._joining(node, value, position, bits)
            member = value.quantizer
            if member is None:
                raise RewriteError(f"{self.traced.path(node)}: operand {position} is on no grid")
            first = self.cat_members.setdefault(node, member)
            member.quant.share(first.quant)
            parts.append(value)
        new = self._call(self.traced.path(node), Concat(axis), tuple(p.node for p in parts), node.meta["shape"])
        return _Value(new, self.cat_members[node], cats=parts[0].cats if _all_same(parts) else frozenset())

    def _joining(self, node: fx.Node, value: _Value, position: int, bits: int) -> _Value:
        origin = Origin("grid", (value.quantizer,)) if value.quantizer is not None else value.origin
        source = _Value(value.node, origin=origin, producer=value.producer if value.quantizer is None else None)
        path = f"{self.traced.path(node)}_input{position}"
        return self._quantized(path, node, source, bits, kind=self.plan.kind(node), method="lsq")

    def _maxpool(self, node: fx.Node) -> _Value:
        return self._module_on(node, pool_module(self.traced, node))

    def _module_on(self, node: fx.Node, module: nn.Module) -> _Value:
        operand = self.values[_operand(node)]
        new = self._call(self.traced.path(node), module, (operand.node,), node.meta["shape"])
        return _Value(new, operand.quantizer, cats=operand.cats, origin=operand.origin, producer=operand.producer)

    def _avgpool(self, node: fx.Node) -> _Value:
        module = pool_module(self.traced, node)
        counts = window_counts(module, _operand(node).meta["shape"][2:])  # type: ignore[arg-type]
        return self._mean_of(node, module, counts)

    def _mean(self, node: fx.Node) -> _Value:
        return self._mean_of(node, *spatial_mean(self.traced, node))

    def _adaptive(self, node: fx.Node) -> _Value:
        gather, pool, count = adaptive_pool(_operand(node).meta["shape"][2:], node.meta["shape"][2:])
        if gather is None and pool is None:
            return self.values[_operand(node)]
        if gather is None:
            return self._mean_of(node, pool, count)  # type: ignore[arg-type]
        return self._uneven(node, gather, pool, count)

    def _uneven(self, node: fx.Node, gather: WindowGather, pool: nn.Module | None, count: int) -> _Value:
        operand = self._on_grid(_operand(node), self.spec.sum_bits)
        shape = node.meta["shape"][:2] + (len(gather.rows), len(gather.columns))
        spread = self._call(f"{self.traced.path(node)}_windows", gather, (operand.node,), shape)
        value = _Value(spread, operand.quantizer, cats=operand.cats)
        return value if pool is None else self._mean_of(node, pool, count, value)

    def _mean_of(
        self, node: fx.Node, pool: nn.Module, counts: int | tuple[int, ...], operand: _Value | None = None
    ) -> _Value:
        operand = operand or self._on_grid(_operand(node), self.spec.sum_bits)
        if operand.quantizer is None:
            raise RewriteError(f"{self.traced.path(node)}: what it averages is on no grid")
        new = self._call(self.traced.path(node), pool, (operand.node,), node.meta["shape"])
        return self._settle(node, _Value(new, origin=Origin("mean", (operand.quantizer,), counts)))

    def _pass(self, node: fx.Node) -> _Value:
        module = self.traced.module(node)
        if module is None or type(module) is nn.Identity:
            return self.values[_operand(node)]
        return self._module_on(node, module)

    def _function(self, node: fx.Node) -> _Value:
        operand = self._on_grid(_operand(node), self.spec.sum_bits)
        module = self.traced.module(node)
        if module is not None:
            new = self._call(self.traced.path(node), module, (operand.node,), node.meta["shape"])
        else:
            new = self._copied(node, {_operand(node): operand.node})
        return self._settle(node, _Value(new))

    def _copy(self, node: fx.Node) -> _Value:
        operands = [self.values[n] for n in node.all_input_nodes if n.meta["shape"] is not None]
        source = operands[0] if operands and node.meta["kind"] == SHAPE else None
        new = self._copied(node)
        if source is None:
            return _Value(new)
        return _Value(new, source.quantizer, cats=source.cats, origin=source.origin, producer=source.producer)

    # -- grids -----------------------------------------------------------------------------------------------------

    def _settle(self, node: fx.Node, value: _Value) -> _Value:
        """Put a new real value on the grid its readers want, if they want one."""
        bits = self.plan.bits(node)
        if bits is None:
            return value
        return self._quantized(f"{self.traced.path(node)}_quant", node, value, bits)

    def _quantized(
        self, path: str, node: fx.Node, value: _Value, bits: int, kind: str | None = None, method: str | None = None
    ) -> _Value:
        method = method or self.plan.method(node, bits)
        quantizer = ActQuantizer(
            act_quantizer(bits, method, kind or self.plan.kind(node)), path, largest=self.plan.largest(node)
        )
        quantizer.origin = value.origin
        path = self._free(path)
        quantizer.name = path
        new = self._call(path, quantizer, (value.node,), value.node.meta["shape"])
        if value.producer is not None:
            value.producer.connect(consumers=(*value.producer.consumers, quantizer))
        return _Value(new, quantizer, cats=self.plan.cats(node))

    def _on_grid(self, node: fx.Node, bits: int, *, exact: bool = False) -> _Value:
        """Return the value of ``node`` on a grid of at most ``bits`` bits (of exactly ``bits`` where ``exact``)."""
        value = self.values[node]
        if value.quantizer is None:
            return self._quantized(f"{self.traced.path(node)}_quant", node, value, bits)
        have = value.quantizer.quant.bits
        if have == bits or (have < bits and not exact):
            return value
        if bits not in value.lower:
            source = _Value(value.node, origin=Origin("grid", (value.quantizer,)))
            method = self.spec.act_quantizer if bits < 8 and not exact else "lsq"
            kind = value.quantizer.quant.kind
            path = f"{value.quantizer.name}_to{bits}"
            value.lower[bits] = self._quantized(path, node, source, bits, kind=kind, method=method)
        return value.lower[bits]

    # -- writing ---------------------------------------------------------------------------------------------------

    def _free(self, path: str) -> str:
        candidate, count = path, 0
        while candidate in self.modules:
            count += 1
            candidate = f"{path}_{count}"
        return candidate

    def _call(self, path: str, module: nn.Module, args: tuple[fx.Node, ...], shape: Any) -> fx.Node:
        path = self._free(path)
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010 - a quantizer's output is read by others, too
        self.modules[path] = module
        node = self.graph.call_module(path, args)
        node.meta["shape"] = shape
        return node

    def _copied(self, node: fx.Node, replaced: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
        replaced = replaced or {}
        if node.op == "call_module":
            operands = tuple(replaced.get(n, self.values[n].node) for n in node.all_input_nodes)
            return self._call(self.traced.path(node), self.traced.module(node), operands, node.meta["shape"])  # type: ignore[arg-type]
        new = self.graph.node_copy(node, lambda n: replaced.get(n, self.values[n].node))
        if "inplace" in new.kwargs:
            new.kwargs = {**new.kwargs, "inplace": False}
        new.meta = {"shape": node.meta["shape"]}
        return new

    def _tap_paths(self) -> dict[str, str]:
        taps = {}
        for path, node in self.traced.outputs.items():
            if node in self.plan.norm_of or self.plan.rectifiers(node):
                continue  # its own output does not exist: batch norm is folded, or a ReLU behind it absorbed
            value = self.values.get(node)
            if value is not None and value.node.op == "call_module":
                taps[path] = str(value.node.target)
        return taps


def _operand(node: fx.Node) -> fx.Node:
    return node.args[0] if node.args else node.kwargs["input"]  # type: ignore[return-value]


def _cat_arguments(node: fx.Node) -> tuple[list[fx.Node], int]:
    inputs = node.args[0] if node.args else node.kwargs["tensors"]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return list(inputs), int(axis)  # type: ignore[arg-type]


def _all_same(parts: list[_Value]) -> bool:
    return all(part.cats == parts[0].cats for part in parts)
