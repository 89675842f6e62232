"""CMI's synthesis: a fresh generator for every batch, and a head that distinguishes its images from earlier ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from qkd.data import Splits
from qkd.losses import cmi_inversion_loss, contrastive_loss, decision_adversarial_loss
from qkd.methods.data_free.inverting.inversions import Best, Inverted, Inverter, descend, low_bit_loss
from qkd.methods.data_free.inverting.views import cropped, flipped, shifted
from qkd.methods.data_free.making.generating import build_generator
from qkd.methods.data_free.making.sources import balanced_labels
from qkd.methods.data_free.making.watching import Seen
from qkd.seeding import global_stream, stream

TEMPERATURE = 0.1
HEAD = 256  # size of the features in which views are compared
BANK = 4096  # pairs of the memory bank that are kept; the released code keeps 40,960 and samples 4,096 of them
BETAS = (0.5, 0.999)
LEAST_AREA = 0.25  # of a local view
DEVIATION = 0.02  # of a generator's initial weights


class Contrast(Inverter):
    """Inversion through a generator, with contrast; with a student, also by its divergence at equal decisions."""

    def __call__(self, index: int, count: int, state: dict[str, np.ndarray]) -> Inverted:
        """Return a batch. The head, its optimizer and the bank continue from the previous batch."""
        draws = stream(self.seed, "inversion", index)
        generator = self._generator(index)
        latents = torch.randn(count, self.settings.latent, generator=draws).to(self.device).requires_grad_()
        labels = torch.sort(balanced_labels(count, len(self.splits.classes), draws))[0].to(self.device)
        memory = _Memory(self._features(), self.seed, self.device, state, self.settings.lr)
        moving = torch.optim.Adam([*generator.parameters(), latents], lr=self.settings.lr, betas=BETAS)
        best = Best()
        for _ in range(self.settings.pool_steps):
            images = generator(latents, labels)
            shown = flipped(shifted(images, padding_of(self.splits), draws), draws)
            whole = self.teacher(shown)
            part = self.teacher(flipped(cropped(images, LEAST_AREA, draws), draws))
            views = _features(part), _features(whole)
            contrast, answer = memory.contrast(*views), None if self.rival is None else self.rival(shown)

            def total(logits: Tensor | None, whole: Seen = whole, contrast: Tensor = contrast) -> Tensor:
                opposed = None if logits is None else decision_adversarial_loss(logits, whole.logits)
                return cmi_inversion_loss(whole.logits, labels, whole.statistics(), contrast, opposed, **self.weights())

            loss = total(None if answer is None else answer.logits)
            if best.offer(loss, images, low_bit=low_bit_loss(total, answer)):
                kept = tuple(one.detach() for one in views)
            descend(loss, memory.optimizer, moving)
        return Inverted(best.images, memory.state(kept), best.loss, best.low_bit)

    def _features(self) -> int:
        blank = torch.zeros(2, *self.splits.image_shape, device=self.device)
        with torch.no_grad():  # not all batch norms need run, and one may run twice
            return _features(self.teacher(blank)).shape[1]

    def _generator(self, index: int) -> nn.Module:
        net = build_generator(self.settings, self.splits, self.seed, "inversion", index)
        with global_stream(self.seed, "inversion weights", index), torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.weight.normal_(0, DEVIATION)
        return net.to(self.device).train()


def padding_of(splits: Splits) -> int:
    """Return the largest shift of a global view in pixels: an eighth of the side."""
    return max(1, min(splits.image_shape[1:]) // 8)


class _Memory:
    """State that CMI keeps from batch to batch: the head with its optimizer, and features of earlier images."""

    def __init__(self, features: int, seed: int, device: torch.device, state: dict[str, np.ndarray], lr: float) -> None:
        with global_stream(seed, "init", "contrast"):
            self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, HEAD)).to(device)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=lr)
        tensors = {name: torch.from_numpy(array).to(device) for name, array in state.items()}
        empty = torch.zeros(0, features, device=device)
        self.bank = tuple(tensors.pop(name, empty)[-BANK:] for name in ("bank_local", "bank_global"))
        if tensors:
            self._restore(tensors)

    def contrast(self, local_views: Tensor, global_views: Tensor) -> Tensor:
        """Return the contrastive loss of two views' features and of the bank."""
        cached = [self.head(one) for one in self.bank] if len(self.bank[0]) else [None, None]
        return contrastive_loss(self.head(local_views), self.head(global_views), *cached, temperature=TEMPERATURE)

    def state(self, views: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
        """Return the state for the next batch, and the features of this one for the bank."""
        tensors = {"bank_local": views[0], "bank_global": views[1], **self.head.state_dict()}
        for name, parameter in self.head.named_parameters():
            tensors |= {f"{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self.head.load_state_dict({name: value for name, value in tensors.items() if "/" not in name})
        states = {}
        for index, (name, _) in enumerate(self.head.named_parameters()):
            own = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
            states[index] = {key: value.cpu() if key == "step" else value for key, value in own.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _features(seen: Seen) -> Tensor:
    """Return what CMI compares: the spatial mean of each batch norm's input, ``[batch, features]``."""
    return torch.cat([one.flatten(2).mean(2) if one.dim() > 2 else one for one in seen.inputs], 1)
