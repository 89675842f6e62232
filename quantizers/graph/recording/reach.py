"""Finds the parameters that training a network leaves alone: those behind ``torch.no_grad()`` and ``detach()``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from quantizers.graph.recording.returned import tensors


def freeze_unreached(root: nn.Module, images: Tensor) -> bool:
    """Freeze the parameters that no gradient of any output reaches in training mode, so that the student does, too.

    A network whose outputs have no gradient at all (a forward for inference only) says nothing of its layers, and one
    that fails is refused where it is recorded; neither is changed.

    Args:
        root: The private copy of a network; its flags ``requires_grad`` change, nothing else.
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
        except Exception:  # whatever it is, the recording meets it and names the place
            return True
    for (own, _), gradient in zip(learned, found, strict=True):
        if gradient is None:
            own.requires_grad_(False)
    return True
