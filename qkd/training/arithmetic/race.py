"""A short race: steps of a training's net in each arithmetic it could run in, in turn, on a copy."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkd.engines.engine import alone
from qkd.training.arithmetic.precision import choose_precision

WARMUP, ROUNDS = 1, 3  # steps a candidate; the least time counts: whatever disturbs a step makes it longer

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def race(
    model: nn.Module, shape: tuple[int, ...], candidates: Sequence[tuple[str, str]], device: torch.device
) -> dict[tuple[str, str], float]:
    """Return milliseconds a step of each candidate: forward and backward pass in training mode.

    Args:
        model: At its start; a copy runs, and nothing of the model or of random generators changes.
        shape: Of a batch, ``[images, channels, height, width]``.
        candidates: Pairs of precision and memory format; one alone is not timed.
        device: Where the model is.
    """
    if len(candidates) < 2:
        return dict.fromkeys(candidates, 0.0)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), alone():
        torch.manual_seed(0)
        images = torch.randn(shape, device=device)
        steps = {one: _step(model, images, *one) for one in candidates}
        times: dict[tuple[str, str], list[float]] = {one: [] for one in candidates}
        for turn in range(WARMUP + ROUNDS):
            for one, step in steps.items():
                took = _timed(step, device)
                if turn >= WARMUP:
                    times[one].append(took)
    return {one: min(took) * 1e3 for one, took in times.items()}


def _step(model: nn.Module, images: Tensor, precision: Any, memory_format: str) -> Callable[[], None]:
    net = copy.deepcopy(model).train().to(memory_format=FORMATS[memory_format])
    images = images.contiguous(memory_format=FORMATS[memory_format])
    arithmetic, _ = choose_precision(precision, images.device)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with arithmetic.context():
            logits = net(images)
        logits.float().square().mean().backward()

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
    _finish(device)
    start = time.perf_counter()
    step()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
