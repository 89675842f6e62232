"""The learning rate of a step: a linear warm-up, then a cosine, steps or a constant."""

from __future__ import annotations

import math

from qkd.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of one optimizer step.

    Args:
        config: Peak rate, kind of schedule, warm-up and length.
        step: Steps done before this one, over all epochs, from 0.
        steps_per_epoch: Optimizer steps an epoch.

    Returns:
        The rate. The warm-up rises linearly and reaches the peak at its last step. ``cosine`` falls from the peak
        towards 0 over the steps after the warm-up; ``step`` multiplies by ``gamma`` at each milestone (a fraction of
        all steps, warm-up included); ``constant`` stays.
    """
    total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    if config.schedule == "step":
        passed = sum(step >= round(milestone * total) for milestone in config.milestones)
        return config.lr * float(config.gamma**passed)
    return config.lr
