"""Checks that images give the same output in a larger batch, at common sizes and those that the code asks about."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantizers.graph.form.refusal import RewriteError
from quantizers.graph.proving.counts import MOST_VOLUME, UNTRACKED, USUAL, SizesOfBatch
from quantizers.graph.proving.repeated import largest_difference, outputs_in_float64, steady, without_power_iterations
from quantizers.graph.recording.returned import tensors
from quantizers.modes import exact_float32

MOST_VALUES = 2**23  # of the images tried at once where the network asks: 55 of 3x224x224
USUAL_VALUES = 2**21  # and where it does not seem to: 13 images


def _with_sizes(twin: nn.Module, images: Tensor) -> tuple[list[Tensor], SizesOfBatch]:
    """Return the network's outputs, and the numbers of images that its code asks about."""
    sizes = SizesOfBatch(len(images))
    try:
        with sizes:
            return tensors(twin(images.clone())), sizes
    except Exception:  # code that rejects subclasses of int: what it asks about is unknown
        return tensors(twin(images.clone())), SizesOfBatch(len(images))


def require_same_of_more(twin: nn.Module, images: Tensor) -> None:
    """Raise if images give other outputs in a larger batch, at common sizes and those that the network asks about.

    Args:
        twin: A copy of the network, which runs in its current mode, apart from drop-out and batch statistics.
        images: The images that it was recorded on.

    Raises:
        RewriteError: If so, or if it asks about more images than are tried here.
    """
    with torch.no_grad(), exact_float32(), steady(without_power_iterations(twin)):
        try:
            expected, sizes = _with_sizes(twin, images)
        except RuntimeError:
            return  # it was recorded, so only this check fails
        cheap = [count for count in UNTRACKED if count * sizes.volume <= MOST_VOLUME * len(images)]
        tried = (*USUAL, *cheap) if sizes.is_untracked else USUAL
        usual = [count for count in tried if count * images[0].numel() <= USUAL_VALUES]
        _require_same_at(twin, images, expected, sorted({*sizes.candidates, *usual}))


def _require_same_at(twin: nn.Module, images: Tensor, expected: list[Tensor], counts: list[int]) -> None:
    mode = "train()" if twin.training else "eval()"
    for count in counts:
        if count <= len(images):
            continue
        if count * images[0].numel() > MOST_VALUES:
            raise RewriteError(
                f"{type(twin).__name__}: in {mode}, it checks whether there are about {count} images, more than are "
                "tried here, so it may be another function for them; make forward compute the same for every number of "
                "images, or skip this check with prepare(..., verify=False)"
            )
        repeats = (-(-count // len(images)), *(1,) * (images.dim() - 1))
        more = images.repeat(repeats)[:count]
        try:
            found = tensors(twin(more.clone()))
        except Exception:  # it rejects such a batch itself, so it is not another function there
            continue
        error = _difference_of_more(expected, found, len(images), count)
        if error is not None and (exact := outputs_in_float64(twin, images, more)) is not None:
            error = _difference_of_more(exact[0], exact[1], len(images), count)
        if error is not None:
            raise RewriteError(
                f"{type(twin).__name__}: computes something else in {mode} for {count} images than for "
                f"{len(images)} of them ({error}); make forward compute the same for every number of images"
            )


def _difference_of_more(expected: list[Tensor], found: list[Tensor], few: int, many: int) -> str | None:
    """Return how the first images of a larger batch differ, or None; outputs without a batch axis are skipped."""
    for before, after in zip(expected, found, strict=False):
        if before.dim() == 0 or len(before) != few:
            continue
        if tuple(after.shape) != (many, *before.shape[1:]):
            return f"its output has the shape {tuple(after.shape)}"
        error = largest_difference([before], [after[:few]])
        if error is not None:
            return f"they differ by {error:.3g}"
    return None
