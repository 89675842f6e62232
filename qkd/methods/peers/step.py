"""A student ensemble: nets of several bit widths or widths learn together from labels and from their average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from qkd.losses import cross_entropy_loss, hint_loss, soft_target_loss
from qkd.losses.checks import check_temperature, check_weight
from qkd.losses.features import build_adapter
from qkd.losses.stable import in_full_precision, widened
from qkd.methods.ensemble.average import mean_logits
from qkd.methods.peers.stem import SharedStem
from qkd.seeding import global_stream
from qkd.terms.step import second_labels
from qkd.terms.taps import Taps
from qkd.training.job import Batch, Step, StepResult
from qkd.training.supervised import LogitsGuard


@dataclass(frozen=True)
class StudentEnsembleLoss:
    """The loss of a student ensemble on one batch, shape ``[]`` each.

    Args:
        total: The weighted sum.
        labels: Cross-entropies, summed over the nets.
        features: Mean squared differences to net 0, summed over taps and the other nets.
        ensemble: Soft targets from the average, summed over the nets.
    """

    total: Tensor
    labels: Tensor
    features: Tensor
    ensemble: Tensor


@in_full_precision
def student_ensemble_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    features: Sequence[Sequence[Tensor]] = (),
    other_labels: Tensor | None = None,
    other_share: Tensor | None = None,
    *,
    temperature: float = 3.0,
    label_weight: float = 0.7,
    feature_weight: float = 0.15,
    ensemble_weight: float = 0.15,
    label_smoothing: float = 0.0,
) -> StudentEnsembleLoss:
    r"""Return the loss of nets that learn together.

    .. math:: L = \alpha \sum_j \mathrm{CE}(z_j, y)
              + \beta \sum_l \sum_{j \ge 1} \mathrm{MSE}(\mathrm{sg}(A_{0l}), A_{jl})
              + \gamma \sum_j T^2\, \mathrm{KL}(\mathrm{sg}(\sigma(\bar z / T)) \,\|\, \sigma(z_j / T)),
              \quad \bar z = \frac1n \sum_j z_j

    with :math:`\mathrm{sg}` the stopped gradient: no net is updated as a teacher.

    Args:
        logits: Logits of each net, net 0 (the pseudo teacher) first, shape ``[batch, classes]`` each.
        labels: int64, shape ``[batch]``.
        features: Features of each net, in the same order, one tensor ``[batch, ...]`` per tap; those of nets 1 and up
            already passed through their adapters, so that shapes agree with net 0's. Empty if there are no features.
        other_labels: Second labels of mixed images, as for :func:`cross_entropy_loss`.
        other_share: Their share of each label.
        temperature: :math:`T > 0`.
        label_weight: :math:`\alpha \ge 0`.
        feature_weight: :math:`\beta \ge 0`.
        ensemble_weight: :math:`\gamma \ge 0`.
        label_smoothing: Label smoothing of the cross-entropies.

    Returns:
        The sum and its parts before weighting. With one net the last two parts are zero, and the loss is
        :math:`\alpha\,\mathrm{CE}`; with equal nets likewise.

    Raises:
        ValueError: If there are no logits, shapes do not fit, the nets have different numbers of features, or a number
            is out of range.

    References:
        Walawalkar, Shen, Savvides, `Online Ensemble Model Compression using Knowledge Distillation
        <https://arxiv.org/abs/2011.07449>`_, 2020.

    Note:
        The weights of the average are fixed at 1/n: the released code makes them parameters but gives them to no
        optimizer.
    """
    check_temperature(temperature)
    check_weight(label_weight=label_weight, feature_weight=feature_weight, ensemble_weight=ensemble_weight)
    average = mean_logits(logits).detach()
    if features and len(features) != len(logits):
        raise ValueError(f"need features of every net or of none, got {len(features)} for {len(logits)} nets")
    by_labels = [cross_entropy_loss(one, labels, other_labels, other_share, label_smoothing=label_smoothing)
                 for one in logits]  # fmt: skip
    by_average = [soft_target_loss(one, average, temperature=temperature) for one in logits]
    by_features = [hint_loss(own, lead) for others in features[1:] for own, lead in _pairs(others, features[0])] or [
        torch.zeros_like(by_labels[0])
    ]
    parts = [torch.stack(values).sum() for values in (by_labels, by_features, by_average)]
    total = label_weight * parts[0] + feature_weight * parts[1] + ensemble_weight * parts[2]
    return StudentEnsembleLoss(total, *parts)


def _pairs(own: Sequence[Tensor], lead: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    if len(own) != len(lead):
        raise ValueError(f"every net needs the same number of features as net 0, got {len(own)} and {len(lead)}")
    yield from zip(own, lead, strict=True)


@dataclass(frozen=True)
class Learner:
    """A net of a student ensemble.

    Args:
        name: For errors and metrics, e.g. ``peer_0`` or ``student``.
        net: Gives logits ``[batch, classes]``.
        taps: Module paths of its float net, the same number for all nets.
        tap_paths: Float module path -> path within ``net``; None if the paths are the same.
    """

    name: str
    net: nn.Module
    taps: tuple[str, ...] = ()
    tap_paths: Mapping[str, str] | None = None


class PeerAdapters(nn.Module):
    """Adapters of the features of nets 1 and up to net 0's shapes: 1x1 convolutions, or nothing if they agree.

    Args:
        shapes: For each net, net 0 first, the shape of its feature at each tap, without the batch.
        seed: Seed of the initialization.

    Raises:
        ValueError: If there is no adapter between two shapes.
    """

    def __init__(self, shapes: Sequence[Sequence[tuple[int, ...]]], *, seed: int = 0) -> None:
        super().__init__()
        self.maps = nn.ModuleDict()
        for net, own in enumerate(shapes[1:], start=1):
            for tap, (shape, lead) in enumerate(zip(own, shapes[0], strict=True)):
                with global_stream(seed, "init", "peer adapter", net, tap):
                    adapter = build_adapter(shape, lead)
                if adapter is not None:
                    self.maps[_key(net, tap)] = adapter

    def forward(self, features: Sequence[Tensor], net: int) -> list[Tensor]:
        """Return the features of net number ``net``, one tensor per tap, in net 0's shapes."""
        keys = [_key(net, tap) for tap in range(len(features))]
        return [
            cast(Tensor, self.maps[key](feature)) if key in self.maps else feature
            for key, feature in zip(keys, features, strict=True)
        ]


def _key(net: int, tap: int) -> str:
    return f"net_{net}_tap_{tap}"


class StudentEnsembleStep:
    """A training step for the run's student and its peers on one batch.

    Published for nets that differ in width and share their stem (first convolution and batch norm): ``stem``. Nets that
    differ in bit width (full precision, 8, 4 and 2 bits in one training, each of the same topology, so that no adapter
    is needed) are ours; they can share nothing, so that each has its own grid starting with the image.

    Deviation: adapters are in the optimizer from the first step; the released code creates them during training, and
    updates them from the second epoch on, at half the rate.

    Args:
        learners: Net 0 first, whose features are the targets; one of them is the run's student.
        adapters: Adapters of their features.
        temperature: As for :func:`student_ensemble_loss`.
        label_weight: Likewise.
        feature_weight: Likewise.
        ensemble_weight: Likewise.
        label_smoothing: Likewise.
        own: The student's forward pass with its further terms (a teacher's, say); None if it has none.
        own_hold: Context that ``own`` needs (hooks).
        student: Index of the run's student among the learners: -1, or 0 if the others follow it.
        stem: The stem that all of them share; None if they share nothing.

    Raises:
        ValueError: If a tap does not name a module, or the nets have different numbers of taps.
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        adapters: PeerAdapters,
        *,
        temperature: float = 3.0,
        label_weight: float = 0.7,
        feature_weight: float = 0.15,
        ensemble_weight: float = 0.15,
        label_smoothing: float = 0.0,
        own: Step | None = None,
        own_hold: Callable[[], AbstractContextManager[object]] = nullcontext,
        student: int = -1,
        stem: SharedStem | None = None,
    ) -> None:
        counts = {learner.name: len(learner.taps) for learner in learners}
        if len(set(counts.values())) > 1:
            raise ValueError(f"peers: every net needs the same number of taps, got {counts}")
        self._learners, self._adapters, self._stem = tuple(learners), adapters, stem
        self._guards = [LogitsGuard(f"the net {one.name!r}") for one in learners]
        self._student = student % len(self._learners)
        self._own, self._own_hold = own, own_hold
        self._taps = [
            Taps(one.net, dict.fromkeys(one.taps), translate=one.tap_paths, role=one.name) for one in learners
        ]
        self._loss = partial(
            student_ensemble_loss,
            temperature=temperature,
            label_weight=label_weight,
            feature_weight=feature_weight,
            ensemble_weight=ensemble_weight,
            label_smoothing=label_smoothing,
        )

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Register the forward hooks for the duration of a block."""
        with ExitStack() as stack:
            for taps in self._taps:
                stack.enter_context(taps)
            stack.enter_context(self._own_hold())
            yield

    def __call__(self, batch: Batch) -> StepResult:
        """Return loss, terms and the student's logits for a batch; each peer's accuracy on it is among the facts."""
        logits, own = self._logits(batch)
        for guard, one in zip(self._guards, logits, strict=True):
            guard(one)
        seen = [taps.take() for taps in self._taps]
        features = [
            self._adapters([widened(found[path]) for path in learner.taps], net) if net else
            [widened(found[path]) for path in learner.taps]
            for net, (learner, found) in enumerate(zip(self._learners, seen, strict=True))
        ]  # fmt: skip
        loss = self._loss(logits, batch.labels, features, *second_labels(batch))
        terms = {"labels": loss.labels, "features": loss.features, "ensemble": loss.ensemble}
        right = {
            f"{learner.name}_accuracy": (one.detach().argmax(1) == batch.labels).double().mean()
            for place, (learner, one) in enumerate(zip(self._learners, logits, strict=True)) if place != self._student
        }  # fmt: skip
        total = loss.total if self._own is None else loss.total + own.loss
        return StepResult(total, {**terms, **own.terms}, own.logits, facts={**own.facts, **right})

    def _logits(self, batch: Batch) -> tuple[list[Tensor], StepResult]:
        """Return the logits of all nets in their order, and the student's own result."""
        if self._stem is not None:  # the student runs first, and the others read its stem
            with self._stem.kept():
                own = self._own_result(batch)
                peers = self._peers(batch)
        else:
            peers, own = self._peers(batch), self._own_result(batch)
        peers.insert(self._student, widened(own.logits))
        return peers, own

    def _peers(self, batch: Batch) -> list[Tensor]:
        others = [one for place, one in enumerate(self._learners) if place != self._student]
        return [widened(learner.net(batch.images)) for learner in others]

    def _own_result(self, batch: Batch) -> StepResult:
        if self._own is not None:
            return self._own(batch)
        logits = self._learners[self._student].net(batch.images)
        return StepResult(torch.zeros((), device=logits.device), {}, logits)
