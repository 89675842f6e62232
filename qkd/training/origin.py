"""The origin of a checkpoint: settings that must be the same to resume, and kernels whose changes are reported.

Settings are compared if both sides have them, so a version that adds a key still resumes from older checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qkd.agents.operations import native
from qkd.config.training import SAVING
from qkd.engines.engine import current
from qkd.moved import in_new_spelling
from qkd.run.identity import takes_what_was_chosen
from qkd.training.arithmetic.choice import Asked
from qkd.training.job import Job
from quantizers import is_fused

BIT_EQUAL = {"augmentation"}  # compiled or not, it gives the same bits: kept only for the record


def asked_of(job: Job) -> Asked:
    """Return what is requested of a training's arithmetic, and what a race needs to know about it."""
    # Methods that train more nets, some through second derivatives, keep float32 unless the config requests less.
    may_reduce = not job.partners and any(phase.allows_autocast for phase in job.phases)
    return Asked(
        job.config.precision, job.config.memory_format, job.config.epochs, job.splits.train.image_shape, job.model,
        job.device, job.folder, may_reduce, job.takes_images, tuple(job.others.values()),
    )  # fmt: skip


def settings_of(job: Job, batch_size: int) -> dict[str, Any]:
    """Return what a training's result depends on besides files and the net: plain values by name."""
    train, engine = job.config.model_dump(mode="json", exclude=set(SAVING)), current()
    return {
        **job.settings,
        **{f"train.{key}": value for key, value in train.items()},
        "role": job.role,
        "seed": job.seed,
        "batch_size": batch_size,
        "parts of a batch with separate batch-norm statistics": 1 if engine.synchronizes else engine.size,
        "training images": len(job.splits.train),
        "validation images": len(job.splits.val),
        "phases": [[phase.name, phase.epochs, phase.lr_factor] for phase in job.phases],
    }


def kernels_of(job: Job) -> dict[str, Any]:
    """Return which kernels run: results with other kernels are as good, but not identical to the last bit."""
    found: dict[str, Any] = {"device": job.device.type, "devices": current().size}
    if job.device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    if any(True for _ in job.scales()):
        found["quantizer kernels"] = "fused" if is_fused() else "eager"
    if native.load.cache_info().currsize:  # otherwise no image has been augmented yet, and a call would compile it
        found["augmentation"] = "compiled" if native.load() is not None else "not compiled"
    return found


def other_settings(then: object, now: Mapping[str, Any]) -> list[str]:
    """Return a text for each setting that has changed."""
    if not isinstance(then, Mapping):
        return []
    before = in_new_spelling(then, is_stored=True)
    return [f"{key}: {before[key]!r} then, {now[key]!r} now" for key in sorted(before.keys() & now.keys())
            if before[key] != now[key] and not takes_what_was_chosen(key, now[key])]  # fmt: skip


def other_kernels(then: object, now: Mapping[str, Any]) -> list[str]:
    """Return a text for each kind of kernel that has changed, except those with bit-equal results."""
    kept = {key: value for key, value in now.items() if key not in BIT_EQUAL}
    return other_settings(then, kept)
