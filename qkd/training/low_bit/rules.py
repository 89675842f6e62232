"""The rules that a student's training follows, as its config requests."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.optim import Optimizer

from qkd.config import LowBitConfig
from qkd.config.conflicts.idle import RULES
from qkd.training.job import StepRule
from qkd.training.low_bit.dampening import Dampening
from qkd.training.low_bit.oscillations import OscillationFreezing
from qkd.training.low_bit.step_sizes import BoundedStepSizes
from qkd.training.low_bit.transitions import GROUP, TransitionRate
from quantizers import quantizer_scales
from quantizers.recipes.codes import LowBitLayer, can_be_placed, has_steady_step, low_bit_layers

DECAY_FACTORS = {4: 0.25, 8: 0.5}  # by the number of values, of 2 and 3 bits (Esser et al. 2020, section 3.1)


def step_rules(student: nn.Module, config: LowBitConfig, optimizer: Optimizer) -> tuple[StepRule, ...]:
    """Return the rules of a training; optimizer groups are split if weights get their own rate or decay.

    Args:
        student: A network from :func:`quantizers.prepare`, calibrated.
        config: Which rules.
        optimizer: Updates its weights; created for this training.

    Returns:
        The rules, in the order in which they act; empty if all weights are treated alike.

    Raises:
        ValueError: If a rule moves weights onto codes, but their quantizer has no value for a single code (DoReFa), or
            fixes them there, but its step size is computed from them (stats).
    """
    layers = low_bit_layers(student)
    if not layers:  # for example, a student of eight bits on the way to fewer
        config = config.model_copy(update={key: LowBitConfig.model_fields[key].default for key in RULES})
    if config.places_weights and not all(can_be_placed(layer) for layer in layers.values()):
        raise ValueError(
            "student.low_bit: dampening and oscillation_thresholds need weight_quantizer lsq or stats: dorefa has "
            "no separate latent value for each code"
        )
    if config.oscillation_thresholds is not None and not all(has_steady_step(layer) for layer in layers.values()):
        raise ValueError(
            "student.low_bit: oscillation_thresholds needs weight_quantizer lsq: the step size of stats follows the "
            "weights, so that each freeze would move it, and with it all frozen weights"
        )
    if config.decay_by_bits or config.transition_rate is not None:
        _separate(optimizer, layers.values(), by_bits=config.decay_by_bits)
    rules: list[StepRule] = []
    if config.dampening:
        rules.append(Dampening(layers, config.dampening))
    if config.oscillation_thresholds is not None:
        rules.append(OscillationFreezing(layers, config.oscillation_thresholds, config.oscillation_momentum))
    if config.step_size_bound is not None and (
        scales := [one for one in quantizer_scales(student) if one.requires_grad]
    ):
        rules.append(BoundedStepSizes(scales, config.step_size_bound))
    if config.transition_rate is not None:  # last, since it counts the changes that the others leave
        rules.append(TransitionRate(layers, optimizer, config.transition_rate))
    return tuple(rules)


def idle_rules(student: nn.Module, config: LowBitConfig) -> list[str]:
    """Return the keys of rules that a config requests, but that act on no layer of a student.

    Args:
        student: A network from :func:`quantizers.prepare`.
        config: Which rules.
    """
    return [] if low_bit_layers(student) else [key for key in RULES if getattr(config, key)]


def _separate(optimizer: Optimizer, layers: Collection[LowBitLayer], *, by_bits: bool) -> None:
    """Move low-bit weights into separate groups, one per weight-decay factor."""
    factors = {id(layer.weight): DECAY_FACTORS.get(layer.quant.count, 1.0) if by_bits else 1.0 for layer in layers}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in factors]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in factors]
        for factor in sorted({factors[id(parameter)] for parameter in own}):
            same = [parameter for parameter in own if factors[id(parameter)] == factor]
            decay = factor * group["weight_decay"]
            optimizer.add_param_group({**group, "params": same, "role": GROUP, "weight_decay": decay})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
