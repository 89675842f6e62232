"""A student ensemble as a method: peers learn with the student in every phase that does not exclude them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

from torch import nn

from qkd.config import PeersConfig, PhaseConfig, RunConfig, TermConfig
from qkd.methods.method import Lesson, Method, TappedStep
from qkd.methods.peers.nets import adapters, build_peers, learners, peer_results
from qkd.methods.peers.stem import SharedStem, lend
from qkd.methods.peers.step import StudentEnsembleStep
from qkd.training import Partner
from qkd.training.assembly import Context
from quantizers import Student, freeze_batch_norm


class Peers(Method):
    """Method for the phases with peers; a phase's own terms are added to their loss."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._section = cast(PeersConfig, config.student.peers)

    @property
    def why_one_device(self) -> str:
        """Return an empty string: the loss of each net is a mean over images."""
        return ""

    def takes(self, phase: PhaseConfig) -> bool:
        """Return whether peers learn in a phase."""
        return phase.peers

    def prepare(self, lesson: Lesson) -> None:
        """Build the peers, and the adapters that bring their features to one shape."""
        device, section = next(lesson.student.parameters()).device, self._section
        self._peers, factor = build_peers(self.config, lesson.splits, lesson.weights, device), section.lr_factor
        self._stem = SharedStem(lesson.student, section.stem) if section.stem else None
        for peer in self._peers:
            if self._stem is not None:
                lend(self._stem, peer.model, peer.name)
        self._learners = learners(self._peers, lesson.student, section)
        self._adapters = adapters(self._peers, lesson.net, section, lesson.splits, seed=self.config.seed, device=device)
        maps = [Partner("peer_adapters", self._adapters, factor)] if len(self._adapters.maps) else []
        self.partners = (*(peer.partner(factor) for peer in self._peers), *maps)
        self.low_bit = tuple(peer.model for peer in self._peers if isinstance(peer.model, Student))

    def step(self, lesson: Lesson, phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int) -> TappedStep:  # noqa: ARG002
        """Return the step of the ensemble."""
        own, section = lesson.distill_step(terms, first_epoch) if terms else None, self._section
        return StudentEnsembleStep(
            self._learners,
            self._adapters,
            temperature=section.temperature,
            label_weight=section.label_weight,
            feature_weight=section.feature_weight,
            ensemble_weight=section.ensemble_weight,
            label_smoothing=self.config.student.train.label_smoothing,
            own=own,
            own_hold=nullcontext if own is None else own.tapped,
            student=0 if section.leader == "student" else -1,
            stem=self._stem,
        )

    def enter(self, lesson: Lesson, phase: PhaseConfig) -> None:  # noqa: ARG002
        """Set the peers to the student's modes."""
        for peer in self._peers:
            peer.model.train()
            if isinstance(peer.model, Student):
                freeze_batch_norm(peer.model, phase.freeze_batch_norm)

    def results(self, context: Context, role: str, model: nn.Module) -> Mapping[str, Any]:  # noqa: ARG002
        """Return the results of each peer."""
        if role != "student":
            return {}
        return {"peers": peer_results(self._peers, self.config, context.splits, context.device)}
