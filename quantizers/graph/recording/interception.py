"""Passes what a network calls while it runs to a listener: modules, Python functions, ATen operations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from quantizers.graph.form.refusal import RewriteError


class Listener(Protocol):
    """Observes calls."""

    paused: bool

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a Python function."""
        ...

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an ATen operation."""
        ...


class FunctionCalls(TorchFunctionMode):
    """Passes every call of torch's Python interface to the recorder."""

    def __init__(self, recorder: Listener) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.function(func, args, kwargs or {})


class OperatorCalls(TorchDispatchMode):
    """Passes every ATen operation to the recorder."""

    def __init__(self, recorder: Listener) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.operator(func, args, kwargs or {})


def unrecorded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of a listener compute without being recorded itself."""

    @functools.wraps(method)
    def wrapped(self: Listener, *args: Any, **kwargs: Any) -> Any:
        before, self.paused = self.paused, True
        try:
            with torch.no_grad():  # also where the network enables gradients
                return method(self, *args, **kwargs)
        finally:
            self.paused = before

    return wrapped


def remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a listener keep the first refusal of a method: the network may catch it and go another way."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except RewriteError as error:
            self.refusal = self.refusal or error
            raise

    return wrapped


def by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an ATen operation by name, defaults filled in."""
    schema = func._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given.update(zip((argument.name for argument in schema), args, strict=False))
    return {**given, **kwargs}


def word_of(func: Any) -> str:
    """Return the name of a function as the network's author would write it, in place or not, reversed or not."""
    name = str(getattr(func, "__name__", "op")).partition(".")[0].strip("_")  # without the overload
    return {"radd": "add", "rsub": "sub", "rmul": "mul", "iadd": "add", "imul": "mul", "isub": "sub"}.get(name, name)


@contextlib.contextmanager
def instrumented(root: nn.Module, scoped: Callable[..., Any]) -> Iterator[None]:
    """Make every module of a network report when it runs."""
    changed = []
    try:
        for path, module in root.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                changed.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = functools.partial(scoped, path, module, module.forward)
        yield
    finally:
        for module, before in changed:
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before
