"""FedProx: clients are penalized for moving away from the weights that the server sent."""

from __future__ import annotations

from torch import Tensor, nn

from qkd.federated.federation import Federation
from qkd.federated.messages import Order
from qkd.federated.strategies.strategy import Objective
from qkd.losses import proximal_loss


class ProximalObjective(Objective):
    """Cross-entropy plus mu / 2 times the squared distance of the trained parameters from the server's.

    References:
        Li et al., `Federated Optimization in Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, 2020.
    """

    def __init__(self, federation: Federation, net: nn.Module, order: Order) -> None:
        super().__init__(federation, net, order)
        self._trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self._sent = [parameter.detach().clone() for parameter in self._trained]

    def loss(self, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """Return the loss of a step."""
        mu = self.federation.settings.proximal
        return super().loss(logits, labels, step) + proximal_loss(self._trained, self._sent, mu=mu)
