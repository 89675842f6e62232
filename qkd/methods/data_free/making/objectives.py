"""Each generator's loss by the name of its method, computed from a teacher's (and a student's) outputs for a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkd.losses import (
    class_balance_loss,
    dafl_generator_loss,
    dfq_generator_loss,
    disagreement_loss,
    gdfq_generator_loss,
    mskd_generator_loss,
    one_hot_loss,
    rdskd_generator_loss,
)
from qkd.methods.data_free.making.watching import Seen


@dataclass(frozen=True)
class Moment:
    """A batch of generated images, and the outputs of the nets for it.

    Args:
        images: With their graph.
        latents: What they were generated from, shape ``[batch, latent]``.
        labels: Requested classes, int64, shape ``[batch]``.
        seen: Outputs of the teacher.
        references: RDSKD's two losses near the start of the epoch, shape ``[2]``.
        student_logits: With their graph; None if there is no student.
    """

    images: Tensor
    latents: Tensor
    labels: Tensor
    seen: Seen
    references: Tensor
    student_logits: Tensor | None = None

    @property
    def feature(self) -> Tensor:
        """Return the input to the linear layer that gives the teacher's logits."""
        if self.seen.feature is None:
            raise ValueError("the teacher's logits do not come from a linear layer, whose input this method reads")
        return self.seen.feature

    @property
    def students(self) -> Tensor:
        """Return the student's logits."""
        if self.student_logits is None:
            raise ValueError("this method needs a student to compete with, but there is none")
        return self.student_logits


@dataclass(frozen=True)
class Objective:
    """A generator's loss on a batch.

    Args:
        loss: The loss to minimize, shape ``[]``.
        references: RDSKD's two current losses, shape ``[2]``; None for other methods.
    """

    loss: Tensor
    references: Tensor | None = None


Weights = Mapping[str, Any]  # keywords of a loss


def _rdskd(moment: Moment, weights: Weights) -> Objective:  # noqa: ARG001 - it has none, as the paper claims
    authenticity, balance = moment.references.unbind()
    found = rdskd_generator_loss(
        moment.images, moment.seen.logits, authenticity_reference=authenticity, balance_reference=balance
    )
    return Objective(found.total, torch.stack((found.authenticity, found.balance)).detach())


def _dafl(moment: Moment, weights: Weights) -> Objective:
    return Objective(dafl_generator_loss(moment.seen.logits, moment.feature, **weights))


def _mskd(moment: Moment, weights: Weights) -> Objective:
    return Objective(mskd_generator_loss(moment.images, moment.latents, moment.seen.logits, moment.feature, **weights))


def _gdfq(moment: Moment, weights: Weights) -> Objective:
    return Objective(
        gdfq_generator_loss(moment.seen.logits, moment.labels, moment.seen.statistics("squares"), **weights)
    )


def _generative(moment: Moment, weights: Weights) -> Objective:
    return Objective(gdfq_generator_loss(moment.seen.logits, moment.labels, moment.seen.statistics(), **weights))


def _zskt(moment: Moment, weights: Weights) -> Objective:  # noqa: ARG001
    return Objective(disagreement_loss(moment.students, moment.seen.logits, reduction="mean"))


def _dfad(moment: Moment, weights: Weights) -> Objective:  # noqa: ARG001
    return Objective(disagreement_loss(moment.students, moment.seen.logits, measure="distance"))


def _dfq(moment: Moment, weights: Weights) -> Objective:
    teachers = moment.seen.logits
    if moment.student_logits is None:  # warm-up: the terms that read the teacher alone
        weights, students = {**weights, "adversarial_weight": 0.0}, teachers.detach()
    else:
        students = moment.student_logits
    return Objective(dfq_generator_loss(students, teachers, moment.seen.statistics(), **weights))


OBJECTIVES: Mapping[str, Callable[[Moment, Weights], Objective]] = {
    "rdskd": _rdskd,
    "dafl": _dafl,
    "dafl_joint": _dafl,
    "mskd": _mskd,
    "gdfq": _gdfq,
    "generative": _generative,
    "zskt": _zskt,
    "dfad": _dfad,
    "dfq": _dfq,
}


@torch.no_grad()
def facts_of(seen: Seen) -> dict[str, Tensor]:
    """Return measures of a generator's progress, whatever its loss: shape ``[]`` each, in nats."""
    logits = seen.logits.detach()
    facts = {"one_hot": one_hot_loss(logits), "class_balance": class_balance_loss(logits)}
    return facts if not seen.inputs else {**facts, "statistics": seen.statistics()}
