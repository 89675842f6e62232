"""The peers of a run's student: built, started and scored like it, then discarded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from qkd.config import PeerConfig, PeersConfig, QuantConfig, RunConfig
from qkd.data import Splits
from qkd.methods.peers.step import Learner, PeerAdapters
from qkd.nets import load_weights
from qkd.nets.own.spelling import net_title, spelled
from qkd.roles.nets import blank_images, fresh_net, prepare_low_bit, start_head
from qkd.terms.modules import feature_shapes
from qkd.training import Partner, accuracy
from quantizers import Student, quantizer_scales, settle

T = TypeVar("T")


@dataclass(frozen=True)
class Peer:
    """A net that learns with the student.

    Args:
        config: As in the run.
        name: ``peer_0``, ``peer_1``, ...
        net: Name of the net.
        model: The net that learns: a float net or its low-bit form, on the run's device.
        taps: Module paths of its float net.
        shapes: Shapes of its features at these taps, without the batch.
    """

    config: PeerConfig
    name: str
    net: str
    model: nn.Module
    taps: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def learner(self) -> Learner:
        """Return it in the form that a step needs."""
        return _learner(self.name, self.model, self.taps)

    def partner(self, lr_factor: float) -> Partner:
        """Return it in the form that a training needs."""
        return Partner(self.name, self.model, lr_factor, scales=lambda: quantizer_scales(self.model))


def build_peers(config: RunConfig, splits: Splits, weights: Path | None, device: torch.device) -> tuple[Peer, ...]:
    """Return the peers that a config names, not calibrated.

    A peer of the student's net starts from the student's weights, any other from its own random weights.

    Args:
        config: The run's.
        splits: The images, for their shape.
        weights: Initial weights of the student; None if random.
        device: Where to train.

    Raises:
        ValueError: If a net is unknown, or a tap does not name a module.
        quantizers.RewriteError: If a net cannot be rewritten.
    """
    section = cast(PeersConfig, config.student.peers)
    return tuple(
        _peer(config, peer, f"peer_{number}", section.taps, splits, weights, device)
        for number, peer in enumerate(section.nets)
    )


def _peer(
    config: RunConfig,
    peer: PeerConfig,
    name: str,
    taps: tuple[str, ...],
    splits: Splits,
    weights: Path | None,
    device: torch.device,
) -> Peer:
    net_name = peer_net(config, peer)
    net = fresh_net(config, net_name, splits, name)
    if net_name == config.student_net and weights is not None:
        load_weights(net, weights, head=start_head(config))
    taps = taps if peer.taps is None else peer.taps
    shapes = tap_shapes(net, taps, splits, name)
    quant = peer_quant(config.student.quant, peer)
    model = net if quant is None else prepare_low_bit(quant, net, splits.image_shape)
    return Peer(peer, name, net_name, model.to(device), taps, shapes)


def peer_net(config: RunConfig, peer: PeerConfig) -> str:
    """Return the name of a peer's net: its own or the student's, with its width among the options."""
    name = peer.net or config.student_net
    return name if peer.width is None else spelled(name, {"width": peer.width})


def peer_quant(student: QuantConfig, peer: PeerConfig) -> QuantConfig | None:
    """Return a peer's bits and quantizers: the student's with its own widths; None for full precision."""
    if peer.weight_bits is None or peer.act_bits is None:
        return None
    # overrides name layers of the student and give them its widths
    return student.model_copy(update={"weight_bits": peer.weight_bits, "act_bits": peer.act_bits, "overrides": {}})


def tap_shapes(net: nn.Module, taps: Sequence[str], splits: Splits, role: str) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a float net's features at its taps, without the batch.

    Args:
        net: The float net; a copy of it runs, on the CPU.
        taps: Module paths.
        splits: The images, for their shape.
        role: For errors.

    Raises:
        ValueError: If a tap does not name a module.
    """
    shapes = feature_shapes(copy.deepcopy(net).cpu(), dict.fromkeys(taps), blank_images(splits), role=role)
    return tuple(shapes[tap] for tap in taps)


def learners(peers: Sequence[Peer], student: nn.Module, section: PeersConfig) -> list[Learner]:
    """Return the nets of a student ensemble as a step needs them: the peers and the student, the leader first."""
    return _led([peer.learner() for peer in peers], _learner("student", student, section.taps), section)


def adapters(
    peers: Sequence[Peer], net: nn.Module, section: PeersConfig, splits: Splits, *, seed: int, device: torch.device
) -> PeerAdapters:
    """Return the adapters that bring all features to the leader's shapes.

    Args:
        peers: At least one.
        net: The student's float net.
        section: The config's, with the student's taps.
        splits: The images, for their shape.
        seed: The run's.
        device: Where to train.

    Raises:
        ValueError: If a tap does not name a module, or there is no adapter between two shapes.
    """
    own = tap_shapes(net, section.taps, splits, "student")
    return PeerAdapters(_led([peer.shapes for peer in peers], own, section), seed=seed).to(device)


def _led(peers: list[T], student: T, section: PeersConfig) -> list[T]:
    return [student, *peers] if section.leader == "student" else [*peers, student]


def peer_results(
    peers: Sequence[Peer], config: RunConfig, splits: Splits, device: torch.device
) -> list[dict[str, Any]]:
    """Return the results of each peer; the scales of low-bit ones are settled first, like the student's.

    Args:
        peers: At the end of their training.
        config: The run's, for batch sizes.
        splits: The images; test images are read.
        device: The device of the peers.
    """
    return [_result(peer, config, splits, device) for peer in peers]


def _result(peer: Peer, config: RunConfig, splits: Splits, device: torch.device) -> dict[str, Any]:
    if isinstance(peer.model, Student):
        settle(peer.model)
    test, val = (accuracy(peer.model, part, splits, config.data, device) for part in (splits.test, splits.val))
    return {
        "name": peer.name,
        "net": net_title(peer.net),
        "weight_bits": peer.config.weight_bits,
        "act_bits": peer.config.act_bits,
        "test_accuracy": test,
        "val_accuracy": val,
    }


def _learner(name: str, model: nn.Module, taps: tuple[str, ...]) -> Learner:
    paths: Mapping[str, str] | None = model.tap_paths if isinstance(model, Student) else None
    return Learner(name, model, taps, paths)
