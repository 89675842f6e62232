"""Rewrites a canonical graph into a shorter one that computes the same function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx, nn

from quantizers.graph.folding import closes
from quantizers.graph.form.canonical import Affine, Expand, Pad, Permute, Reshape
from quantizers.graph.form.refusal import RewriteError
from quantizers.graph.recording.outcome import Recording
from quantizers.graph.spelling.moves import BATCH, Stack
from quantizers.layers import Concat, Product, Sum


def simplify(recording: Recording) -> None:
    """Simplify a graph in place: remove stacks and identities, join moves and affine maps, recognize activations.

    Raises:
        RewriteError: If a stack joins images of the batch, or a softmax is not last.
    """
    editor = _Editor(recording)
    for node in editor.nodes():
        _lower_stack(editor, node)
    rules: Sequence[Callable[[_Editor, fx.Node], bool]] = (
        _drop_identity, _join_moves, _join_affine, _name_hardsigmoid, _name_gate, _name_hardswish, _broadcast,
        _pad_in_convolution,
    )  # fmt: skip
    changed = True
    while changed:
        changed = False
        for node in editor.nodes():
            if node.op == "call_module" and node.users:
                changed |= any(rule(editor, node) for rule in rules)
        editor.sweep()
    for node in editor.nodes():
        _check_final(editor, node)
    recording.graph.lint()


class _Editor:
    """Edits a graph and its metadata."""

    def __init__(self, recording: Recording) -> None:
        self.graph, self._modules, self._outputs = recording.graph, recording.modules, recording.outputs

    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    def module(self, node: object) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self._modules[str(node.target)]

    def become(self, node: fx.Node, module: nn.Module, *operands: fx.Node) -> bool:
        """Make a node call another module on other operands."""
        self._modules[str(node.target)] = module.eval()
        node.args = operands
        return True

    def give_way(self, node: fx.Node, to: fx.Node) -> bool:
        """Make the readers of a node read another one with the same values."""
        node.replace_all_uses_with(to)
        for path, place in self._outputs.items():
            if place is node:
                self._outputs[path] = to
        return True

    def insert(self, before: fx.Node, suffix: str, module: nn.Module, *operands: fx.Node) -> fx.Node:
        """Insert a node before another one."""
        target, count = f"{before.target}_{suffix}", 0
        while target in self._modules:
            count += 1
            target = f"{before.target}_{suffix}{count}"
        self._modules[target] = module.eval()
        with self.graph.inserting_before(before):
            node = self.graph.call_module(target, operands)
        node.meta.update(before.meta, path=target)
        return node

    def sweep(self) -> None:
        """Remove the nodes that nothing reads."""
        for node in reversed(self.nodes()):
            if node.op == "call_module" and not node.users:
                self.graph.erase_node(node)
                del self._modules[str(node.target)]
                for path in [path for path, place in self._outputs.items() if place is node]:
                    del self._outputs[path]


def _single(node: object) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _lower_stack(editor: _Editor, node: fx.Node) -> None:
    module = editor.module(node)
    if not isinstance(module, Stack):
        return
    if module.axis == 0:
        raise RewriteError(f"{node.meta['path']}: stack has no low-bit form: {BATCH}")
    shape = list(node.meta["shape"])
    shape[module.axis] = 1
    parts = []
    for operand in node.args:
        part = editor.insert(node, "part", Reshape(shape[1:]), operand)  # type: ignore[arg-type]
        part.meta["shape"] = tuple(shape)
        parts.append(part)
    editor.become(node, Concat(module.axis), *parts)


def _drop_identity(editor: _Editor, node: fx.Node) -> bool:
    module = editor.module(node)
    if isinstance(module, (Reshape, Expand)):
        same = node.meta["shape"][1:] == node.args[0].meta["shape"][1:]  # type: ignore[union-attr]
    elif isinstance(module, Permute):
        same = module.order == tuple(range(len(module.order)))
    else:
        same = isinstance(module, Affine) and module.is_identity
    return same and editor.give_way(node, node.args[0])  # type: ignore[arg-type]


def _join_moves(editor: _Editor, node: fx.Node) -> bool:
    module, source = editor.module(node), node.args[0]
    inner = editor.module(source)
    if isinstance(module, Reshape) and isinstance(inner, Reshape):
        return editor.become(node, module, source.args[0])  # type: ignore[union-attr, arg-type]
    if isinstance(module, Permute) and isinstance(inner, Permute):
        order = [inner.order[axis] for axis in module.order]
        return editor.become(node, Permute(order), source.args[0])  # type: ignore[union-attr, arg-type]
    return False


def _join_affine(editor: _Editor, node: fx.Node) -> bool:
    module, source = editor.module(node), node.args[0]
    inner = editor.module(source)
    if not isinstance(module, Affine) or not isinstance(inner, Affine) or not _single(source):
        return False
    if (closes(module) and any(inner.learned)) or (closes(inner) and module.learned[0]):
        return False  # learned factors and offsets must not open what a mask closes
    scale = inner.scale.detach() * module.scale.detach()
    shift = inner.shift.detach() * module.scale.detach() + module.shift.detach()
    moves_shift = module.learned[0] and bool((inner.shift != 0).any())
    learned = (
        inner.learned[0] or module.learned[0],
        inner.learned[1] or module.learned[1] or moves_shift,
    )
    return editor.become(node, Affine(scale, shift, learned=learned), source.args[0])  # type: ignore[union-attr, arg-type]


# -- activations that are written out ----------------------------------------------------------------------------------


def _is_affine(module: nn.Module | None, scale: float, shift: float) -> bool:
    return (
        isinstance(module, Affine)
        and not any(module.learned)
        and bool(torch.allclose(module.scale, torch.full_like(module.scale, scale)))
        and bool(torch.allclose(module.shift, torch.full_like(module.shift, shift)))
    )


def _is_relu6(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0, 6)


def _ramp_of(editor: _Editor, node: object) -> fx.Node | None:
    """Return x if a node is relu6(x + 3) with a single reader."""
    if not _is_relu6(editor.module(node)) or not _single(node):
        return None
    inner = node.args[0]  # type: ignore[attr-defined]
    found = _is_affine(editor.module(inner), 1.0, 3.0) and _single(inner)
    return inner.args[0] if found else None


def _name_hardsigmoid(editor: _Editor, node: fx.Node) -> bool:
    if not _is_affine(editor.module(node), 1 / 6, 0.0):
        return False
    source = _ramp_of(editor, node.args[0])
    return source is not None and editor.become(node, nn.Hardsigmoid(), source)


def _name_hardswish(editor: _Editor, node: fx.Node) -> bool:
    product = node.args[0]
    if not _is_affine(editor.module(node), 1 / 6, 0.0) or not isinstance(editor.module(product), Product):
        return False
    if not _single(product):
        return False
    for value, gate in _orders(product.args):  # type: ignore[union-attr]
        if _ramp_of(editor, gate) is value:
            return editor.become(node, nn.Hardswish(), value)
    return False


def _name_gate(editor: _Editor, node: fx.Node) -> bool:
    """Name ``x * gate(x)``: SiLU, Hardswish, Mish."""
    if not isinstance(editor.module(node), Product):
        return False
    for value, gate in _orders(node.args):
        made = _gated(editor, value, gate)
        if made is not None:
            return editor.become(node, made, value)
    return False


def _orders(args: Sequence[object]) -> list[tuple[fx.Node, fx.Node]]:
    return [(args[0], args[1]), (args[1], args[0])]  # type: ignore[list-item]


def _gated(editor: _Editor, value: fx.Node, gate: fx.Node) -> nn.Module | None:
    module = editor.module(gate)
    if not _single(gate) or value is gate:
        return None
    if isinstance(module, (nn.Sigmoid, nn.Hardsigmoid)) and gate.args[0] is value:
        return nn.SiLU() if isinstance(module, nn.Sigmoid) else nn.Hardswish()
    inner = gate.args[0] if gate.args else None
    soft = editor.module(inner)
    is_mish = (
        isinstance(module, nn.Tanh) and isinstance(soft, nn.Softplus) and soft.beta == 1 and _single(inner)
        and inner.args[0] is value  # type: ignore[union-attr]
    )  # fmt: skip
    return nn.Mish() if is_mish else None


# -- moves that a neighboring module can do ----------------------------------------------------------------------------


def _broadcast(editor: _Editor, node: fx.Node) -> bool:
    """Make sums and products broadcast implicitly."""
    if not isinstance(editor.module(node), (Sum, Product)):
        return False
    sources = [operand.args[0] if isinstance(editor.module(operand), Expand) else operand for operand in node.args]  # type: ignore[union-attr]
    if sources == list(node.args):
        return False
    for kept in ([True, True], [True, False], [False, True]):
        chosen = [s if k else a for s, k, a in zip(sources, kept, node.args, strict=True)]
        shape = torch.broadcast_shapes(*(n.meta["shape"][1:] for n in chosen))  # type: ignore[union-attr, no-untyped-call]
        if chosen != list(node.args) and tuple(shape) == node.meta["shape"][1:]:
            return editor.become(node, editor.module(node), *chosen)  # type: ignore[arg-type]
    return False


def _pad_in_convolution(editor: _Editor, node: fx.Node) -> bool:
    """Fold even padding into a convolution."""
    conv, source = editor.module(node), node.args[0]
    module = editor.module(source)
    if not isinstance(conv, nn.Conv2d) or not isinstance(module, Pad) or conv.padding == "same":
        return False
    if module.before != module.after or any(module.before[:2]):
        return False
    own = (0, 0) if isinstance(conv.padding, str) else conv.padding
    wide = tuple(a + b for a, b in zip(own, module.before[2:], strict=True))
    made = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, wide, conv.dilation, conv.groups,  # type: ignore[arg-type]
        bias=conv.bias is not None, device="meta",
    )  # fmt: skip
    made.weight, made.bias = conv.weight, conv.bias
    made._buffers.update(conv._buffers)  # a mask
    return editor.become(node, made, source.args[0])  # type: ignore[union-attr, arg-type]


def _check_final(editor: _Editor, node: fx.Node) -> None:
    if isinstance(editor.module(node), (nn.Softmax, nn.LogSoftmax)) and any(user.op != "output" for user in node.users):
        raise RewriteError(
            f"{node.meta['path']}: {type(editor.module(node)).__name__} is not last, and inside a network it has no "
            "low-bit form. Replace it in the float network (with a sigmoid), or pass the part of the network without it"
        )
