"""Feature taps: read the outputs of named modules during a forward pass, as plain (dequantized) tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qkd.foreign import nearest
from quantizers.layers import ActQuantizer

PRE_QUANT = "@pre_quant"  # after a path: the values before the grid


class Taps:
    """Forward hooks on named modules, as a context manager; outside the block the model has none of these hooks.

    Args:
        model: The net.
        paths: Module paths as in the config. For a student these are paths of its *float* net. With ``PRE_QUANT``
            after a path, a low-bit net gives the values that its quantizer rounds there, rectified as the quantizer
            does; a float net, which rounds nothing, gives the output.
        translate: Path -> path within ``model`` (a student's ``tap_paths``). If omitted: the model's own paths.
        role: ``teacher`` or ``student``, for errors.

    Raises:
        ValueError: If a path does not name a module (the message lists near matches), or the values before the grid are
            requested from a module without a quantizer.

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
            is_before = path.endswith(PRE_QUANT) and isinstance(module, ActQuantizer)
            hook = self._reader_before(path, module) if is_before else self._reader(path)
            self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._values.clear()

    def take(self) -> dict[str, Tensor]:
        """Return path -> output of the latest forward pass, and drop them to free memory.

        Raises:
            RuntimeError: If a tapped module did not run.
        """
        missing = [path for path in self._modules if path not in self._values]
        if missing:
            raise RuntimeError(f"tapped modules did not run in the forward pass: {', '.join(missing)}")
        values, self._values = self._values, {}
        return values

    def _reader_before(self, path: str, module: nn.Module) -> Any:
        quant = cast(ActQuantizer, module).quant

        def read(_module: nn.Module, inputs: tuple[object, ...], _output: object) -> None:
            value = dequantized(inputs[0], path)
            value = value.relu() if quant.kind == "unsigned" else value  # the clip at zero is the float net's ReLU
            self._values[path] = value if quant.largest is None else value.clamp_max(quant.largest)

        return read

    def _reader(self, path: str) -> Any:
        def read(_module: nn.Module, _inputs: object, output: object) -> None:
            self._values[path] = dequantized(output, path)

        return read


def why_no_features(net: nn.Module) -> str:
    """Return why losses cannot read a net's features, for nets that declare this themselves; empty if they can."""
    return str(getattr(net, "without_features", ""))


def tap_paths_of(model: nn.Module) -> Mapping[str, str] | None:
    """Return the ``translate`` argument of :class:`Taps`: a low-bit net's ``tap_paths``, None for a float net."""
    return getattr(model, "tap_paths", None)


def dequantized(output: object, path: str = "module") -> Tensor:
    """Return the plain tensor of a module's output.

    Args:
        output: A tensor, a Brevitas quant tensor (its real values are used), or a tuple that starts with one.
        path: Name of the module, for the error.

    Returns:
        Real values, with the output's shape.

    Raises:
        TypeError: If there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    value = getattr(output, "value", None)  # IntQuantTensor is a named tuple: value, scale, zero point, ...
    if isinstance(value, Tensor):
        return value
    if isinstance(output, tuple | list) and output:
        return dequantized(output[0], path)
    raise TypeError(f"the output of module {path} is a {type(output).__name__}, not a tensor; tap another module")


def _resolve(
    model: nn.Module, paths: tuple[str, ...], translate: Mapping[str, str] | None, role: str
) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    known: Collection[str] = translate if translate is not None else [name for name in modules if name]
    found = {}
    for key in paths:
        path = key.removesuffix(PRE_QUANT)
        inner = translate.get(path) if translate is not None else path
        if not inner or inner not in modules:
            raise ValueError(f"taps: the {role} has no module {path!r}; {_near(path, known)}")
        if key != path and translate is not None and not isinstance(modules[inner], ActQuantizer):
            rounding = [name for name, own in translate.items() if isinstance(modules.get(own), ActQuantizer)]
            raise ValueError(
                f"taps: {path!r} of the {role} does no rounding, so it has no values before a grid (tap: pre_quant); "
                f"these have: {', '.join(rounding[:12])}"
            )
        found[key] = modules[inner]
    return found


def _near(path: str, known: Collection[str]) -> str:
    close = nearest(path, known, most=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"`{name}`" for name in close) + "?"
    return f"it has: {', '.join(list(known)[:12])}{', ...' if len(known) > 12 else ''}"
