"""Tracks where a network stops gradients while it is recorded, even though no gradients are computed then."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from quantizers.graph.form.canonical import StopGradient
from quantizers.graph.recording.modes import live_nodes, output_of
from quantizers.graph.recording.outcome import Recording
from quantizers.graph.spelling.pen import Pen, Value
from quantizers.graph.spelling.sites import user_site

_OF_GRADIENTS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "detach_")
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class GradientFlow:
    """Gradient flow of the network that is recorded.

    A tensor is stopped if it depends on images but no gradient reaches its sources: it was detached, or
    computed under ``torch.no_grad()``. Reading it with gradients enabled puts a :class:`StopGradient` into the graph.

    Args:
        pen: Writes the nodes.
        is_followed: Whether to track gradients at all: not in eval mode, nor in a network without any.
    """

    def __init__(self, pen: Pen, *, is_followed: bool) -> None:
        self._pen, self.is_followed = pen, is_followed
        self._is_on, self._functions = True, 0
        self._stopped: dict[int, Tensor] = {}
        self._made: dict[fx.Node, Value] = {}
        self.notes: list[str] = []  # what may have another gradient than the graph: location and operation

    @property
    def is_on(self) -> bool:
        """Return whether a value computed now would have a gradient."""
        return self._is_on and not torch.is_inference_mode_enabled()

    def note(self, what: str) -> None:
        """Note something that may change gradients, with its location."""
        site = user_site()
        text = f"{self._pen.scope + ': ' if self._pen.scope else ''}{what}{f' at {site}' if site else ''}"
        if self.is_followed and text not in self.notes:
            self.notes.append(text)

    # -- what is observed ------------------------------------------------------------------------------------------

    def handles(self, func: Any) -> bool:
        """Return whether a Python function is about gradients, so that :meth:`call` answers in its place."""
        name = getattr(func, "__name__", "")
        return func is torch._C._set_grad_enabled or name in _OF_GRADIENTS or func == _REQUIRES_GRAD

    def call(self, func: Any, args: tuple[Any, ...], *, depends: bool) -> Any:
        """Answer a function about gradients as it would answer in training."""
        if func is torch._C._set_grad_enabled:
            if not self._functions:
                self._is_on = bool(args[0])
            return None
        if func == _REQUIRES_GRAD:
            return not self.is_stopped(args[0]) if depends and self.is_followed else func(*args)
        if func.__name__ == "detach_":
            if self.is_followed:
                self._stopped[args[0]._cdata] = args[0]
            return args[0]
        if func.__name__ == "retain_grad":
            return None
        self.note("a hook on a gradient")
        return RemovableHandle(OrderedDict())

    def made(self, results: list[Tensor], operands: list[Tensor], *, is_detached: bool, is_view: bool) -> None:
        """Note whether the results of an operation are stopped.

        Args:
            results: Tensors that it returned.
            operands: Tensors that it read; a result that is one of them was written in place.
            is_detached: Whether it is ``detach``.
            is_view: Whether it is a view, which is stopped if its base is.
        """
        if not self.is_followed or self._functions:
            return
        read = {operand._cdata for operand in operands}
        stops = is_detached or not self.is_on or (is_view and bool(operands) and self.is_stopped(operands[0]))
        for result in results:
            if result._cdata in read:
                if not self.is_on or self.is_stopped(result):
                    self.note("a tensor is written in place without a gradient")
                if self.is_on:
                    self._stopped.pop(result._cdata, None)
            elif stops:
                self._stopped[result._cdata] = result

    def is_stopped(self, tensor: Tensor) -> bool:
        """Return whether no gradient passes through a tensor."""
        return tensor._cdata in self._stopped

    def stopped(self, tensor: Tensor, value: Value) -> Value:
        """Return the current value of a tensor, behind a :class:`StopGradient` if it is stopped."""
        if not self.is_stopped(tensor) or not self.is_on or self._functions or "refused" in value.node.meta:
            return value
        if value.node not in self._made:
            self._made[value.node] = self._pen.emit(StopGradient(), value, aside=True)
        return self._made[value.node]

    # -- what torch asks and calls ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def followed(self, is_recording: Any) -> Iterator[None]:
        """Make torch answer and call as in training, within the block.

        Functions with a custom backward (``torch.autograd.Function``) are noted; what they compute inside has no
        gradient anyway, so it is not stopped there.

        Args:
            is_recording: Returns whether the network itself runs, and not torch or this package.
        """
        real, own = torch.is_grad_enabled, torch.autograd.Function.__dict__["apply"]

        def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
            call = own.__get__(None, kind)
            if not is_recording():
                return call(*args, **kwargs)
            self.note(f"{kind.__name__}, which has a custom backward,")
            self._functions += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._functions -= 1

        try:
            torch.is_grad_enabled = lambda: self._is_on if is_recording() else real()
            torch.autograd.Function.apply = classmethod(apply)
            yield
        finally:
            torch.is_grad_enabled = real
            torch.autograd.Function.apply = own


@contextlib.contextmanager
def without_checkpoints() -> Iterator[None]:
    """Make ``torch.utils.checkpoint`` just call what it wraps, within the block; the function is the same."""
    try:
        CheckpointFunction.apply = classmethod(lambda _kind, run, _preserve, *args: run(*args))
        yield
    finally:
        del CheckpointFunction.apply


def without_idle_stops(recording: Recording) -> None:
    """Remove, in place, the stops that block gradients to nothing trainable, such as to a frozen stem."""
    learns: set[fx.Node] = set()
    for node in live_nodes(recording.graph, output_of(recording.graph)):
        module = recording.modules.get(str(node.target)) if node.op == "call_module" else None
        trains = module is not None and any(p.requires_grad for p in module.parameters())
        reached = any(operand in learns for operand in node.all_input_nodes)
        if trains or reached:
            learns.add(node)
        elif isinstance(module, StopGradient):
            node.replace_all_uses_with(node.all_input_nodes[0])
            for path, place in recording.outputs.items():
                if place is node:
                    recording.outputs[path] = node.all_input_nodes[0]
