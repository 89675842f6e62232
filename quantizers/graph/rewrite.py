"""Turns a float network into a trainable low-bit student: plans the grids, then writes the new graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantizers.graph.folding import affine_layer, folded, image_norm
from quantizers.graph.form.canonical import Reshape
from quantizers.graph.form.kinds import (
    ADAPTIVE,
    ADD,
    AFFINE,
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
)
from quantizers.graph.form.origins import Origin, function_origin, window_counts
from quantizers.graph.form.pooling import adaptive_pool
from quantizers.graph.names import safe_path
from quantizers.graph.plan import Plan, weight_range
from quantizers.graph.trace import RewriteError, Traced, trace
from quantizers.graph.verify import verify_student
from quantizers.layers import (
    ActQuantizer,
    QuantConvBn2d,
    QuantLinearBn,
    WindowGather,
)
from quantizers.names import act_quantizer, weight_quantizer
from quantizers.spec import QuantSpec
from quantizers.student import Student, assemble, require_float, warn_of_computed, warn_of_frozen


@dataclass
class _Value:
    """A tensor of the new graph: its node, the quantizer whose grid it is on (None if real), and requantized copies."""

    node: fx.Node
    quantizer: ActQuantizer | None = None
    lower: dict[int, _Value] = field(default_factory=dict)
    cats: frozenset[fx.Node] = frozenset()
    origin: Origin | None = None
    producer: QuantConvBn2d | QuantLinearBn | None = None
    is_rectified: bool = False  # already after a ReLU that the float net has further down


def prepare(
    model: nn.Module, spec: QuantSpec, example_inputs: Tensor | tuple[Tensor], *, verify: bool = True
) -> Student:
    """Return a low-bit student of a float CNN: the same function on grids, weights copied, ready to calibrate.

    Convolutions and linear layers (with the batch norm after them) become Brevitas layers with low-bit weights.
    Activations become quantizers. The operands of a residual sum share one scale, those of a concatenation one grid.
    ``student.tap_paths`` maps module paths of ``model`` to the student's modules that give the same (dequantized)
    output (none for a layer whose batch norm is folded in). Frozen parameters stay frozen. The structure depends only
    on ``model`` and ``spec``, so the state of one student loads strictly into another prepared the same way. The
    network runs a few times: a random decision or a state change is detected if it makes two of these passes differ.

    Args:
        model: A network of torch operations, possibly inside ``DataParallel`` or ``torch.compile``; not changed.
        spec: Bits and quantizers.
        example_inputs: Images as the network takes them, float, ``[batch, channels, height, width]``, at least one (or
            a tuple of one such tensor). All sizes except the batch are fixed from here on.
        verify: Whether to compare the student without its quantizers with ``model`` (:mod:`quantizers.graph.verify`).

    Returns:
        A graph module in training mode if ``model`` is, on the device of ``model``. Call :func:`calibrate` next.

    Raises:
        RewriteError: If a part of the network has no low-bit form (names the layer and a workaround), or a pattern of
            ``spec.overrides`` matches no layer, or the student computes another function than the network.
        TypeError: If ``example_inputs`` is not a single tensor, ``model`` is not a float network, or ``spec`` is not a
            ``QuantSpec``.
    """
    require_float(model, spec)
    if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 1:
        example_inputs = example_inputs[0]
    if not isinstance(example_inputs, Tensor):
        raise TypeError(f"example_inputs must be one image tensor, got {type(example_inputs).__name__}")
    warn_of_frozen(model)
    traced = trace(model, example_inputs, verify=verify)
    warn_of_computed(traced.computed)
    writer = _Writer(traced, spec)
    student = writer.write()
    if verify:
        verify_student(traced, student, writer.pairs, example_inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return student.to(device).train(model.training)


class _Writer:
    """Walks the float graph in order and writes the student's, asking the plan where a grid is needed."""

    def __init__(self, traced: Traced, spec: QuantSpec) -> None:
        self.traced, self.spec = traced, spec
        self.plan = Plan(traced, spec)
        self.graph = fx.Graph()
        self.graph.erase_node(self.graph.placeholder("self"))  # no module's value may be called that in forward
        self.modules: dict[str, nn.Module] = {}
        self.values: dict[fx.Node, _Value] = {}
        self.cat_members: dict[fx.Node, ActQuantizer] = {}
        self.pairs: list[tuple[fx.Node, str]] = []  # float node, name of the student's node with the same value
        self.absorbed: list[tuple[fx.Node, ActQuantizer]] = []  # a ReLU, the quantizer that replaces it

    def write(self) -> Student:
        for node in self.traced.graph.nodes:
            if node.meta["kind"] == OUTPUT:
                self.graph.output(fx.map_arg(node.args[0], lambda n: self.values[n].node))
            elif node in self.plan.folded:
                self.values[node] = self.values[self.plan.host[node]]
            else:
                self.values[node] = self._emit(node)
        for node, value in self.values.items():
            if not value.is_rectified and not self.plan.is_absorbed(node):
                self.pairs.append((node, value.node.name))
        self._check_rectifiers()
        self._bound_joint_grids()
        shape = next(tuple(n.meta["shape"][1:]) for n in self.traced.graph.nodes if n.op == "placeholder")
        taps = self._tap_paths()
        return assemble(self.graph, self.modules, tap_paths=taps, spec=self.spec, image_shape=shape)

    # -- one float node -> new nodes -------------------------------------------------------------------------------

    def _emit(self, node: fx.Node) -> _Value:
        kind = node.meta["kind"]
        emitters = {
            PLACEHOLDER: self._placeholder, CONV: self._layer, LINEAR: self._layer, NORM: self._norm,
            AFFINE: self._affine, RELU: self._relu, ADD: self._joint, MUL: self._joint, CAT: self._cat,
            MAXPOOL: self._module_on, AVGPOOL: self._avgpool, ADAPTIVE: self._adaptive, MEAN: self._mean,
            PASS: self._module_on, SHAPE: self._module_on, FUNCTION: self._function, FINAL: self._module_on,
        }  # fmt: skip
        return emitters[kind](node)

    def _placeholder(self, node: fx.Node) -> _Value:
        new = self.graph.placeholder(node.name)
        new.meta["shape"] = node.meta["shape"]
        return self._settle(node, _Value(new))

    def _layer(self, node: fx.Node) -> _Value:
        extras = [self.traced.module(extra) for extra in self.plan.folds.get(node, [])]
        layer, norm = folded(self.traced.module(node), extras)  # type: ignore[arg-type]
        weight_bits, act_bits = self.plan.layer_bits[node]
        return self._compute(self.plan.root(node), node, layer, norm, weight_bits, act_bits)

    def _compute(
        self, root: fx.Node, node: fx.Node, original: Any, norm: Any, weight_bits: int, act_bits: int
    ) -> _Value:
        operand = self._on_grid(node.args[0], act_bits)  # type: ignore[arg-type]
        layer = self._quant_layer(self.traced.path(node), original, norm, operand.quantizer, weight_bits)
        new = self._call(self.traced.path(node), layer, (operand.node,), root.meta["shape"])
        return self._settle(root, _Value(new, producer=layer))

    def _quant_layer(
        self, path: str, original: Any, norm: Any, source: ActQuantizer | None, weight_bits: int
    ) -> QuantConvBn2d | QuantLinearBn:
        if source is None:
            raise RewriteError(f"{path}: its input is not on a grid")
        method = self.spec.weight_quantizer if weight_bits < 8 else "lsq"
        injector = weight_quantizer(weight_bits, method, per_channel=self.spec.per_channel)
        options: dict[str, Any] = weight_range(weight_bits, source.quant.bits, method)
        if method == "dorefa":
            options["has_norm"] = norm is not None
        kind = QuantConvBn2d if isinstance(original, nn.Conv2d) else QuantLinearBn
        layer = kind(original, norm, injector, **options)
        layer.name = path
        layer.connect(source=source)
        return layer

    def _norm(self, node: fx.Node) -> _Value:
        """Write a batch norm that follows no layer as a depthwise 1x1 convolution of ones with that batch norm."""
        norm = image_norm(self.traced.module(node))  # type: ignore[arg-type]
        identity = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features, bias=False)
        nn.init.ones_(identity.weight)
        identity.weight.requires_grad_(norm.weight is None or norm.weight.requires_grad)  # all of it stays frozen
        return self._channelwise(node, identity, norm)

    def _affine(self, node: fx.Node) -> _Value:
        """Write an affine map that cannot be folded into a layer as a depthwise 1x1 convolution, too."""
        affine = self.traced.module(node)
        return self._channelwise(node, affine_layer(affine, node.meta["shape"][1]), None)  # type: ignore[arg-type]

    def _channelwise(self, node: fx.Node, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> _Value:
        """Write an 8-bit depthwise 1x1 convolution, between reshapes if the tensor is not an image."""
        shape = node.meta["shape"]
        if len(shape) == 4:
            return self._compute(node, node, conv, norm, 8, self.spec.sum_bits)
        path = self.traced.path(node)
        operand = self._on_grid(node.args[0], self.spec.sum_bits)  # type: ignore[arg-type]
        image = (shape[0], shape[1], math.prod(shape[2:]), 1)
        spread = self._call(f"{path}_image", Reshape(image[1:]), (operand.node,), image)
        layer = self._quant_layer(path, conv, norm, operand.quantizer, 8)
        result = self._call(path, layer, (spread,), image)
        back = self._call(f"{path}_back", Reshape(shape[1:]), (result,), shape)
        return self._settle(node, _Value(back, producer=layer))

    def _relu(self, node: fx.Node) -> _Value:
        operand = self.values[node.args[0]]  # type: ignore[index]
        quantizer, bound = operand.quantizer, self.plan.bound(node)
        if quantizer is not None and quantizer.quant.kind == "unsigned" and _is_within(quantizer, bound):
            self.absorbed.append((node, quantizer))
            return replace(operand, is_rectified=False)
        bits = self.plan.bits(node)
        if bits is None:
            return self._module_on(node)
        if quantizer is not None:
            operand = _Value(operand.node, origin=Origin("grid", (quantizer,)))
        value = self._quantized(self.traced.path(node), node, operand, bits)
        self.absorbed.append((node, value.quantizer))  # type: ignore[arg-type]
        return value

    def _check_rectifiers(self) -> None:
        """Raise if a ReLU was absorbed by a grid that is not unsigned, which would let negative values pass."""
        for node, quantizer in self.absorbed:
            if quantizer.quant.kind != "unsigned":
                raise RewriteError(
                    f"{self.traced.path(node)}: its grid {quantizer.name} is {quantizer.quant.kind}, so it would "
                    "disappear. Please report it"
                )

    def _bound_joint_grids(self) -> None:
        """Add clips where grids of one step have different upper bounds, since the step fits the widest."""
        members: dict[nn.Module, list[fx.Node]] = {}
        for node in list(self.graph.nodes):
            module = self.modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, ActQuantizer):
                members.setdefault(module.quant.owner, []).append(node)
        for nodes in members.values():
            quants: list[Any] = [self.modules[str(node.target)].quant for node in nodes]
            if len({quant.largest for quant in quants}) > 1:
                for node, quant in zip(nodes, quants, strict=True):
                    if quant.largest is not None:
                        self._clip(node, quant)

    def _clip(self, node: fx.Node, quant: Any) -> None:
        bound, quant.largest = quant.largest, None
        clip = nn.ReLU6() if bound == 6 else nn.Hardtanh(0.0, bound)
        with self.graph.inserting_before(node):
            new = self._call(f"{node.target}_clip", clip, node.args, node.meta["shape"])  # type: ignore[arg-type]
        node.args = (new,)

    def _joint(self, node: fx.Node) -> _Value:
        kind = node.meta["kind"]
        a, b = (self._on_grid(arg, self.spec.sum_bits, exact=True) for arg in node.args)  # type: ignore[arg-type]
        if a.quantizer is None or b.quantizer is None:
            raise RewriteError(f"{self.traced.path(node)}: an operand is not on a grid")
        if kind == ADD:
            a, b = self._on_one_step(node, a, b)
        module = self.traced.module(node)
        new = self._call(self.traced.path(node), module, (a.node, b.node), node.meta["shape"])
        origin = Origin(kind, (a.quantizer, b.quantizer))  # type: ignore[arg-type] # both on grids
        return self._settle(node, _Value(new, origin=origin))

    def _on_one_step(self, node: fx.Node, a: _Value, b: _Value) -> tuple[_Value, _Value]:
        """Return the operands of a sum on one step: themselves, or the smaller one's copy (see _averages_itself)."""
        if a.quantizer is None or b.quantizer is None:
            raise RewriteError(f"{self.traced.path(node)}: an operand is not on a grid")
        if self._averages_itself(a.quantizer, b.quantizer):
            if math.prod(a.node.meta["shape"]) < math.prod(b.node.meta["shape"]):
                a = self._joining(node, a, 0, self.spec.sum_bits, kind=a.quantizer.quant.kind)
            else:
                b = self._joining(node, b, 1, self.spec.sum_bits, kind=b.quantizer.quant.kind)
        b.quantizer.quant.share(a.quantizer.quant)  # type: ignore[union-attr]
        return a, b

    def _averages_itself(self, a: ActQuantizer, b: ActQuantizer) -> bool:
        """Return whether a mean would have the step of its operand if two quantizers shared theirs.

        The ties of a mean of an even number of values would then be integers, which no change of the step can move.
        """
        owners = (a.quant.owner, b.quant.owner)
        means = [m for m in self.modules.values() if isinstance(m, ActQuantizer) and m.origin and m.origin.is_even_mean]
        return any(
            mean.quant.owner in owners and mean.origin.sources[0].quant.owner in owners  # type: ignore[union-attr]
            for mean in means
        )

    def _cat(self, node: fx.Node) -> _Value:
        bits, parts = self.plan.bits(node) or self.spec.sum_bits, []
        for position, source in enumerate(node.args):
            value = self.values[source]  # type: ignore[index]
            if value.quantizer is None or not self._joins(node, value, bits):
                value = self._joining(node, value, position, bits, kind=self.plan.kind(node))
            member = value.quantizer
            if member is None:
                raise RewriteError(f"{self.traced.path(node)}: operand {position} is not on a grid")
            first = self.cat_members.setdefault(node, member)
            member.quant.share(first.quant)
            parts.append(value)
        operands = tuple(part.node for part in parts)
        new = self._call(self.traced.path(node), self.traced.module(node), operands, node.meta["shape"])
        cats = {part.cats for part in parts}
        return _Value(new, self.cat_members[node], cats=cats.pop() if len(cats) == 1 else frozenset())

    def _joins(self, node: fx.Node, value: _Value, bits: int) -> bool:
        """Return whether a value on a grid can be on the grid of a concatenation directly."""
        quantizer, first = value.quantizer, self.cat_members.get(node, value.quantizer)
        if quantizer is None or first is None or node not in value.cats or quantizer.quant.bits != bits:
            return False
        return not self._averages_itself(first, quantizer)

    def _joining(self, node: fx.Node, value: _Value, position: int, bits: int, *, kind: str) -> _Value:
        """Return an operand on a new grid, to be shared with the others."""
        path = f"{self.traced.path(node)}_input{position}"
        return self._quantized(path, node, _real(value, value.node), bits, kind=kind, method="lsq")

    def _module_on(self, node: fx.Node) -> _Value:
        """Write a module that moves or selects values: the result is on the grid of the operand, if there is one."""
        operand = self.values[node.args[0]]  # type: ignore[index]
        new = self._call(self.traced.path(node), self.traced.module(node), (operand.node,), node.meta["shape"])
        if node.meta["kind"] in (RELU, FINAL):
            return _real(operand, new)
        return replace(operand, node=new, lower={})

    def _avgpool(self, node: fx.Node) -> _Value:
        module: Any = self.traced.module(node)
        return self._mean_of(node, module, window_counts(module, node.args[0].meta["shape"][2:]))  # type: ignore[union-attr]

    def _mean(self, node: fx.Node) -> _Value:
        shape = node.args[0].meta["shape"]  # type: ignore[union-attr]
        return self._mean_of(node, self.traced.module(node), shape[2] * shape[3])

    def _adaptive(self, node: fx.Node) -> _Value:
        gather, pool, count = adaptive_pool(node.args[0].meta["shape"][2:], node.meta["shape"][2:])  # type: ignore[union-attr]
        if gather is None and pool is None:
            return self.values[node.args[0]]  # type: ignore[index]
        if gather is None:
            return self._mean_of(node, pool, count)
        return self._uneven(node, gather, pool, count)

    def _uneven(self, node: fx.Node, gather: WindowGather, pool: nn.Module | None, count: int) -> _Value:
        operand = self._on_grid(node.args[0], self.spec.sum_bits)  # type: ignore[arg-type]
        shape = node.meta["shape"][:2] + (len(gather.rows), len(gather.columns))
        spread = self._call(f"{self.traced.path(node)}_windows", gather, (operand.node,), shape)
        value = _Value(spread, operand.quantizer, cats=operand.cats)
        return value if pool is None else self._mean_of(node, pool, count, value)

    def _mean_of(
        self, node: fx.Node, pool: nn.Module | None, counts: int | tuple[int, ...], operand: _Value | None = None
    ) -> _Value:
        operand = operand or self._on_grid(node.args[0], self.spec.sum_bits)  # type: ignore[arg-type]
        if operand.quantizer is None:
            raise RewriteError(f"{self.traced.path(node)}: its input is not on a grid")
        new = self._call(self.traced.path(node), pool, (operand.node,), node.meta["shape"])
        return self._settle(node, _Value(new, origin=Origin("mean", (operand.quantizer,), counts)))

    def _function(self, node: fx.Node) -> _Value:
        operand = self._on_grid(node.args[0], self.spec.sum_bits)  # type: ignore[arg-type]
        module = self.traced.module(node)
        new = self._call(self.traced.path(node), module, (operand.node,), node.meta["shape"])
        return self._settle(node, _Value(new, origin=function_origin(operand.quantizer, module)))

    # -- grids -----------------------------------------------------------------------------------------------------

    def _settle(self, node: fx.Node, value: _Value) -> _Value:
        """Put a new real value on the grid its readers need, if they need one."""
        bits = self.plan.bits(node)
        if bits is None:
            return value
        return self._quantized(f"{self.traced.path(node)}_quant", node, value, bits)

    def _quantized(
        self, path: str, node: fx.Node, value: _Value, bits: int, kind: str | None = None, method: str | None = None
    ) -> _Value:
        path, method = self._free(path), method or self.plan.method(node, bits)
        quantizer = ActQuantizer(
            act_quantizer(bits, method, kind or self.plan.kind(node)), path, largest=self.plan.largest(node)
        )
        quantizer.origin = value.origin
        new = self._call(path, quantizer, (value.node,), value.node.meta["shape"])
        if value.producer is not None:
            value.producer.connect(consumers=(*value.producer.consumers, quantizer))
        is_rectified = bool(self.plan.rectifiers(node)) or value.is_rectified
        return _Value(new, quantizer, cats=self.plan.cats(node), is_rectified=is_rectified)

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
        path = safe_path(path)
        candidate, count = path, 0
        while candidate in self.modules:
            count += 1
            candidate = f"{path}_{count}"
        return candidate

    def _call(self, path: str, module: nn.Module | None, args: tuple[fx.Node, ...], shape: Any) -> fx.Node:
        if module is None:
            raise RewriteError(f"{path}: does not call a module. Please report it")
        path = self._free(path)
        self.modules[path] = module
        node = self.graph.call_module(path, args)
        node.meta["shape"] = shape
        return node

    def _tap_paths(self) -> dict[str, str]:
        taps = {}
        for path, node in self.traced.outputs.items():
            value = self.values.get(node)
            if value is None or value.is_rectified or self.plan.is_absorbed(node):
                continue  # its own output does not exist: more is folded in, or a ReLU behind it is absorbed
            if value.node.op == "call_module":
                taps[path] = str(value.node.target)
        return taps


def _real(value: _Value, node: fx.Node) -> _Value:
    """Return a node without a grid that, except for clips, has the value of another, with what is known of its sums.

    A clip changes which values reach a quantizer, not where its rounding ties are.
    """
    if value.quantizer is not None:
        return _Value(node, origin=Origin("grid", (value.quantizer,)))
    return _Value(node, origin=value.origin, producer=value.producer)


def _is_within(quantizer: ActQuantizer, bound: float | None) -> bool:
    """Return whether a grid ends where a ReLU does."""
    return bound is None or (quantizer.quant.largest is not None and quantizer.quant.largest <= bound)
