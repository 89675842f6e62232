"""The data-free methods by name: what each needs from a teacher, and the weights that a config may set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A row of :data:`KINDS`.

    Args:
        about: A short description, with the source.
        weights: Weights of its loss by keyword, with their default values.
        needs_statistics: Whether it reads running statistics of the teacher's batch norms.
        needs_last_layer: Whether it reads the input to the teacher's last linear layer, or its weights.
        condition: How a class is passed to the generator.
    """

    about: str
    weights: Mapping[str, float] = field(default_factory=dict)
    needs_statistics: bool = False
    needs_last_layer: bool = False
    condition: str = "none"


_DAFL = {"one_hot_weight": 1.0, "balance_weight": 5.0, "activation_weight": 0.1}
KINDS: Mapping[str, Kind] = {
    "noise": Kind("images of N(0, 1): the baseline for every other method"),
    "procedural": Kind("random fields, windows and curves: made from neither data nor the teacher"),
    "rdskd": Kind("RDSKD (Han et al. 2021): exponentially penalized increments, no weights"),
    "dafl": Kind("DAFL (Chen et al. 2019), its generator trained first", _DAFL, needs_last_layer=True),
    "mskd": Kind("MSKD (our reading): DAFL with mode seeking", {"diversity_weight": 1.0}, needs_last_layer=True),
    "gdfq": Kind(
        "GDFQ (Xu et al. 2020): a class-conditional generator",
        {"statistics_weight": 0.1},
        needs_statistics=True,
        condition="product",
    ),
    "generative": Kind(
        "large-scale generative (2020; our reading): generators for groups of classes",
        {"statistics_weight": 1.0},
        needs_statistics=True,
        condition="one_hot",
    ),
    "deep_inversion": Kind(
        "DeepInversion (Yin et al. 2020)",
        {"variation_weight": 2.5e-5, "statistics_weight": 10.0, "norm_weight": 0.0},
        needs_statistics=True,
    ),
    "zskd": Kind("ZSKD (Nayak et al. 2019): images for targets of a Dirichlet distribution", needs_last_layer=True),
    "cmi": Kind(
        "CMI (Fang et al. 2021) without an adversary: inversion through a generator, and contrast",
        {"statistics_weight": 1.0, "one_hot_weight": 1.0, "contrast_weight": 0.8},
        needs_statistics=True,
    ),
    "zskt": Kind("ZSKT (Micaelli, Storkey 2019): divergence against the student"),
    "dfad": Kind("DFAD (Fang et al. 2019): distance of logits against the student"),
    "dfq": Kind(
        "DFQ (Choi et al. 2020): divergence against the student, statistics, balanced classes",
        {"adversarial_weight": 1.0, "statistics_weight": 1.0, "one_hot_weight": 1.0, "balance_weight": 20.0},
        needs_statistics=True,
    ),
    "dafl_joint": Kind(
        "DAFL (Chen et al. 2019), generator and student in one step, as published", _DAFL, needs_last_layer=True
    ),
    "adaptive_inversion": Kind(
        "Adaptive DeepInversion (Yin et al. 2020): inversion against the current student",
        {"variation_weight": 2.5e-5, "statistics_weight": 10.0, "norm_weight": 0.0, "competition_weight": 1.0},
        needs_statistics=True,
    ),
    "cmi_adversarial": Kind(
        "CMI (Fang et al. 2021), with its decision-adversarial term",
        {"statistics_weight": 1.0, "one_hot_weight": 0.5, "adversarial_weight": 0.5, "contrast_weight": 0.8},
        needs_statistics=True,
    ),
    "fast_dfkd": Kind(
        "Fast-DFKD (Fang et al. 2022): every batch starts from a meta-learned generator",
        {"statistics_weight": 10.0, "one_hot_weight": 0.5, "adversarial_weight": 1.0},
        needs_statistics=True,
    ),
}


def weights_of(method: str, given: Mapping[str, float]) -> dict[str, Any]:
    """Return the weights of a method's loss: its defaults, overridden by a config."""
    return {**KINDS[method].weights, **given}
