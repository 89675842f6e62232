"""Writes nodes of the canonical graph, named as in the network, and runs each on the example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from quantizers.graph.form.refusal import NoSpelling, RewriteError
from quantizers.graph.spelling.sites import user_site

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.PReLU)
# Torch layers that can be spelled in most of their settings: a refusal says which setting cannot.
KNOWN_LAYERS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.padding._ConstantPadNd, nn.Flatten, nn.Unflatten, nn.Softmax, nn.LogSoftmax,
)  # fmt: skip
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Value:
    """A tensor of the network: the node that produces it, and its value on the example."""

    node: fx.Node
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape on the example, batch first."""
        return tuple(self.tensor.shape)


class Refused(nn.Module):
    """Placeholder for an operation without a spelling; an error only if the output depends on it."""

    def forward(self, *operands: Tensor) -> Tensor:
        raise RewriteError("a refused operation was run")


@dataclass(frozen=True)
class Constant:
    """What is known about a tensor that does not depend on the images.

    Args:
        sources: Names of the learned parameters that it is, or was computed from.
        random: Whether it was drawn at random.
        functions: Operations on learned parameters behind it that its student would train without.
    """

    sources: frozenset[str] = frozenset()
    random: bool = False
    functions: frozenset[str] = frozenset()

    @property
    def learned(self) -> bool:
        """Return whether it trains."""
        return bool(self.sources)


class Constants(Protocol):
    """Knows where tensors that do not depend on the images come from."""

    def constant(self, tensor: Tensor) -> Constant:
        """Return what is known about a tensor."""
        ...

    def parameter(self, tensor: Tensor) -> nn.Parameter:
        """Return the parameter of the network that a tensor is, or a new one with its values."""
        ...

    def derive(self, sources: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Note that tensors were computed from others."""
        ...


class Masks(Protocol):
    """Knows which weights a constant mask closes, in part."""

    def of(self, weight: Tensor) -> Tensor | None:
        """Return the mask of a weight, zeros and ones, or None."""
        ...

    def note(self, weight: Tensor, mask: Tensor | None) -> None:
        """Note the mask of a weight."""
        ...


class Pen:
    """Writes canonical nodes.

    Args:
        constants: Knows where tensors that do not depend on the images come from.
        masks: Knows which weights a constant mask closes, in part.

    Attributes:
        drawn_from: Identity of a parameter in the canonical graph -> the parameter, and the network's tensor.
    """

    def __init__(self, constants: Constants, masks: Masks) -> None:
        self.graph, self.modules = fx.Graph(), dict[str, nn.Module]()
        self.scopes: list[tuple[str, nn.Module]] = []
        self.word = ""  # the call that is being spelled
        self.constants, self.masks = constants, masks
        self.drawn_from: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self.stacks: dict[fx.Node, tuple[Value, ...]] = {}
        self._claimed = set[tuple[str, int]]()

    # -- where we are ----------------------------------------------------------------------------------------------

    @property
    def scope(self) -> str:
        """Return the path of the innermost module that is running."""
        return self.scopes[-1][0] if self.scopes else ""

    @property
    def layer(self) -> nn.Module | None:
        """Return the innermost module if it is a torch layer, else None."""
        module = self.scopes[-1][1] if self.scopes else None
        is_torch = module is not None and type(module).__module__.startswith("torch.nn")
        return module if is_torch and not isinstance(module, CONTAINERS) else None

    def place(self) -> str:
        """Return the path of the current call, for messages."""
        if self.layer is not None and self.scope:
            return self.scope
        return f"{self.scope}.{self.word}" if self.scope else self.word

    def what(self) -> str:
        """Return the name of the current call, for messages."""
        return type(self.layer).__name__ if self.layer is not None else self.word

    # -- writing ---------------------------------------------------------------------------------------------------

    def emit(self, module: nn.Module, *operands: Value, aside: bool = False) -> Value:
        """Write a node that calls ``module``.

        Args:
            module: A module of the closed set.
            operands: What it reads.
            aside: Whether it is only a helper step for the module named after the call.
        """
        module.eval()
        if any(True for _ in module.buffers()):  # indices, constants
            module.to(operands[0].tensor.device)
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010 - values of the canonical graph never change
        with torch.no_grad():
            tensor = module(*(operand.tensor for operand in operands))
        node = self._node(module, operands, aside=aside)
        node.meta["shape"] = tuple(tensor.shape)
        return Value(node, tensor)

    def _node(self, module: nn.Module, operands: tuple[Value, ...], *, aside: bool) -> fx.Node:
        own = self._is_own(module) and not aside
        word = self.scope.replace(".", "_") if own else self.word
        name = f"{word}_{type(module).__name__.lower()}" if aside else word
        node = self.graph.create_node("call_module", "", tuple(o.node for o in operands), name=name)
        parents = self.scope.rpartition(".")[0] if self.layer is not None else self.scope
        path = self.scope if own else f"{parents}.{node.name}" if parents else node.name
        node.meta.update(path=path, site=user_site())
        node.target = self._target(path, module)
        return node

    def _is_own(self, module: nn.Module) -> bool:
        """Return whether ``module`` represents the module that is running, and not a step within it."""
        if not self.scope:
            return False
        running = self.scopes[-1][1]
        return (
            self.layer is not None
            or module is running
            or (isinstance(module, WEIGHTED) and isinstance(running, WEIGHTED))
        )

    def _target(self, path: str, module: nn.Module) -> str:
        target, count = path, 0
        while target in self.modules:
            count += 1
            target = f"{path}_{count}"
        self.modules[target] = module
        return target

    def refuse(self, tensor: Tensor, message: str, *operands: Value) -> Value:
        """Write a node that is an error if the output of the network depends on it."""
        earlier = next((o.node.meta["refused"] for o in operands if "refused" in o.node.meta), None)
        node = self._node(Refused(), operands, aside=True)
        node.meta.update(refused=earlier or message, shape=tuple(tensor.shape))
        return Value(node, tensor)

    def claim(self, weight: Tensor) -> None:
        """Note that a layer uses ``weight``.

        Raises:
            RewriteError: If the same layer has used it before.
        """
        is_layer = bool(self.scopes) and isinstance(self.scopes[-1][1], WEIGHTED)
        key = (self.scope, 0 if is_layer else id(weight))
        if key in self._claimed:
            again = "is called more than once" if is_layer else "uses a weight that an earlier call has used"
            raise RewriteError(f"{self.place()}: {again}, but each call needs its own grid; give each its own copy")
        self._claimed.add(key)

    def parameter(self, tensor: Tensor) -> nn.Parameter:
        """Return the parameter of the network that a constant is, or a new one with its values.

        Raises:
            NoSpelling: If it is random, because the layer would keep the values drawn during recording.
        """
        self.require_steady(tensor)
        made = self.constants.parameter(tensor)
        self.note_origin(made, tensor)
        return made

    def weigh(self, module: nn.Module, weight: Tensor) -> None:
        """Give a layer its weight, and the mask that keeps a part of it at zero, if there is one."""
        module.weight = self.parameter(weight)
        mask = self.masks.of(weight)
        if mask is not None and module.weight.requires_grad:
            module.register_buffer("mask", mask != 0)

    def moved(self, source: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a weight whose values are in other places, noted as computed from ``source``, mask and all."""
        result, mask = self.constant_like(source, move(source)), self.masks.of(source)
        if mask is not None:
            self.masks.note(result, move(mask))
        return result

    def note_origin(self, parameter: Tensor, tensor: Tensor) -> None:
        """Note which tensor of the network the values of a parameter of the canonical graph come from."""
        if isinstance(parameter, nn.Parameter):
            self.drawn_from[id(parameter)] = (parameter, tensor)

    def constant(self, tensor: Tensor) -> Constant:
        """Return what is known about a tensor that does not depend on the images."""
        return self.constants.constant(tensor)

    def derive(self, sources: Sequence[Tensor], result: Tensor) -> None:
        """Note that a constant was computed from others."""
        self.constants.derive(sources, [result])

    def require_steady(self, tensor: Tensor) -> Constant:
        """Return what is known about a constant.

        Raises:
            NoSpelling: If it is random.
        """
        known = self.constant(tensor)
        if known.random:
            raise NoSpelling(
                "it computes with random numbers; use a dropout layer (torchvision's StochasticDepth for whole "
                "branches), or draw them outside the network"
            )
        return known

    def constant_like(self, source: Tensor, result: Tensor) -> Tensor:
        """Return ``result``, noted as computed from ``source``."""
        self.derive([source], result)
        return result

    def module_of(self, value: Value) -> nn.Module | None:
        """Return the module that produces ``value``, or None for the images."""
        return self.modules.get(str(value.node.target)) if value.node.op == "call_module" else None

    def images(self, name: str, tensor: Tensor) -> Value:
        """Write the node of the network's input."""
        node = self.graph.placeholder(name)
        node.meta.update(path=node.name, shape=tuple(tensor.shape), site="")
        return Value(node, tensor)

    def output(self, result: Any) -> None:
        """Write the node of the network's output, a structure of nodes."""
        node = self.graph.output(result)
        node.meta.update(path="output", shape=None, site="")
