"""Allowed values of loss options, without the arithmetic, so that a config can be checked before torch is loaded."""

from __future__ import annotations

from typing import Literal

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 1e6  # beyond, rounding is all that is left of a softened distribution
HEADS = 4  # of MHGD's attention, as in role-kd; the authors of MHGD use 8

Attention = Literal["trained", "random"]
ATTENTIONS: tuple[Attention, ...] = ("trained", "random")
Criterion = Literal["confident", "close", "none", "all"]
CRITERIA: tuple[Criterion, ...] = ("confident", "close", "none", "all")
Divergence = Literal["abs", "exponential", "jeffreys", "kagan", "kl", "squared"]
DIVERGENCES: tuple[Divergence, ...] = ("abs", "exponential", "jeffreys", "kagan", "kl", "squared")
FlowReduction = Literal["mean", "row_mean"]
FLOW_REDUCTIONS: tuple[FlowReduction, ...] = ("mean", "row_mean")
Kernel = Literal["adaptive_rbf", "cauchy", "combined", "cosine", "rbf", "t"]
KERNELS: tuple[Kernel, ...] = ("adaptive_rbf", "cauchy", "combined", "cosine", "rbf", "t")
Remainder = Literal["uniform", "renormalize"]
REMAINDERS: tuple[Remainder, ...] = ("uniform", "renormalize")
