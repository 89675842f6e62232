"""Joins what a network computes in eval() and in train(), which must be the same function except for drop-out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quantizers.graph.form.kinds import PASS, kind_of
from quantizers.graph.form.refusal import RewriteError
from quantizers.graph.recording.outcome import Recording
from quantizers.graph.spelling.layers import fixed_norm
from quantizers.graph.spelling.moves import Stack
from quantizers.graph.spelling.pen import Refused

WAY_OUT = "make forward compute the same in both modes, or give prepare the part of the network that does"


def live_nodes(graph: fx.Graph, result: Any) -> list[fx.Node]:
    """Return the nodes that a structure of nodes depends on, in order."""
    wanted = {node for node in pytree.tree_leaves(result) if isinstance(node, fx.Node)}
    live = []
    for node in reversed(list(graph.nodes)):
        if node in wanted and node.op != "output":
            live.append(node)
            wanted.update(node.all_input_nodes)
    return live[::-1]


def output_of(graph: fx.Graph) -> Any:
    """Return the structure of nodes that a graph returns."""
    return next(node for node in graph.nodes if node.op == "output").args[0]


def joined(evaluated: Recording, trained: Recording) -> Recording:
    """Return the graph of eval mode with the drop-out of training mode added.

    Additional outputs of training mode (auxiliary heads) are dropped: the student has the outputs of eval mode.

    Args:
        evaluated: The network in eval mode.
        trained: The network in training mode, on another number of images.

    Raises:
        RewriteError: If the modes, or the numbers of images, lead to different functions (names the first node).
    """
    wanted = output_of(evaluated.graph)
    if any(leaf is None for leaf in pytree.tree_leaves(wanted)):
        raise RewriteError("output: holds None in eval(), which a file cannot store; return only tensors")
    problems = []
    for candidate in _candidates(wanted, output_of(trained.graph)):
        match = _Match(evaluated, trained)
        problem = match.compare(wanted, candidate)
        if problem is None:
            return match.write(wanted, candidate)
        problems.append(problem)
    raise RewriteError(problems[0] if problems else f"output: train() returns another structure than eval(); {WAY_OUT}")


def _candidates(wanted: Any, given: Any) -> list[Any]:
    """Return the parts of what training mode returns that may be what eval mode returns."""
    found = [given] if _leaves(wanted) == _leaves(given) else []
    if isinstance(given, dict) and isinstance(wanted, dict) and set(wanted) <= set(given):
        found.append({key: given[key] for key in wanted})
    items = given.values() if isinstance(given, dict) else given if isinstance(given, (tuple, list)) else ()
    return found + [item for item in items if _leaves(item) == _leaves(wanted) and item is not None]


def _leaves(structure: Any) -> int:
    return sum(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(structure))


class _Match:
    """Walks both graphs side by side."""

    def __init__(self, evaluated: Recording, trained: Recording) -> None:
        self.evaluated, self.trained = evaluated, trained
        self.twin: dict[fx.Node, fx.Node] = {}  # node of training mode -> the one of eval mode with its value

    def compare(self, wanted: Any, candidate: Any) -> str | None:
        """Return the first difference, or None."""
        left = live_nodes(self.evaluated.graph, wanted)
        right = live_nodes(self.trained.graph, candidate)
        refused = next((n.meta["refused"] for n in (*left, *right) if "refused" in n.meta), None)
        if refused:
            raise RewriteError(refused)
        expected = iter(left)
        for node in right:
            if self._is_pass(node):
                self.twin[node] = self.twin[node.all_input_nodes[0]]
                continue
            other = next(expected, None)
            if other is None or not self._same(other, node):
                return self._difference(node, other, node)
            self.twin[node] = other
        rest = next(expected, None)
        if rest is not None:
            return self._difference(rest, rest, None)
        ends = zip(pytree.tree_leaves(wanted), pytree.tree_leaves(candidate), strict=True)
        if any(isinstance(a, fx.Node) and self.twin.get(b) is not a for a, b in ends):
            return f"output: train() returns other values than eval(); {WAY_OUT}"
        return None

    def _is_pass(self, node: fx.Node) -> bool:
        module = self.trained.modules.get(str(node.target))
        return module is not None and not isinstance(module, (Stack, Refused)) and kind_of(module) == PASS

    def _same(self, left: fx.Node, right: fx.Node) -> bool:
        if left.op != right.op or [self.twin.get(n) for n in right.args] != list(left.args):  # type: ignore[arg-type]
            return False
        if left.meta["shape"][1:] != right.meta["shape"][1:]:
            return False
        return left.op != "call_module" or same_module(
            self.evaluated.modules[str(left.target)], self.trained.modules[str(right.target)]
        )

    def _difference(self, node: fx.Node, left: fx.Node | None, right: fx.Node | None) -> str:
        site = f" ({node.meta['site']})" if node.meta.get("site") else ""
        names = self._name(right, self.trained), self._name(left, self.evaluated)
        if names[0] == names[1]:
            return (
                f"{node.meta['path']}{site}: train() on a batch of another size computes with other values or settings "
                f"than eval() from here on ({names[0]}), or the network changes them as it runs; {WAY_OUT}"
            )
        return (
            f"{node.meta['path']}{site}: train() on a batch of another size computes something other than eval() from "
            f"here on ({names[0]} instead of {names[1]}); {WAY_OUT}"
        )

    def _name(self, node: fx.Node | None, recording: Recording) -> str:
        if node is None:
            return "nothing"
        return type(recording.modules[str(node.target)]).__name__ if node.op == "call_module" else str(node.op)

    def write(self, wanted: Any, candidate: Any) -> Recording:
        """Return the joined graph, with the modules of eval mode."""
        graph, modules, new = fx.Graph(), dict[str, nn.Module](), dict[fx.Node, fx.Node]()
        for node in live_nodes(self.trained.graph, candidate):
            source, recording = (node, self.trained) if self._is_pass(node) else (self.twin[node], self.evaluated)
            if source.op == "placeholder":
                new[node] = graph.placeholder(str(source.target))
            else:
                module = recording.modules[str(source.target)]
                if node.meta.get("is_fixed") and isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module = fixed_norm(module)
                target = _free(str(source.target), modules)
                modules[target] = module
                args = tuple(new[n] for n in node.args)  # type: ignore[index]
                new[node] = graph.create_node("call_module", target, args, name=source.name)
            new[node].meta.update(source.meta)
        structure = pytree.tree_map_only(fx.Node, lambda n: new[n], candidate)
        end = graph.output(_like(wanted, structure))
        end.meta.update(path="output", shape=None, site="")
        return Recording(graph, modules, self._outputs(new), self.evaluated.result)

    def _outputs(self, new: dict[fx.Node, fx.Node]) -> dict[str, fx.Node]:
        """Return the nodes of the outputs of the network's modules in the joined graph."""
        made = {self.twin[node]: new[node] for node in new if not self._is_pass(node)}
        outputs = {path: made[node] for path, node in self.evaluated.outputs.items() if node in made}
        passing = {
            path: new[node] for path, node in self.trained.outputs.items() if node in new and self._is_pass(node)
        }
        return {**outputs, **passing}


def _like(wanted: Any, structure: Any) -> Any:
    """Return the nodes of one structure in the form of another."""
    leaves = [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, fx.Node)]
    return pytree.tree_map_only(fx.Node, lambda _n: leaves.pop(0), wanted)


def _free(target: str, modules: dict[str, nn.Module]) -> str:
    candidate, count = target, 0
    while candidate in modules:
        count += 1
        candidate = f"{target}_{count}"
    return candidate


def same_module(left: nn.Module, right: nn.Module) -> bool:
    """Return whether two canonical modules are the same except for the values of their weights."""
    if type(left) is not type(right):
        return False
    own, other = _settings(left), _settings(right)
    if own.keys() != other.keys():
        return False
    return all(_equal(own[key], other[key]) for key in own)


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = {key: value for key, value in module.__dict__.items() if not key.startswith("_") and key != "training"}
    tensors = {key: tuple(value.shape) for key, value in module._parameters.items() if value is not None}
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        plain.update({key: value for key, value in module._buffers.items() if value is not None})
    return {**plain, **tensors}


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and bool(torch.allclose(left.double(), right.double(), rtol=1e-4, atol=1e-6))
    return bool(left == right)
