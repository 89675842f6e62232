"""Feature taps: read what named modules put out during a forward pass, as plain (dequantised) tensors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Taps:
    """Forward hooks on named modules, as a context manager; outside the block the model has no hook of ours.

    Args:
        model: The net.
        paths: Module paths as the config names them. For a student these are paths of its *float* net.
        translate: Path -> path within ``model`` (a student's ``tap_paths``); absent: the paths are the model's own.
        role: ``teacher`` or ``student``, for errors.

    Raises:
        ValueError: If a path names no module; the message lists near matches.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> import torch
        >>> with Taps(net, ["0"]) as taps:
        ...     _ = net(torch.zeros(3, 2, 2))
        ...     {path: tuple(value.shape) for path, value in taps.take().items()}
        {'0': (3, 4)}
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Iterable[str],
        *,
        translate: Mapping[str, str] | None = None,
        role: str = "model",
    ) -> None:
        self._modules = _resolve(model, tuple(paths), translate, role)
        self._handles: list[RemovableHandle] = []
        self._values: dict[str, Tensor] = {}

    def __enter__(self) -> Taps:
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._reader(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._values.clear()

    def take(self) -> dict[str, Tensor]:
        """Return path -> output of the latest forward pass, and forget them (so that memory is freed).

        Raises:
            RuntimeError: If a tapped module did not run.
        """
        missing = [path for path in self._modules if path not in self._values]
        if missing:
            raise RuntimeError(f"tapped modules did not run in the forward pass: {', '.join(missing)}")
        values, self._values = self._values, {}
        return values

    def _reader(self, path: str) -> Any:
        def read(_module: nn.Module, _inputs: object, output: object) -> None:
            self._values[path] = dequantised(output, path)

        return read


def tap_paths_of(model: nn.Module) -> Mapping[str, str] | None:
    """Return what :class:`Taps` takes as ``translate``: a low-bit net's ``tap_paths``, None for a float one."""
    return getattr(model, "tap_paths", None)


def dequantised(output: object, path: str = "module") -> Tensor:
    """Return the plain tensor of a module's output.

    Args:
        output: A tensor, a Brevitas quant tensor (its real values are taken), or a tuple that begins with one.
        path: Name of the module, for the error.

    Raises:
        TypeError: If there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    value = getattr(output, "value", None)  # IntQuantTensor is a named tuple: value, scale, zero point, ...
    if isinstance(value, Tensor):
        return value
    if isinstance(output, tuple | list) and output:
        return dequantised(output[0], path)
    raise TypeError(f"the output of module {path} is a {type(output).__name__}, not a tensor; tap another module")


def _resolve(
    model: nn.Module, paths: tuple[str, ...], translate: Mapping[str, str] | None, role: str
) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    known: Collection[str] = translate if translate is not None else [name for name in modules if name]
    found = {}
    for path in paths:
        inner = translate.get(path) if translate is not None else path
        if not inner or inner not in modules:
            raise ValueError(f"taps: the {role} has no module {path!r}; {_near(path, known)}")
        found[path] = modules[inner]
    return found


def _near(path: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"`{name}`" for name in close) + "?"
    return f"it has: {', '.join(list(known)[:12])}{', ...' if len(known) > 12 else ''}"
