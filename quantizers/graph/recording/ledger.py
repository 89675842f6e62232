"""Tracks which tensors depend on the images, and which share memory, so that all of them see in-place writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantizers.graph.form.canonical import Move
from quantizers.graph.spelling.moves import apply, scatter
from quantizers.graph.spelling.pen import Constant, Pen, Value

Geometry = tuple[int, tuple[int, ...], tuple[int, ...], str]


def geometry(tensor: Tensor) -> Geometry:
    """Return which memory a tensor views: two tensors of one geometry always hold the same values.

    The address tells, not the storage: tensors that meet through DLPack share memory and have a storage each.
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        return id(tensor), tuple(tensor.shape) if not tensor.is_nested else (), (), str(tensor.dtype)
    start = tensor.data_ptr() or tensor.untyped_storage()._cdata  # empty tensors have no address
    return int(start), tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype)


def memory_of(tensor: Tensor) -> int:
    """Return the memory of a tensor, by its address: that of all tensors that share it."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return id(tensor)
    storage = tensor.untyped_storage()
    return int(storage.data_ptr() or storage._cdata)


@dataclass
class Memory:
    """A piece of memory: how often it was written, and the node of all of it (None if it is constant)."""

    version: int = 0
    node: fx.Node | None = None


@dataclass
class Region:
    """The part of a piece of memory that one tensor views.

    Args:
        memory: The memory.
        tensor: The tensor; held, so that its memory is not reused for another.
        parent: The region this is a view of, or None if it is all of the memory.
        moves: Returns the moves from the parent to this.
        node: Node of its values as of ``version``.
        version: The version of the memory that ``node`` belongs to.
    """

    memory: Memory
    tensor: Tensor
    parent: Region | None = None
    moves: Callable[[], list[Move]] = field(default=list)
    node: fx.Node | None = None
    version: int = -1


class Ledger:
    """The regions of all tensors that a recorded network creates, by geometry.

    Args:
        root: The network, whose parameters are the learned constants.
    """

    def __init__(self, root: nn.Module) -> None:
        self.regions: dict[Geometry, Region] = {}
        self._constants: dict[int, tuple[Constant, Tensor]] = {}
        self._parameters: dict[Geometry, nn.Parameter] = {}
        self._learned: dict[int, str] = {}  # memory -> name
        for name, parameter in root.named_parameters():
            self._parameters[geometry(parameter)] = parameter
            if parameter.requires_grad:
                self._note(parameter, Constant(frozenset([name])))
                self._learned[memory_of(parameter)] = name

    # -- constants -------------------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> Constant:
        """Return what is known about a tensor that does not depend on the images."""
        return self._constants.get(memory_of(tensor), (Constant(), tensor))[0]

    def derive(
        self, sources: Iterable[Tensor], results: Iterable[Tensor], *, random: bool = False, function: str = ""
    ) -> None:
        """Note that constants were computed from others; a function by name if a student would train without it."""
        known = [self.constant(source) for source in sources]
        names = frozenset[str]().union(*(k.sources for k in known))
        functions = frozenset[str]({function} if function else ()).union(*(k.functions for k in known))
        made = Constant(names, random or any(k.random for k in known), functions)
        if made != Constant():
            for result in results:
                self._note(result, made)

    def _note(self, tensor: Tensor, constant: Constant) -> None:
        self._constants[memory_of(tensor)] = (constant, tensor)

    def parameter(self, tensor: Tensor) -> nn.Parameter:
        """Return the parameter that a tensor is, or a new one, which trains if it was computed from trainable ones."""
        known = self._parameters.get(geometry(tensor))
        if known is not None:
            return known
        return nn.Parameter(tensor.detach().clone(), requires_grad=self.constant(tensor).learned)

    def learned_name(self, tensor: Tensor) -> str | None:
        """Return the name of the learned parameter whose memory a tensor shares, if any."""
        return self._learned.get(memory_of(tensor))

    def written_parameter(self, func: Any, args: tuple[Any, ...]) -> str | None:
        """Return the name of the learned parameter that an ATen operation writes into, if any."""
        written = (
            given for given, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Tensor)
        )  # fmt: skip
        return next((name for given in written if (name := self.learned_name(given)) is not None), None)

    # -- what depends on the images --------------------------------------------------------------------------------

    def region(self, tensor: Tensor) -> Region | None:
        """Return the region of a tensor, if there is one."""
        return self.regions.get(geometry(tensor))

    def is_traced(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on the images."""
        region = self.region(tensor)
        return region is not None and region.memory.node is not None

    def bind(self, tensor: Tensor, value: Value) -> None:
        """Note that a tensor in new memory has the values of a node."""
        memory = Memory(node=value.node)
        self.regions[geometry(tensor)] = Region(memory, tensor, node=value.node, version=0)

    def view(self, tensor: Tensor, base: Tensor, moves: Callable[[], list[Move]], node: fx.Node | None = None) -> None:
        """Note that a tensor is a view of another."""
        if geometry(tensor) == geometry(base) and self.region(base) is not None:
            return
        parent = self.hold(base)
        self.regions[geometry(tensor)] = Region(parent.memory, tensor, parent, moves, node, parent.memory.version)

    def hold(self, tensor: Tensor) -> Region:
        """Return the region of a tensor; one of constant memory if nothing is known about it."""
        return self.regions.setdefault(geometry(tensor), Region(Memory(), tensor))

    def read(self, pen: Pen, region: Region) -> Value | Tensor:
        """Return what a region holds now, derived again if its memory was written through another one."""
        if region.memory.node is None:
            return region.tensor
        if region.node is not None and region.version == region.memory.version:
            return Value(region.node, region.tensor)
        if region.parent is None:
            node = region.memory.node
        else:
            parent = self.read(pen, region.parent)
            if not isinstance(parent, Value):
                return region.tensor
            node = apply(pen, parent, region.moves(), aside=True).node
        region.node, region.version = node, region.memory.version
        return Value(node, region.tensor)

    def write(self, pen: Pen, region: Region, part: Value | Tensor) -> None:
        """Note that a region is overwritten, which changes the contents of all regions of its memory."""
        memory = region.memory
        if region.parent is None:
            memory.node = part.node if isinstance(part, Value) else None
            memory.version += 1
        else:
            whole = self.read(pen, region.parent)
            self.write(pen, region.parent, _joined(pen, whole, region.moves(), part))
        if memory.node is not None and isinstance(part, Value):
            region.node, region.version = part.node, memory.version


def _joined(pen: Pen, whole: Value | Tensor, moves: list[Move], part: Value | Tensor) -> Value | Tensor:
    if not isinstance(whole, Value) and not isinstance(part, Value):
        return whole  # constants written into constants: the memory itself holds them
    return scatter(pen, whole, moves, part)
