"""The small nets that loss terms are computed with (adapters, attention): built once and shared by all phases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkd.config import TermConfig
from qkd.seeding import global_stream
from qkd.terms.loss_table import LOSSES, FeatureShapes, ModuleKind
from qkd.terms.taps import Taps, tap_paths_of
from quantizers.modes import evaluating

Pairs = tuple[tuple[str, str], ...]


class ModuleBank:
    """Builds the modules of loss terms on demand; the same kind, taps and options give the same module.

    Args:
        student: Tap of the student (float module path) -> shape of its feature without the batch.
        teacher: The same for the teacher.
        seed: Seed of their initialization; each has its own random stream.
        device: Where to put them.
    """

    def __init__(
        self,
        student: Mapping[str, tuple[int, ...]],
        teacher: Mapping[str, tuple[int, ...]],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.modules = nn.ModuleDict()
        self._student, self._teacher, self._seed, self._device = student, teacher, seed, device
        self._made: dict[str, nn.Module | None] = {}

    def take(self, kind: ModuleKind, pairs: Pairs, options: Mapping[str, Any]) -> nn.Module | None:
        """Return the module of a kind for pairs of taps; None if they do not need one.

        Args:
            kind: What to build.
            pairs: ``(student tap, teacher tap)``, in order.
            options: The term's options.

        Raises:
            ValueError: If it cannot be built for these shapes.
        """
        key = json.dumps([kind.name, pairs, {name: options.get(name) for name in kind.options}], sort_keys=True)
        if key not in self._made:
            shapes = FeatureShapes(
                tuple(self._student[student] for student, _ in pairs),
                tuple(self._teacher[teacher] for _, teacher in pairs),
            )
            with global_stream(self._seed, "init", "term module", key):
                module = kind.build(shapes, options)
            self._made[key] = module
            if module is not None:
                self.modules[f"{kind.name}_{len(self.modules)}"] = module.to(self._device)
        return self._made[key]


def build_bank(
    student: nn.Module,
    teacher: nn.Module,
    terms: Sequence[TermConfig],
    images: Tensor,
    *,
    seed: int = 0,
) -> ModuleBank:
    """Return the bank for the taps that terms name, after a forward pass of both nets to find their shapes.

    Args:
        student: The student's *float* net (the low-bit one has the same shapes at its taps).
        teacher: The teacher.
        terms: The terms of all phases.
        images: A few normalized images, shape ``[batch, channels, height, width]``, on the nets' device.
        seed: Seed of the modules' initialization.

    Raises:
        ValueError: If a tap does not name a module.
    """
    asking = [term for term in terms if term.loss in LOSSES and LOSSES[term.loss].module is not None]
    pairs = [pair for term in asking for pair in term.taps]
    return ModuleBank(
        feature_shapes(student, dict.fromkeys(pair[0] for pair in pairs), images, role="student"),
        feature_shapes(teacher, dict.fromkeys(pair[1] for pair in pairs), images, role="teacher"),
        seed=seed,
        device=images.device,
    )


def feature_shapes(
    model: nn.Module, paths: Mapping[str, object] | Sequence[str], images: Tensor, *, role: str = "model"
) -> dict[str, tuple[int, ...]]:
    """Return path -> shape of a module's output without the batch, from one forward pass in eval mode.

    Args:
        model: A net; its train and eval modes are restored.
        paths: Module paths.
        images: Normalized, shape ``[batch, channels, height, width]``.
        role: ``teacher`` or ``student``, for errors.

    Raises:
        ValueError: If a path does not name a module.
    """
    if not paths:
        return {}
    with evaluating(model), torch.no_grad(), Taps(model, paths, translate=tap_paths_of(model), role=role) as taps:
        model(images)
        values = taps.take()
    return {path: tuple(value.shape[1:]) for path, value in values.items()}
