"""The sections of the schema that single distillation methods need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qkd.config_types import Bits, Count, Fraction, NonNegative, Positive, Section


class MetaConfig(Section):
    """MetaDistil: the teacher learns to teach, from how a student that follows it does in a quiz."""

    quiz_images: Count = Field(
        description="training images (stratified, seeded) that the student never learns from: the quiz"
    )
    inner_lr: NonNegative | None = Field(
        None,
        description="peak learning rate of the student's assumed step, scheduled as the student's; absent: "
        "student.train.lr",
    )
    teacher_lr: NonNegative = Field(0.05, description="largest learning rate of the teacher; falls as the student's")
    teacher_start_epoch: Annotated[int, Field(ge=0)] = Field(
        0, description="first epoch of student.train, from 0, in which the teacher is taught; plain steps until then"
    )
    teacher_momentum: Fraction = Field(0.9, description="of the teacher's SGD")
    teacher_weight_decay: NonNegative = Field(5e-4, description="of the teacher's SGD, on all its weights")
    order: Literal["second", "first"] = Field(
        "second",
        description="second: differentiate the student's gradient; first: finite differences of first gradients",
    )


def require_one_quiz(metas: Sequence[MetaConfig]) -> None:
    """Refuse phases that ask for different quizzes, or for different optimizers of the one teacher.

    Raises:
        ValueError: If they differ.
    """
    for name in ("quiz_images", "teacher_momentum", "teacher_weight_decay"):
        values = sorted({getattr(meta, name) for meta in metas})
        if len(values) > 1:
            raise ValueError(f"`meta.{name}` must be the same in all phases, got {values}")


class PeerConfig(Section):
    """A net that learns beside the student and from it; thrown away in the end."""

    net: str | None = Field(None, description="absent: the student's net")
    weight_bits: Bits | None = Field(None, description="absent, with act_bits: full precision")
    act_bits: Bits | None = Field(None, description="other keys are those of student.quant")
    taps: tuple[str, ...] | None = Field(None, description="its modules for student.peers.taps; absent: the same names")

    @model_validator(mode="after")
    def _bits_come_together(self) -> PeerConfig:
        if (self.weight_bits is None) != (self.act_bits is None):
            raise ValueError("give `weight_bits` and `act_bits`, or neither for full precision")
        return self


class PeersConfig(Section):
    """A student ensemble: the student and its peers learn from labels, from their average and from the first peer."""

    nets: tuple[PeerConfig, ...] = Field(min_length=1, description="the peers; the first one's features are the goal")
    taps: tuple[str, ...] = Field((), description="modules of the student whose features meet the first peer's")
    temperature: Positive = Field(3.0, description="of the soft targets from the average")
    label_weight: NonNegative = Field(0.7, description="of the cross-entropies")
    feature_weight: NonNegative = Field(0.15, description="of the squared differences of features")
    ensemble_weight: NonNegative = Field(0.15, description="of the soft targets from the average")
    lr_factor: Positive = Field(1.0, description="the peers' learning rate, as a factor of the student's")

    @model_validator(mode="after")
    def _taps_pair_up(self) -> PeersConfig:
        for index, peer in enumerate(self.nets):
            if peer.taps is not None and len(peer.taps) != len(self.taps):
                raise ValueError(f"nets[{index}].taps names {len(peer.taps)} modules, but `taps` {len(self.taps)}")
        return self
