"""Detects what a network does outside torch, where it cannot be recorded: decisions on values, threads, other RNGs."""

from __future__ import annotations

import _thread
import contextlib
import functools
import queue
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.pool import Pool
from multiprocessing.process import BaseProcess
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantizers.graph.form.refusal import RewriteError
from quantizers.graph.spelling.sites import user_site
from quantizers.graph.spelling.table import NUMBERS

# Operators whose results are plain numbers read from values; those of shapes and strides do not need the values.
_PLAIN = (torch.BoolType, torch.FloatType, torch.NumberType)
_OF_SHAPES = ("is_same_size", "is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "is_pinned")
_DICE = (random.Random, np.random.Generator, np.random.RandomState)
_NOT_OWN = ("torch", "torchvision", "numpy", "quantizers")  # packages that draw from watched generators anyway
# Methods of tensors that give their values to what is not torch, or copy them in a way that no operation shows.
_LEAVING = {
    **{
        name: getattr(Tensor, name)
        for name in (
            "numpy", "__array__", "__dlpack__", "__deepcopy__", "__reduce__", "__reduce_ex__", "data_ptr", "storage",
            "untyped_storage", "_typed_storage", "share_memory_", "apply_", "map_", "map2_",
        )
    },
    "__cuda_array_interface__": Tensor.__cuda_array_interface__.__get__,
}  # fmt: skip
# What starts work in another thread or process, or hands it over, where nothing is observed.
_WORKERS: tuple[tuple[Any, str], ...] = (
    (threading.Thread, "start"), (_thread, "start_new_thread"), (BaseProcess, "start"), (queue.Queue, "put"),
    (ThreadPoolExecutor, "submit"), (ProcessPoolExecutor, "submit"), (Pool, "apply_async"), (Pool, "_map_async"),
    (Pool, "imap"), (Pool, "imap_unordered"),
)  # fmt: skip


def is_number(func: Any, name: str) -> bool:
    """Return whether an ATen operation turns a tensor's values into a Python number or sizes."""
    plain = any(isinstance(result.type, _PLAIN) for result in func._schema.returns)
    return name in NUMBERS or (plain and name not in _OF_SHAPES)


def number_message(where: str, *, of_chance: bool = False) -> str:
    """Return the message for a number or a condition that is taken from tensors."""
    site = user_site() or "an unknown line"
    if of_chance:
        return (
            f"{where}: a number or a condition is drawn at random at {site}, so each pass may be another function; use "
            "a dropout or stochastic depth layer, or draw outside the network"
        )
    return (
        f"{where}: a number or a condition is taken from tensor values at {site}; "
        "take it from shapes, which are known, or move it outside the network"
    )


def inference_message(where: str) -> str:
    """Return the message for a network that enables inference mode."""
    return (
        f"{where}: runs under torch.inference_mode() at {user_site() or 'an unknown line'}, whose tensors cannot be "
        "trained with; use torch.no_grad() or detach()"
    )


def written_message(where: str, parameter: str) -> str:
    """Return the message for a network that changes a learned parameter while it runs."""
    return (
        f"{where}: forward writes into the parameter `{parameter}` at {user_site() or 'an unknown line'}, which a "
        "student would not repeat while it trains; compute the weight from it (w = weight.clamp(...)), or change it in "
        "the training loop"
    )


def reshaped_message(name: str) -> str:
    """Return what is wrong with an operation that changes the shape or the memory of a tensor in place."""
    return (
        f"{name} changes a tensor's shape in place, which cannot be recorded; use its result instead "
        f"(x = x.{name.removesuffix('_')}(...))"
    )


def leaving(func: Any, args: tuple[Any, ...], where: str) -> str | None:
    """Return the message for a Python function that passes a tensor's values out of torch, or None for any other."""
    if func is Tensor.tolist:
        return number_message(where)
    name = next((name for name, method in _LEAVING.items() if func == method), None)
    is_there = name != "__cuda_array_interface__" or bool(args and args[0].is_cuda)  # elsewhere it does not exist
    if name is not None and is_there:
        return (
            f"{where}: values leave torch at {user_site() or 'an unknown line'} ({name}), so what is computed from "
            "them does not depend on the images, as far as torch can see; compute it with torch operations (not numpy; "
            "clone() copies)"
        )
    return None


_LOCK = threading.Lock()
_RECORDING = threading.local()  # of a thread that records: the function that refuses
_before: list[tuple[Any, str, Any]] = []  # what is replaced while any thread records
_blocks = 0


@contextlib.contextmanager
def one_thread(refuse: Callable[[str], Exception]) -> Iterator[None]:
    """Refuse that this thread gives work to others within the block: what they compute is not observed.

    Other threads may do so, and may be in such a block themselves.

    Args:
        refuse: Returns the error for a reason.

    Yields:
        Nothing.
    """
    global _blocks  # noqa: PLW0603 - the standard library is replaced for all threads or none
    with _LOCK:
        if not _blocks:
            _before[:] = [(kind, name, kind.__dict__[name]) for kind, name in _WORKERS]
            for kind, name, original in _before:
                setattr(kind, name, _watched(original))
        _blocks += 1
    outer, _RECORDING.refuse = getattr(_RECORDING, "refuse", None), refuse
    try:
        yield
    finally:
        _RECORDING.refuse = outer
        with _LOCK:
            _blocks -= 1
            if not _blocks:
                for kind, name, original in _before:
                    setattr(kind, name, original)


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        refuse = getattr(_RECORDING, "refuse", None)
        if refuse is not None and (original.__name__ != "put" or _holds_tensor(args)):  # a line of a log holds none
            raise refuse(
                f"gives work to another thread or process at {user_site() or 'an unknown line'}, where it cannot be "
                "recorded; do it in the thread that calls forward"
            )
        return original(*args, **kwargs)

    return watched


def _holds_tensor(item: Any, depth: int = 4) -> bool:
    """Return whether something that is handed over is, holds or closes over tensors or modules, a few levels down."""
    if isinstance(item, (Tensor, nn.Module)):
        return True
    return depth > 0 and any(_holds_tensor(one, depth - 1) for one in (*_within(item), *_attributes(item)))


def _attributes(item: Any) -> Iterator[Any]:
    held = getattr(item, "__dict__", None)
    return iter(held.values() if isinstance(held, dict) and not isinstance(item, (type, ModuleType)) else ())


class OtherDice:
    """Detects a network that draws random numbers from Python or NumPy, which affect what it computes.

    Two runs that happened to draw the same numbers would look like one function. Generators that the network holds, or
    that its code finds in globals and closures, are watched, too.

    Args:
        root: The network.
    """

    def __init__(self, root: nn.Module) -> None:
        self._private = private_dice(root)
        self._before = self._states()

    def require_unmoved(self, where: str) -> None:
        """Raise if numbers were drawn.

        Args:
            where: The module that has just run.

        Raises:
            RewriteError: If so.
        """
        if self._states() != self._before:
            raise RewriteError(
                f"{where}: forward draws random numbers from Python or NumPy, so each pass may be another "
                "function; use a dropout or stochastic depth layer, or draw outside the network"
            )

    def _states(self) -> tuple[Any, ...]:
        state = np.random.get_state(legacy=False)["state"]
        return random.getstate(), state["pos"], state["key"].tobytes(), *map(_state, self._private)


def _state(dice: Any) -> Any:
    """Return the state of a generator, for comparison."""
    if isinstance(dice, random.Random):
        return dice.getstate()
    return repr(dice.bit_generator.state) if isinstance(dice, np.random.Generator) else repr(dice.get_state())


def private_dice(root: nn.Module) -> list[Any]:
    """Return the random generators that a network holds or that its code references."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    waiting: list[Any] = []
    for module in root.modules():
        waiting.extend(module.__dict__.values())
        for kind in type(module).__mro__:
            waiting.extend(vars(kind).values() if kind.__module__.partition(".")[0] not in _NOT_OWN else ())
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (Tensor, nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, _DICE):
            found[id(item)] = item
        waiting.extend(_within(item))
    return list(found.values())


def _within(item: Any) -> Iterator[Any]:
    """Yield what a container holds, or what the code of a function references."""
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, (list, tuple)):
        yield from item
    elif isinstance(item, MethodType):
        yield item.__func__
        yield item.__self__
    elif isinstance(item, FunctionType) and str(item.__module__).partition(".")[0] not in _NOT_OWN:
        yield from (cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell))
        yield from (item.__globals__[name] for name in _names(item.__code__) if name in item.__globals__)
        yield from item.__defaults__ or ()
    elif type(item).__name__ == "builtin_function_or_method":
        yield item.__self__  # a method of a generator


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises if empty
    except ValueError:
        return False
    return True


def _names(code: CodeType) -> list[str]:
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return [*code.co_names, *inner]
