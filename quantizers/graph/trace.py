"""Reads a float network as a torch.fx graph whose every node has a known kind, shape and module scope."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from quantizers.functions import FUNCTIONS
from quantizers.graph.canonical import Expand, Gather, Pad, Permute, Reshape, Slice

CONV, LINEAR, NORM, RELU, ADD, MUL, CAT = "conv", "linear", "norm", "relu", "add", "mul", "cat"
MAXPOOL, AVGPOOL, ADAPTIVE, MEAN, PASS, SHAPE, FUNCTION = (
    "maxpool", "avgpool", "adaptive", "mean", "pass", "shape", "function",
)  # fmt: skip
PLACEHOLDER, OUTPUT, VALUE, FINAL = "placeholder", "output", "value", "final"

PRESERVING = (MAXPOOL, PASS, SHAPE)  # move or select values: the result is on the grid of the operand
COMPUTE = (CONV, LINEAR)


class RewriteError(ValueError):
    """A network that cannot become a low-bit student; the message names the layer and the way out."""


MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: CONV, nn.Linear: LINEAR, nn.BatchNorm2d: NORM, nn.BatchNorm1d: NORM, nn.ReLU: RELU, nn.ReLU6: RELU,
    nn.MaxPool2d: MAXPOOL, nn.AvgPool2d: AVGPOOL, nn.AdaptiveAvgPool2d: ADAPTIVE, nn.Identity: PASS,
    nn.Dropout: PASS, nn.Dropout2d: PASS, nn.Flatten: SHAPE, nn.Softmax: FINAL, nn.LogSoftmax: FINAL,
    Reshape: SHAPE, Permute: SHAPE, Slice: SHAPE, Gather: SHAPE, Pad: SHAPE, Expand: SHAPE,
    **{known: FUNCTION for known in FUNCTIONS if known not in (nn.ReLU, nn.ReLU6)},
}  # fmt: skip

FUNCTION_KINDS: dict[Any, str] = {
    operator.add: ADD, operator.iadd: ADD, torch.add: ADD, operator.mul: MUL, operator.imul: MUL, torch.mul: MUL,
    torch.cat: CAT, torch.concat: CAT, F.relu: RELU, torch.relu: RELU, torch.relu_: RELU, F.relu6: RELU,
    F.relu_: RELU, F.max_pool2d: MAXPOOL, torch.max_pool2d: MAXPOOL, F.avg_pool2d: AVGPOOL,
    F.adaptive_avg_pool2d: ADAPTIVE, torch.mean: MEAN, F.dropout: PASS, F.dropout2d: PASS, torch.dropout: PASS,
    torch.flatten: SHAPE, torch.reshape: SHAPE, torch.transpose: SHAPE, torch.permute: SHAPE, torch.chunk: SHAPE,
    torch.split: SHAPE, torch.squeeze: SHAPE, torch.unsqueeze: SHAPE, operator.getitem: SHAPE,
    F.silu: FUNCTION, F.hardswish: FUNCTION, F.hardsigmoid: FUNCTION, F.gelu: FUNCTION, F.leaky_relu: FUNCTION,
    F.elu: FUNCTION, F.mish: FUNCTION, F.softplus: FUNCTION, torch.sigmoid: FUNCTION, F.sigmoid: FUNCTION,
    torch.tanh: FUNCTION, F.tanh: FUNCTION,
}  # fmt: skip

METHOD_KINDS: dict[str, str] = {
    "add": ADD, "add_": ADD, "mul": MUL, "mul_": MUL, "relu": RELU, "relu_": RELU, "mean": MEAN, "view": SHAPE,
    "reshape": SHAPE, "flatten": SHAPE, "permute": SHAPE, "transpose": SHAPE, "chunk": SHAPE, "split": SHAPE,
    "squeeze": SHAPE, "unsqueeze": SHAPE, "contiguous": SHAPE, "clone": SHAPE, "sigmoid": FUNCTION, "tanh": FUNCTION,
}  # fmt: skip

# Names of the real functions as the integer view calls them.
FUNCTION_NAMES: dict[Any, str] = {
    **{known: function.name for known, function in FUNCTIONS.items()},
    F.silu: "silu", F.hardswish: "hardswish", F.hardsigmoid: "hardsigmoid", F.gelu: "gelu",
    F.leaky_relu: "leaky_relu", F.elu: "elu", F.mish: "mish", F.softplus: "softplus", torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid", torch.tanh: "tanh", F.tanh: "tanh", "sigmoid": "sigmoid", "tanh": "tanh",
}  # fmt: skip
UNSIGNED_FUNCTIONS = ("sigmoid", "hardsigmoid", "softplus")


class _Tracer(fx.Tracer):
    """Keeps torch layers whole, and notes for every node and module where it stands in the network."""

    def __init__(self) -> None:
        super().__init__()
        self._scope: list[str] = []
        self.outputs: dict[str, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # StochasticDepth is drop-out of whole branches: identity when deployed.
        if type(m) in MODULE_KINDS:
            return True
        return type(m).__name__ == "StochasticDepth" or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        self._scope.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            self._scope.pop()
        if isinstance(result, fx.Proxy):
            self.outputs[path] = result.node
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self._scope[-1] if self._scope else ""
        return node


class _Shapes(fx.Interpreter):
    """Runs the graph once and writes the shape of every tensor into its node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # else fx writes the graph into our messages

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except RewriteError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]  # torch adds the graph's own trace below
            raise RewriteError(f"{n.name}: the float network fails on example_inputs: {reason}") from error
        n.meta["shape"] = _shape_of(result)
        return result


def _shape_of(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(result.shape)
    if isinstance(result, (tuple, list)) and result and all(isinstance(item, Tensor) for item in result):
        return [tuple(item.shape) for item in result]
    return None


class Traced:
    """A float network as a graph.

    Args:
        root: A deep copy of the network, in eval mode.
        graph: Its fx graph; every node carries ``meta["kind"]``, ``meta["shape"]`` and ``meta["scope"]``.
        outputs: Module path -> the node that is the module's output.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, outputs: dict[str, fx.Node]) -> None:
        self.root, self.graph, self.outputs = root, graph, outputs
        self.modules = dict(root.named_modules())

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def path(self, node: fx.Node) -> str:
        """Return the module path of a node: its module's, or its name within the scope it was traced in."""
        if node.op == "call_module":
            return str(node.target)
        scope = node.meta.get("scope", "")
        return f"{scope}.{node.name}" if scope else node.name


def trace(model: nn.Module, example_inputs: Tensor) -> Traced:
    """Return ``model`` as a graph with kinds and shapes; the model itself is not touched.

    Raises:
        RewriteError: If torch.fx cannot trace it, it fails on ``example_inputs``, or an operation is not known.
    """
    root = copy.deepcopy(model).eval()
    tracer = _Tracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise RewriteError(
            f"{type(model).__name__}: torch.fx cannot trace its forward ({error}); "
            "remove data-dependent control flow, or pass the traceable part of the network"
        ) from error
    module = fx.GraphModule(root, graph)
    graph = module.graph
    graph.eliminate_dead_code()
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    with torch.no_grad():
        _Shapes(module).run(example_inputs.to(device))
    traced = Traced(root, graph, tracer.outputs)
    for node in graph.nodes:
        node.meta["kind"] = _kind(traced, node)
    return traced


def _kind(traced: Traced, node: fx.Node) -> str:
    if node.op in (PLACEHOLDER, OUTPUT):
        return str(node.op)
    if node.op != "output" and node.meta.get("shape") is None:
        return VALUE  # sizes and arithmetic on them
    kind = _tensor_kind(traced, node)
    if kind is None:
        raise RewriteError(_unknown(traced, node))
    _refuse(traced, node, kind)
    return kind


def _refuse(traced: Traced, node: fx.Node, kind: str) -> None:
    """Raise for a use of a known operation that has no integer form."""
    path = traced.path(node)
    if kind in (ADD, MUL) and sum(_shape(arg) is not None for arg in node.args[:2]) < 2:
        raise RewriteError(
            f"{path}: {node.target} with a constant has no integer form; fold the constant into a "
            "neighbouring layer, or do it to the images before the network"
        )
    if kind == ADD and (len(node.args) > 2 or node.kwargs.get("alpha", 1) != 1):
        raise RewriteError(f"{path}: a sum with alpha has no integer form; scale the weights of a neighbouring layer")
    module = traced.module(node)
    if kind == CONV and getattr(module, "padding_mode", "zeros") != "zeros":
        raise RewriteError(f"{path}: padding mode {module.padding_mode!r} has no integer kernel; use zeros")  # type: ignore[union-attr]
    if kind == NORM and getattr(module, "running_mean", None) is None:
        raise RewriteError(
            f"{path}: batch norm without running statistics cannot be folded; set track_running_stats=True"
        )
    if kind in (*COMPUTE, NORM) and sum(other.target == node.target for other in traced.graph.nodes) > 1:
        raise RewriteError(
            f"{path}: is called more than once, with one grid for each call; give each call its own copy"
        )
    if node.target is operator.getitem and isinstance(_shape(node.args[0]), tuple):
        raise RewriteError(f"{path}: indexing a tensor has no integer form; use chunk or split")


def _shape(arg: Any) -> Any:
    return arg.meta.get("shape") if isinstance(arg, fx.Node) else None


def _tensor_kind(traced: Traced, node: fx.Node) -> str | None:
    if node.op == "call_module":
        module = traced.module(node)
        if type(module).__name__ == "StochasticDepth":
            return PASS
        if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
            return RELU if module.min_val == 0 else FUNCTION
        return next((kind for known, kind in MODULE_KINDS.items() if type(module) is known), None) or next(
            (kind for known, kind in MODULE_KINDS.items() if isinstance(module, known)), None
        )
    if node.op == "call_function":
        if getattr(node.target, "__name__", "") == "stochastic_depth":
            return PASS
        return FUNCTION_KINDS.get(node.target)
    if node.op == "call_method":
        return METHOD_KINDS.get(str(node.target))
    return None


def _unknown(traced: Traced, node: fx.Node) -> str:
    module = traced.module(node)
    what = type(module).__name__ if module is not None else f"{node.op} {node.target}"
    return (
        f"{traced.path(node)}: {what} has no low-bit form; the known ones are convolutions, linear layers, batch norm, "
        "activations, pooling, sums, products, concatenations and reshapes. Replace it in the float network "
        "(layer norm -> batch norm, a custom block -> known layers), or pass the part of the network without it"
    )


def pair(value: Any) -> tuple[int, int]:
    """Return ``value`` as (height, width)."""
    if isinstance(value, (tuple, list)):
        first, second = (value[0], value[0]) if len(value) == 1 else value
        return int(first), int(second)
    return int(value), int(value)
