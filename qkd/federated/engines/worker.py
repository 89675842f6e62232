"""The client side: calibrates, trains or scores the net that the server sends, on the client's own images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qkd.config import TrainConfig
from qkd.federated.federation import Federation
from qkd.federated.messages import MODEL, Order, Reply
from qkd.federated.strategies.table import STRATEGIES
from qkd.seeding import global_stream
from qkd.training.evaluate import accuracy
from qkd.training.optimizer import build_optimizer
from qkd.training.state import below, fill
from quantizers import Student, calibrate, quantizer_scales


class ClientError(RuntimeError):
    """The training of a client failed."""


class Worker:
    """Answers for any client of a run: nothing is kept from one order to the next.

    Args:
        federation: The run.
    """

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.net = federation.net()
        self.upload = federation.upload(self.net)

    def answer(self, order: Order) -> Reply:
        """Carry out an order of the server.

        Raises:
            ClientError: If the loss is not finite.
            ValueError: If the images cannot be used.
        """
        fill(self.net, below(order.tensors, MODEL))
        with global_stream(self.federation.seed, "federated", order.task, order.client, order.server_round):
            if order.task == "calibrate":
                return self._calibrate(order)
            return self._train(order) if order.task == "train" else self._score(order)

    def _calibrate(self, order: Order) -> Reply:
        federation = self.federation
        batches = federation.batches(order.client, 0, federation.config.student.calibration_batches)
        calibrate(self.net, [images for images, _ in batches])
        return self._reply(order, self.upload.encode_calibrated(self.net), {})

    def _train(self, order: Order) -> Reply:
        federation, settings = self.federation, self.federation.settings
        objective = STRATEGIES[settings.strategy].client(federation, self.net, order)
        optimizer = self._optimizer(order.server_round)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.net.train()
        total = 0.0
        for step, (images, labels) in enumerate(
            federation.batches(order.client, order.server_round, settings.local_steps)
        ):
            loss = objective.loss(self.net(images), labels, step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if settings.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, settings.clip_grad_norm)
            optimizer.step()
            total += loss.item()
            if not math.isfinite(total):
                raise ClientError(f"the loss is {loss.item()} in step {step + 1}; lower federated.lr")
        tensors = {**self.upload.encode(self.net), **objective.report()}
        return self._reply(order, tensors, {"loss": total / settings.local_steps})

    def _optimizer(self, server_round: int) -> torch.optim.Optimizer:
        settings = self.federation.settings
        train = TrainConfig(
            epochs=1, optimizer=settings.optimizer, lr=settings.lr * settings.lr_decay ** (server_round - 1),
            momentum=settings.momentum, weight_decay=settings.weight_decay, scale_lr_factor=settings.scale_lr_factor,
        )  # fmt: skip
        scales = quantizer_scales(self.net) if isinstance(self.net, Student) else ()
        return build_optimizer(self.net, train, scales)

    def _score(self, order: Order) -> Reply:
        federation = self.federation
        split = federation.val_images(order.client)
        share = accuracy(self.net, split, federation.splits, federation.config.data, federation.device) or 0.0
        return Reply(order.client, {}, {"images": float(len(split)), "right": round(share * len(split))})

    def _reply(self, order: Order, tensors: dict[str, Tensor], metrics: dict[str, float]) -> Reply:
        images = float(len(self.federation.parts[order.client]))
        return Reply(order.client, tensors, {"images": images, **metrics})
