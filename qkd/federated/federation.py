"""What server and clients of a federated run share: the initial state, the division of the images, the sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from qkd.config import FederatedConfig, RunConfig
from qkd.data import Split, Splits, epoch_order, normalize
from qkd.federated.generator import LatentGenerator
from qkd.federated.head import Head, head_path
from qkd.federated.messages import state_of
from qkd.federated.partition import count_labels, dirichlet_shares, divide
from qkd.federated.uploads import CodesUpload, FloatUpload
from qkd.nets import load_weights
from qkd.nets.imagenet import weights_file
from qkd.roles.nets import blank_images, fresh_net, prepare_student
from qkd.seeding import global_stream, stream
from quantizers import Student

FEDGEN = "fedgen"


class Federation:
    """A federated run as both sides see it; every process derives the same from the same config.

    Args:
        config: The run's, with a section ``federated``.
        splits: Its images.
        device: Where to train.

    Raises:
        ValueError: If there is no such section, there are fewer images than clients need, fewer than two classes, or
            the net has no last linear layer where the strategy needs one.
    """

    def __init__(self, config: RunConfig, splits: Splits, device: torch.device) -> None:
        if config.federated is None:
            raise ValueError("the config has no section `federated`; `qkd run` is for runs without clients")
        if len(splits.classes) < 2:
            raise ValueError(f"federated: clients need at least two classes, but the data has {len(splits.classes)}")
        self.config, self.splits, self.device = config, splits, device
        self.settings: FederatedConfig = config.federated
        self.seed, self.classes = config.seed, len(splits.classes)
        settings = self.settings
        self.shares = dirichlet_shares(self.classes, settings.clients, alpha=settings.alpha, seed=self.seed)
        self.parts = divide(splits.train.labels, self.shares, seed=self.seed, least=settings.least_images)
        self.val_parts = divide(splits.val.labels, self.shares, seed=self.seed)
        self.head = head_path(self.float_net(), blank_images(splits)) if settings.strategy == FEDGEN else ""

    @property
    def label_counts(self) -> Tensor:
        """Return the training images of each class at each client, ``[clients, classes]``."""
        return count_labels(self.splits.train.labels, self.parts, self.classes)

    @property
    def is_low_bit(self) -> bool:
        """Return whether clients train low-bit students."""
        return self.settings.precision == "low_bit"

    @property
    def first_round(self) -> int:
        """Return the first round: 0, the calibration, or 1 in float."""
        return 0 if self.is_low_bit else 1

    # nets

    def float_net(self) -> nn.Module:
        """Return the student's net in float, with the weights that it starts from, on the CPU."""
        config, student = self.config, self.config.student
        net = fresh_net(config, config.student_net, self.splits, "student")
        if student.weights is not None:
            load_weights(net, weights_file(student.weights, config.student_net), head=student.head)
        return net

    def net(self) -> nn.Module:
        """Return the initial net: an uncalibrated low-bit student, or a float net."""
        net = self.float_net()
        if self.is_low_bit:
            net = prepare_student(self.config, net, self.splits.image_shape)
        return net.to(self.device)

    def upload(self, net: nn.Module) -> FloatUpload:
        """Return the upload of nets to the server; ``net`` is used, and overwritten, to decode codes."""
        if self.settings.upload == "codes" and isinstance(net, Student):
            return CodesUpload(net)
        return FloatUpload()

    def generator(self, net: nn.Module) -> LatentGenerator:
        """Return FedGen's generator as it starts, for the last layer of a net."""
        with global_stream(self.seed, "federated", "generator"):
            made = LatentGenerator(self.classes, Head.of(net, self.head).features, self.settings.noise)
        return made.to(self.device)

    # images

    def images(self, client: int) -> Split:
        """Return the training images of a client."""
        return self.splits.train.subset(self.parts[client])

    def val_images(self, client: int) -> Split:
        """Return the validation images of a client: as many of each class, in proportion; there may be none."""
        return self.splits.val.subset(self.val_parts[client])

    def batches(self, client: int, server_round: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized batches of a client's images, epoch after epoch, each in a different order.

        A client with fewer images than a batch takes all of them in every step.

        Args:
            client: Which.
            server_round: Names the orders, with the client.
            steps: Number of batches.
        """
        split = self.images(client)
        size = min(self.config.data.batch_size, len(split))
        a_pass = len(split) // size
        for step in range(steps):
            epoch, place = divmod(step, a_pass)
            if place == 0:
                order = epoch_order(len(split), self.stream("order", client, server_round, epoch))
            images, labels = split.batch(order[place * size : (place + 1) * size], self.device)
            yield normalize(images, self.splits.mean, self.splits.std), labels

    def stream(self, *names: str | int) -> torch.Generator:
        """Return the random numbers of a purpose within the federated training, drawn on the CPU."""
        return stream(self.seed, "federated", *names)

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """Return the state that the global net starts with."""
        return state_of(self.net())
