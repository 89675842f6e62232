"""A short race: training steps on a copy of a net, in each arithmetic it could run in, one after another."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkd.engines.engine import alone
from qkd.training.arithmetic.precision import choose_precision
from quantizers.modes import evaluating

WARMUP, ROUNDS = 1, 3  # steps per candidate; the minimum counts, since any disturbance makes a step longer

_log = logging.getLogger(__name__)

TORCH_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def race(
    model: nn.Module, shape: tuple[int, ...], candidates: Sequence[tuple[str, str]], device: torch.device
) -> dict[tuple[str, str], float]:
    """Return each candidate's milliseconds per step: forward and backward pass in training mode.

    Candidates in which the model fails are left out, e.g. channels_last if it takes a ``view`` of a convolution's
    output; if the model cannot be copied, all are. Faults of the model are reported by its training.

    Args:
        model: The model at its start; a copy runs, so neither the model nor any random generator changes.
        shape: Shape of a batch, ``[images, channels, height, width]``.
        candidates: Pairs of precision and memory format; a single one is not timed.
        device: Where the model is.
    """
    if len(candidates) < 2:
        return dict.fromkeys(candidates, 0.0)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), alone():
        torch.manual_seed(0)
        images = torch.randn(shape, device=device)
        steps = {one: _made(model, images, *one) for one in candidates}
        times: dict[tuple[str, str], list[float]] = {one: [] for one in candidates}
        for turn in range(WARMUP + ROUNDS):
            for one, step in steps.items():
                took = None if step is None else _timed(step, device)
                if took is None:
                    steps[one] = None
                elif turn >= WARMUP:
                    times[one].append(took)
    return {one: min(times[one]) * 1e3 for one, step in steps.items() if step is not None}


def takes_channels_last(net: nn.Module, image_shape: tuple[int, int, int], device: torch.device) -> bool:
    """Return whether a net that gets the same images as a training accepts channels_last, without changing it.

    Args:
        net: A teacher, for example. A net that is not called with images takes no format, which is not an objection.
        image_shape: Channels, height and width.
        device: Where it is.
    """
    images = torch.zeros((2, *image_shape), device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(net), torch.no_grad():
        return _runs(net, images.contiguous(memory_format=torch.channels_last)) or not _runs(net, images)


def is_misread_in_channels_last(net: nn.Module) -> bool:
    """Return whether a net has a convolution that PyTorch 2.14 may compute from memory behind its images.

    On a CPU, in channels_last, a convolution of one channel with unequal strides, three and more to the right, gives
    wrong values where its output is one column wide.

    Args:
        net: A net that may be trained, or run, in channels_last.
    """
    return any(
        isinstance(one, nn.Conv2d) and one.in_channels == 1 and one.stride[0] != one.stride[1] and one.stride[1] >= 3
        for one in net.modules()
    )


def _runs(net: nn.Module, images: Tensor) -> bool:
    try:
        net(images)
    except Exception as error:  # the user's net may raise anything
        _log.info("a net does not run on images of strides %s: %s", images.stride(), error)
        return False
    return True


def _made(model: nn.Module, images: Tensor, precision: str, memory_format: str) -> Callable[[], None] | None:
    try:
        return _step(model, images, precision, memory_format)
    except Exception as error:  # the user's net may raise anything
        _log.info("no race in %s, %s: %s", precision, memory_format, error)
        return None


def _step(model: nn.Module, images: Tensor, precision: Any, memory_format: str) -> Callable[[], None]:
    net = copy.deepcopy(model).train().to(memory_format=TORCH_FORMATS[memory_format])
    images = images.contiguous(memory_format=TORCH_FORMATS[memory_format])
    arithmetic, _ = choose_precision(precision, images.device)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with arithmetic.context():
            logits = net(images)
        logits.float().square().mean().backward()

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float | None:
    try:
        _finish(device)
        start = time.perf_counter()
        step()
        _finish(device)
    except Exception as error:
        _log.info("a candidate of the race does not run: %s", error)
        return None
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
