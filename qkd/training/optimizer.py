"""The optimizer of a training: parameter groups with separate rates, and the rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from qkd.config import TrainConfig
from qkd.training.job import Partner


def build_optimizer(
    model: nn.Module,
    config: TrainConfig,
    scales: Iterable[nn.Parameter] = (),
    partners: Iterable[Partner] = (),
) -> Optimizer:
    """Build the optimizer of a training.

    There are three groups, without the empty ones: ``weights`` (rank 2 and higher, with weight decay), ``offsets``
    (biases and norms, without), ``scales`` (quantizer scales, without, at ``scale_lr_factor`` times the learning rate).
    Each group has the keys ``role`` and ``lr_factor``.

    Args:
        model: Its parameters that require a gradient are trained.
        config: Kind, learning rate, momentum and weight decay.
        scales: Parameters of the model that are quantizer scales, whatever their rank.
        partners: Nets trained along with it: up to three more groups each, with their own learning-rate factor.

    Returns:
        SGD with Nesterov momentum, or AdamW.

    Raises:
        ValueError: If the model has nothing to train.
    """
    groups = _groups(model, config, {id(scale) for scale in scales})
    if not groups:
        raise ValueError("the model has no trainable parameters: none of them requires a gradient")
    for partner in partners:
        groups += _groups(partner.module, config, {id(scale) for scale in partner.scales()}, partner.lr_factor)
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0  # the Nesterov form needs momentum
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=config.lr)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group: ``lr`` times the group's ``lr_factor``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def _groups(model: nn.Module, config: TrainConfig, scale_ids: set[int], factor: float = 1.0) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scales = [parameter for parameter in trained if id(parameter) in scale_ids]
    others = [parameter for parameter in trained if id(parameter) not in scale_ids]
    weights = [parameter for parameter in others if parameter.dim() >= 2]
    offsets = [parameter for parameter in others if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"role": "weights", "params": weights, "weight_decay": config.weight_decay, "lr_factor": factor},
        {"role": "offsets", "params": offsets, "weight_decay": 0.0, "lr_factor": factor},
        {"role": "scales", "params": scales, "weight_decay": 0.0, "lr_factor": factor * config.scale_lr_factor},
    ]
    for group in groups:
        group["lr"] = config.lr * group["lr_factor"]
    return [group for group in groups if group["params"]]


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of one optimizer step.

    Args:
        config: Peak rate, kind of schedule, warm-up and length.
        step: Steps done before this one, over all epochs, from 0.
        steps_per_epoch: Optimizer steps per epoch.

    Returns:
        The rate. The warm-up rises linearly and reaches the peak at its last step. ``cosine`` falls from the peak
        toward 0 over the steps after the warm-up; ``step`` multiplies by ``gamma`` at each milestone (a fraction of
        all steps, warm-up included); ``constant`` stays at the peak.
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
