"""Finds the parameters that training does not reach: those behind ``torch.no_grad()`` and ``detach()``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from quantizers.graph.recording.returned import tensors


def freeze_unreached(root: nn.Module, images: Tensor) -> bool:
    """Freeze the parameters that no gradient reaches in training mode, so that they are frozen in the student, too.

    A network whose outputs have no gradient at all (an inference-only forward) says nothing about its layers, and one
    that fails is refused when it is recorded; neither is changed.

    Args:
        root: The private copy of a network; only its ``requires_grad`` flags change.
        images: Images as it takes them.

    Returns:
        Whether any output has a gradient.
    """
    twin = copy.deepcopy(root).train()
    learned = [(own, other) for own, other in zip(root.parameters(), twin.parameters(), strict=True)
               if own.requires_grad]  # fmt: skip
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        try:
            leaves = tensors(twin(images.clone()))
            sums = [leaf.sum() for leaf in leaves if leaf.requires_grad]
            if not learned or not sums:
                return bool(sums)
            total = torch.stack(sums).sum()
            found = torch.autograd.grad(total, [other for _, other in learned], allow_unused=True)
        except Exception:  # whatever it is, the recording will hit it and name the location
            return True
    for (own, _), gradient in zip(learned, found, strict=True):
        if gradient is None:
            own.requires_grad_(False)
    return True
