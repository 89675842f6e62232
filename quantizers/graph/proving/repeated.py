"""Checks that a network computes the same each time it runs, alone or in a batch, so that one recording is enough."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode

from quantizers.graph.form.kinds import is_stochastic_depth
from quantizers.graph.form.refusal import RewriteError
from quantizers.graph.recording.gradients import without_checkpoints
from quantizers.graph.recording.interception import instrumented
from quantizers.graph.recording.returned import tensors
from quantizers.graph.spelling.sites import stochastic_depth_of
from quantizers.graph.spelling.table import BATCH_NORMS, DROPOUT_MODULES
from quantizers.modes import exact_float32

TRAINING_PASSES = 3  # a step that is skipped with probability 1/2 goes unnoticed one time in four
_STATE = "it draws random numbers, checks whether gradients are enabled, or changes its own state"
_WAY_OUT = "count and draw outside the network, or use a dropout layer"


class _Steady(TorchFunctionMode):
    """Makes drop-out the identity and batch norm use its running statistics."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            is_dropout, names = func in DROPOUT_MODULES, BATCH_NORMS.get(func)
        except TypeError:  # not hashable
            return func(*args, **kwargs)
        if is_dropout:
            return args[0] if args else kwargs["input"]
        if getattr(func, "__name__", "").strip("_") == "mul" and stochastic_depth_of() is not None:
            return args[0]
        if names is None:
            return func(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given["training"] = given["running_mean"] is None
        return torch.nn.functional.batch_norm(**{k: v for k, v in given.items() if k != "cudnn_enabled"})


def _steady(path: str, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if is_stochastic_depth(module):
        return args[0] if args else next(iter(kwargs.values()))
    return forward(*args, **kwargs)


@contextlib.contextmanager
def steady(root: nn.Module) -> Iterator[None]:
    """Make drop-out of ``root`` the identity and batch norm use its running statistics within the block."""
    contexts = (
        without_checkpoints(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"),
        instrumented(root, _steady), _Steady(),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def require_same_in_eval(root: nn.Module, images: Tensor, recorded: Any) -> None:
    """Raise if a second pass in eval mode, or the first image by itself, gives another result than was recorded.

    Args:
        root: The network; a copy of it runs.
        images: The images that it was recorded on.
        recorded: What it returned then.

    Raises:
        RewriteError: If so.
    """
    name = type(root).__name__
    with (
        torch.no_grad(),
        exact_float32(),
        torch.random.fork_rng(devices=[]),
        torch.compiler.set_stance("force_eager"),
    ):
        twin = copy.deepcopy(root).eval()
        _compare(f"{name}: two passes in eval() on the same images", tensors(recorded), tensors(twin(images.clone())))
        try:
            alone = tensors(twin(images[:1].clone()))
        except Exception:  # such as a squeeze that drops the batch axis: nothing to compare with
            return
        error = _difference_alone(tensors(recorded), alone)
        if error is not None and (exact := outputs_in_float64(twin, images, images[:1])) is not None:
            error = _difference_alone(exact[0], exact[1])
    if error is not None:
        raise RewriteError(
            f"{name}: computes something else for a single image than for the same image in a batch (they differ by "
            f"{error:.3g}); make forward compute the same for every number of images"
        )


def _difference_alone(together: list[Tensor], alone: list[Tensor]) -> float | None:
    """Return how the first image of a batch differs from the same image by itself."""
    first = [tensor[:1] for tensor in together]
    pairs = [(a, b.reshape(a.shape)) for a, b in zip(first, alone, strict=False) if a.numel() == b.numel()]
    return largest_difference([a for a, _ in pairs], [b for _, b in pairs])


def require_same_in_training(root: nn.Module, images: Tensor) -> None:
    """Raise if passes in training mode on the same images differ, apart from drop-out.

    This misses what happens rarely, or only after many passes. Spectral norm is exempt: its estimates converge.

    Args:
        root: The network, in training mode; a copy of it runs.
        images: The images that it was recorded on.

    Raises:
        RewriteError: If they differ, or a pass replaces a parameter.
    """
    twin = without_power_iterations(copy.deepcopy(root))
    name, before = type(root).__name__, dict(twin.named_parameters())
    first: list[Tensor] | None = None
    with steady(twin):
        for _ in range(TRAINING_PASSES):
            try:
                again = [tensor.detach().clone() for tensor in tensors(twin(images.clone()))]
            except RuntimeError:
                return  # it was recorded, so only this check fails
            if first is not None:
                _compare(f"{name}: two passes in train() on the same images", first, again)
            first = again
    after = dict(twin.named_parameters())
    replaced = [path for path in before if after.get(path) is not before[path]]
    if replaced or len(after) > len(before):
        raise RewriteError(
            f"{name}: forward replaces the parameter `{(replaced or list(after))[-1]}`, so no optimizer trains it; "
            "create parameters once, in __init__, and compute weights from them"
        )


def without_power_iterations(root: nn.Module) -> nn.Module:
    """Return the network with spectral norms that no longer refine their estimates when it runs."""
    for module in root.modules():
        if isinstance(module, _SpectralNorm):
            module.eval()
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                hook.n_power_iterations = 0
    return root


def _compare(what: str, first: list[Tensor], second: list[Tensor]) -> None:
    error = largest_difference(first, second)
    if error is not None:
        raise RewriteError(f"{what} differ by {error:.3g}; {_STATE}; {_WAY_OUT}")


def outputs_in_float64(root: nn.Module, *batches: Tensor) -> list[list[Tensor]] | None:
    """Return a network's outputs of each batch, computed in float64; None if it or the device has only float32.

    Outputs that differ in float32 and agree here differ by rounding, which some networks amplify: those whose values
    grow from layer to layer, for example, as they do with untrained batch norms.
    """
    try:
        with _in_float64(root):
            return [tensors(root(images.double())) for images in batches]
    except Exception:
        return None


@contextlib.contextmanager
def _in_float64(root: nn.Module) -> Iterator[None]:
    """Hold parameters and buffers of a network in float64 within the block; afterward they are as before."""
    held = [one for one in (*root.parameters(), *root.buffers()) if one.is_floating_point()]
    before = [one.data for one in held]
    try:
        for one in held:
            one.data = one.data.double()
        yield
    finally:
        for one, values in zip(held, before, strict=True):
            one.data = values


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float | None:
    """Return the largest difference beyond float rounding, or None if there is none."""
    for before, after in zip(first, second, strict=True):
        if before.shape != after.shape:
            return float("inf")
        if not torch.allclose(before, after, rtol=1e-3, atol=_rounding(before), equal_nan=True):
            error = (before - after).abs()
            return float(error[~error.isnan()].max()) if bool((~error.isnan()).any()) else float("nan")
    return None


def _rounding(tensor: Tensor) -> float:
    """Return the largest difference due to rounding: reordered sums err by a fraction of their largest terms."""
    values = tensor.detach()
    finite = values[values.isfinite()].abs()
    return 1e-5 * max(1.0, float(finite.max())) if finite.numel() else 1e-5
