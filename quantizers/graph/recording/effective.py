"""Follows how a network computes weights from its parameters: masks stay in the student, other functions are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quantizers.graph.recording.ledger import Geometry, Ledger, geometry, memory_of
from quantizers.graph.recording.modes import live_nodes, output_of
from quantizers.graph.recording.outcome import Recording
from quantizers.graph.spelling.moves import PIECES, VIEWS
from quantizers.graph.spelling.pen import Pen
from quantizers.graph.spelling.sites import is_normalizing
from quantizers.graph.spelling.table import SHAPE_ONLY

# Operations that move values, and those that, with constants, only rescale the learning rate.
MOVES = frozenset({*VIEWS, *PIECES, "clone", "_to_copy", "t", "flip", "roll", "cat", "stack", "neg"})
JOINS = frozenset({"cat", "stack"})
PICKS = frozenset({"index", "index_select", "gather", "embedding", "take"})
FACTORS, OFFSETS = frozenset({"mul", "div"}), frozenset({"add", "sub", "rsub", "copy"})


class EffectiveWeights:
    """What is known of weights that are computed from learned parameters: where a constant mask closes them.

    A mask is a tensor of zeros and ones. It is followed through moves and factors.

    Args:
        ledger: Knows which constants are learned.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._masks: dict[Geometry, tuple[Tensor, Tensor]] = {}  # with the tensor, so that its memory is not reused

    def of(self, weight: Tensor) -> Tensor | None:
        """Return the mask of a weight, or None if no constant factor of zero closes any of it."""
        return self._masks.get(geometry(weight), (None, weight))[0]

    def note(self, weight: Tensor, mask: Tensor | None) -> None:
        """Note the mask of a weight, or that it has none."""
        self._masks.pop(geometry(weight), None)
        if mask is not None and bool((mask == 0).any()) and mask.shape == weight.shape:
            self._masks[geometry(weight)] = (mask, weight)

    def computed(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]) -> bool:
        """Note the masks of what an operation made of constants, and return whether its student trains otherwise.

        Moves, constant factors and offsets train the same function, and weight and spectral norm are known to be
        replaced by the weight itself. Any other function of learned values is not in the student.

        Args:
            func: The ATen operation.
            name: Its name, with the suffix of operations in place.
            args: Its arguments.
            kwargs: Its other arguments.
            made: The tensors that it returned.
        """
        name = name if name in MOVES else name.removesuffix("_")
        learned = [tensor for tensor in _tensors((args, kwargs)) if self._ledger.constant(tensor).learned]
        is_computed = self._follow(func, name, args, kwargs, learned, made)
        if not func._schema.is_mutable:
            return is_computed
        # A write into a part of a weight, or through another view of it, makes a function that no mask describes.
        outdated = [self._drop_outdated(tensor) for tensor in made]
        return is_computed or any(outdated) or (bool(learned) and any(map(_is_part, made)))

    def _drop_outdated(self, written: Tensor) -> bool:
        """Forget the masks of other views of the memory of a written tensor; return whether there were any."""
        memory, own = memory_of(written), geometry(written)
        outdated = [key for key, (_, tensor) in self._masks.items() if memory_of(tensor) == memory and key != own]
        for key in outdated:
            del self._masks[key]
        return bool(outdated)

    def _follow(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], learned: list[Tensor],
        made: list[Tensor],
    ) -> bool:  # fmt: skip
        """Note the masks of what an operation made; return whether it is a function that the student lacks."""
        if not learned or not made or name in SHAPE_ONLY:
            return False
        given = _tensors((args, kwargs))
        is_masked = any(self.of(tensor) is not None for tensor in given)
        is_pick = name in PICKS and made[0].numel() <= sum(tensor.numel() for tensor in learned)  # nothing twice
        if name in MOVES or is_pick:
            moved = self._moved(func, args, kwargs) if is_masked else [None] * len(made)
            for tensor, mask in zip(made, moved, strict=True):
                self.note(tensor, mask)
            return name in JOINS and len(learned) < len(given)  # the constants among them would train, too
        if name in FACTORS:
            is_factor = len(learned) == 1 and (name == "mul" or args[0] is learned[0]) and not kwargs
            mask = self._product(args[0], args[1] if name == "mul" else 1.0, made[0])
            self.note(made[0], mask)
            return not is_factor and not is_normalizing()
        for tensor in made:
            self.note(tensor, None)
        return is_masked or (name not in OFFSETS and not is_normalizing())

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor | None]:
        masks = pytree.tree_map_only(Tensor, self._filled, (args, kwargs))
        result = func(*masks[0], **masks[1])
        return [tensor.abs() for tensor in _tensors(result)]

    def _filled(self, tensor: Tensor) -> Tensor:
        """Return the mask of a tensor, of ones if it has none; indices are returned unchanged."""
        mask = self.of(tensor)
        if mask is not None:
            return mask.clone()
        return torch.ones_like(tensor) if tensor.is_floating_point() else tensor

    def _product(self, first: Any, second: Any, made: Tensor) -> Tensor:
        mask = torch.ones_like(made)
        for factor in (first, second):
            if not isinstance(factor, Tensor):
                mask = mask * float(factor != 0)
            elif (known := self.of(factor)) is not None or not self._ledger.constant(factor).learned:
                mask = mask * ((factor if known is None else known) != 0)
        return mask


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_part(tensor: Tensor) -> bool:
    """Return whether a tensor is less than all of its memory."""
    return tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes()


def computed_weights(recording: Recording, pen: Pen) -> list[str]:
    """Return the learned tensors that a network computes and its student would hold unchanged, with the functions.

    Args:
        recording: What was recorded of the network, in training mode.
        pen: The pen that wrote it.
    """
    return list(dict.fromkeys(_computed(recording, pen)))


def _computed(recording: Recording, pen: Pen) -> Iterator[str]:
    for node in live_nodes(recording.graph, output_of(recording.graph)):
        if node.op != "call_module":
            continue
        module = recording.modules[str(node.target)]
        for name, parameter in module.named_parameters(recurse=False):
            _, tensor = pen.drawn_from.get(id(parameter), (parameter, None))
            functions = [] if tensor is None else _functions(pen, module, name, tensor)
            if functions:
                yield f"{_path(node, name)} ({', '.join(functions)})"


def _functions(pen: Pen, module: nn.Module, name: str, tensor: Tensor) -> list[str]:
    known = pen.constant(tensor)
    is_kept = name == "weight" and module._buffers.get("mask") is not None
    is_lost = known.learned and pen.masks.of(tensor) is not None and not is_kept
    return sorted({*known.functions, *(["mask"] if is_lost else [])})


def _path(node: fx.Node, name: str) -> str:
    return f"{node.meta['path']}.{name}"
