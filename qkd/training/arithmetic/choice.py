"""A training's arithmetic, where it is stored, and how it is chosen when the config requests none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkd.engines.engine import current
from qkd.files import DamagedFileError, read_json, write_json
from qkd.moved import in_new_spelling
from qkd.training.arithmetic.native import has_native_bf16
from qkd.training.arithmetic.precision import PRECISIONS
from qkd.training.arithmetic.race import TORCH_FORMATS, is_misread_in_channels_last, race, takes_channels_last

FILE = "arithmetic.json"  # in a training's folder
FORMATS = tuple(TORCH_FORMATS)

# A race takes at most sixteen steps, without the teacher's part: a training below these limits is too short to gain.
LEAST_STEPS = 800
LEAST_VALUES = 50_000_000  # pixel values seen in total, including channels: a seventh of an epoch of CIFAR-10
MARGIN = 0.9  # of float32's time: reduced precision must be faster than this to be worth its rounding


@dataclass(frozen=True)
class Choice:
    """A training's arithmetic.

    Args:
        precision: ``float32``, ``bf16`` or ``fp16``, which are mixed with float32.
        memory_format: ``contiguous`` or ``channels_last``.
        reason: Why it was chosen, for the user.
        step_ms: Milliseconds per step of the race, by candidate; empty if no race was run.
    """

    precision: str
    memory_format: str
    reason: str
    step_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def torch_format(self) -> torch.memory_format:
        """Return the memory format as a PyTorch object."""
        return TORCH_FORMATS[self.memory_format]

    def told(self) -> str:
        """Return the choice as one line of text, with the times of the race."""
        times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in self.step_ms.items() if ms)
        return (
            f"trains in {self.precision}, {self.memory_format}: {self.reason}{f' ({times} per step)' if times else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "precision": self.precision, "memory_format": self.memory_format, "reason": self.reason,
            "step_ms": dict(self.step_ms),
        }  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What is requested of a training's arithmetic, and what a race needs to know about the training.

    Args:
        precision: ``auto``, or one of ``PRECISIONS``.
        memory_format: ``auto``, or one of ``FORMATS``.
        epochs: Length of the training.
        image_shape: Channels, height and width.
        model: The model at its start.
        device: Where the model is.
        folder: The training's folder, where a choice is stored.
        may_reduce: Whether ``auto`` may become bfloat16.
        takes_images: Whether a race can call the model with images alone.
        others: Nets that may get the same images, such as a teacher.
    """

    precision: str
    memory_format: str
    epochs: int
    image_shape: tuple[int, int, int]
    model: nn.Module
    device: torch.device
    folder: Path
    may_reduce: bool
    takes_images: bool = True
    others: tuple[nn.Module, ...] = ()


def unraced(asked: Asked) -> Choice:
    """Return the arithmetic without a race: as requested, with ``auto`` meaning float32 and contiguous."""
    precision = "float32" if asked.precision == "auto" else asked.precision
    memory_format = "contiguous" if asked.memory_format == "auto" else asked.memory_format
    return Choice(precision, memory_format, "no race")


def decided(asked: Asked, batch_size: int, images: int, state: Mapping[str, Any] | None) -> Choice:
    """Return a training's arithmetic: as requested, as it began, or a race's winner; the same on all processes.

    Args:
        asked: What is requested.
        batch_size: Images per batch, over all devices.
        images: Images per epoch.
        state: State of the checkpoint that it resumes from; None at the beginning.

    Raises:
        OSError: If the choice cannot be written.
    """
    plain = unraced(asked)
    if "auto" not in (asked.precision, asked.memory_format):
        return Choice(plain.precision, plain.memory_format, "as requested")
    if state is not None:
        began = _stored(state)
    elif why := _no_race(asked, batch_size, images):
        began = replace(plain, reason=why)
    else:  # the first process also reads the file: another's folder may be on another machine
        share = batch_size // current().size  # what a process computes; within `first`, it is alone
        began = _of(current().first(lambda: (_kept(asked) or _raced(asked, share)).to_json()))
    found = _with_wishes(asked, began)
    if found.step_ms and _read(asked.folder / FILE) != found:
        write_json(asked.folder / FILE, found.to_json())
    return found


def _with_wishes(asked: Asked, began: Choice) -> Choice:
    precision = began.precision if asked.precision == "auto" else asked.precision
    memory_format = began.memory_format if asked.memory_format == "auto" else asked.memory_format
    return Choice(precision, memory_format, began.reason, began.step_ms)


def _no_race(asked: Asked, batch_size: int, images: int) -> str:
    if not asked.takes_images:
        return "no race: the net does not take images"
    steps = asked.epochs * (images // batch_size)
    channels, height, width = asked.image_shape
    values = steps * batch_size * channels * height * width
    if steps >= LEAST_STEPS and values >= LEAST_VALUES:
        return ""
    return (
        f"no race: {steps:,} steps and {values:,} pixel values; a race pays off from {LEAST_STEPS:,} steps and "
        f"{LEAST_VALUES:,} values"
    )


def _raced(asked: Asked, images: int) -> Choice:
    candidates = _candidates(asked)
    shape = (images, *asked.image_shape)
    times = race(asked.model, shape, candidates, asked.device)
    if not times:
        return replace(unraced(asked), reason="no race: the net does not run on random images")
    best = winner(times)
    shown = {_name(*one): round(ms, 2) for one, ms in times.items()}
    if len(candidates) == 1:
        return Choice(*best, "nothing to race against", shown)
    missing = ", ".join(_name(*one) for one in candidates if one not in times)
    reason = f"fastest of {len(times)} in a race"
    return Choice(*best, f"{reason}; the net does not run in {missing}" if missing else reason, shown)


def _name(precision: str, memory_format: str) -> str:
    return f"{precision} {memory_format}"


def winner(times: Mapping[tuple[str, str], float]) -> tuple[str, str]:
    """Return the fastest candidate, or float32 if reduced precision gains less than a tenth.

    Args:
        times: Pairs of precision and memory format -> milliseconds per step.
    """
    best = min(times, key=lambda one: times[one])
    in_float = min((one for one in times if one[0] == "float32"), key=lambda one: times[one], default=best)
    return in_float if times[best] > MARGIN * times[in_float] else best


def _candidates(asked: Asked) -> list[tuple[str, str]]:
    precisions = ["float32"] if asked.precision == "auto" else [asked.precision]
    if asked.precision == "auto" and asked.may_reduce and has_native_bf16(asked.device):
        precisions.append("bf16")
    formats = FORMATS if asked.memory_format == "auto" else (asked.memory_format,)
    if asked.memory_format == "auto" and (
        any(is_misread_in_channels_last(net) for net in (asked.model, *asked.others))
        or not all(takes_channels_last(net, asked.image_shape, asked.device) for net in asked.others)
    ):
        formats = FORMATS[:1]
    return [(precision, memory_format) for precision in precisions for memory_format in formats]


def _stored(state: Mapping[str, Any]) -> Choice:
    """Return a checkpoint's arithmetic; checkpoints of versions without a choice have it in their settings."""
    if "arithmetic" in state:
        return _of(state["arithmetic"])
    settings = in_new_spelling(state.get("settings") or {}, is_stored=True)
    precision, memory_format = settings.get("train.precision"), settings.get("train.memory_format")
    return Choice(
        precision if precision in PRECISIONS else "float32",
        memory_format if memory_format in FORMATS else "contiguous",
        "as before",
    )


def _kept(asked: Asked) -> Choice | None:
    """Return the choice stored in the folder, unless this training could not have made it."""
    found = _read(asked.folder / FILE)
    is_candidate = found is not None and (found.precision, found.memory_format) in _candidates(asked)
    return found if is_candidate else None


def _read(file: Path) -> Choice | None:
    """Return the choice that a training in this folder began with; None if there is no readable one."""
    try:
        return _of(read_json(file))
    except (FileNotFoundError, DamagedFileError, ValueError, TypeError):
        return None


def _of(stored: Any) -> Choice:
    precision, memory_format = stored["precision"], stored["memory_format"]
    if precision not in PRECISIONS or memory_format not in FORMATS:
        raise ValueError(f"unknown arithmetic: {precision!r} with {memory_format!r}")
    return Choice(precision, memory_format, str(stored.get("reason", "")), dict(stored.get("step_ms") or {}))
