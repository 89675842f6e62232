"""FedDistill: clients exchange the mean logits of each class, and learn from the mean over all clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qkd.federated.averaging import State
from qkd.federated.federation import Federation
from qkd.federated.messages import Order, Reply
from qkd.federated.strategies.strategy import Objective, Strategy
from qkd.losses import class_logits_loss, class_mean_logits

LOGITS, KNOWN, COUNTS = "class_logits", "class_known", "class_counts"


class ClassLogits(Strategy):
    """FedAvg whose clients also learn from the mean logits of each class over all clients in the round before.

    Our reading: clients have equal weight, however many images of a class they have, like devices in the paper; a
    client's own logits remain in the mean, and weights are averaged, too (the paper exchanges only logits, so there
    would be no global student to export).

    References:
        Jeong et al., `Communication-Efficient On-Device Machine Learning <https://arxiv.org/abs/1811.11479>`_, 2018.
    """

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        classes = federation.classes
        self.logits, self.known = torch.zeros(classes, classes), torch.zeros(classes, dtype=torch.bool)

    def sent(self, server_round: int) -> dict[str, Tensor]:
        """Return the mean logits, once there are any."""
        return {LOGITS: self.logits, KNOWN: self.known} if server_round > 1 else {}

    def wanted(self) -> dict[str, Tensor]:
        """Return logits per class and numbers of images per class."""
        return {LOGITS: self.logits, COUNTS: torch.zeros(self.federation.classes, dtype=torch.int64)}

    def learn(self, server_round: int, replies: Sequence[Reply], states: Sequence[State]) -> dict[str, float]:  # noqa: ARG002
        """Average the clients' logits per class; a class that no client has in this round keeps its mean."""
        has = torch.stack([reply.tensors[COUNTS] > 0 for reply in replies])
        rows = torch.stack([reply.tensors[LOGITS].double() for reply in replies])
        number = has.sum(0)
        mean = ((rows * has[:, :, None]).sum(0) / number.clamp_min(1)[:, None]).float()
        self.logits = torch.where((number > 0)[:, None], mean, self.logits)
        self.known = self.known | (number > 0)
        return {"known_classes": float(self.known.sum())}

    def state(self) -> dict[str, Tensor]:
        """Return the mean logits."""
        return {LOGITS: self.logits, KNOWN: self.known}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the mean logits."""
        self.logits, self.known = tensors[LOGITS].clone(), tensors[KNOWN].clone()


class ClassLogitsObjective(Objective):
    """Cross-entropy, and the divergence from the mean logits of the images' classes."""

    def __init__(self, federation: Federation, net: nn.Module, order: Order) -> None:
        super().__init__(federation, net, order)
        classes = federation.classes
        self._sums, self._counts = torch.zeros(classes, classes, dtype=torch.float64), torch.zeros(classes).long()

    def loss(self, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """Return the loss of a step; remember the logits."""
        means, counts = class_mean_logits(logits.detach().cpu().double(), labels.cpu(), classes=logits.shape[1])
        self._sums, self._counts = self._sums + means * counts[:, None], self._counts + counts
        own, sent = super().loss(logits, labels, step), self.order.tensors
        if LOGITS not in sent:
            return own
        rows, known = sent[LOGITS].to(logits.device), sent[KNOWN].float().to(logits.device)
        return own + self.federation.settings.class_weight * class_logits_loss(logits, labels, rows, known)

    def report(self) -> dict[str, Tensor]:
        """Return the mean logits over the round's steps, and the number of images of each class."""
        return {LOGITS: (self._sums / self._counts.clamp_min(1)[:, None]).float(), COUNTS: self._counts}
