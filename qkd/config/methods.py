"""The schema of nets and branches that learn alongside a student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from qkd.config.sections import Bits, Epochs, NonNegative, Positive, Section, without_defaults
from qkd.config.training import PhaseConfig, QuantConfig, TermConfig, TrainConfig


class PeerConfig(Section):
    """A net that learns alongside the student and from it, and is discarded at the end."""

    net: str | None = Field(None, description="default: the student's net")
    width: Annotated[float, Field(gt=0, le=16)] | None = Field(
        None,
        description="factor on the channels of its stages, through its net's option `width`; published: (n - j) / n "
        "for peer j in an ensemble of n nets",
    )
    weight_bits: Bits | None = Field(
        None, description="bits of weights, given together with act_bits; default: full precision for both"
    )
    act_bits: Bits | None = Field(None, description="bits of activations; other keys are those of student.quant")
    taps: tuple[str, ...] | None = Field(
        None, description="its modules that correspond to student.peers.taps; default: the same names"
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a newer key that is not used: configs and hashes of older runs do not change."""
        return without_defaults(self, serialize(self), "width")

    @model_validator(mode="after")
    def _bits_come_together(self) -> PeerConfig:
        if (self.weight_bits is None) != (self.act_bits is None):
            raise ValueError("give `weight_bits` and `act_bits`, or neither for full precision")
        return self


class PeersConfig(Section):
    """A student ensemble: the student and its peers learn from labels, from their average and from one of the nets."""

    nets: tuple[PeerConfig, ...] = Field(min_length=1, description="the peers, at least one")
    leader: Literal["peer", "student"] = Field(
        "peer", description="whose features the others learn: the first peer's, or the student's"
    )
    stem: tuple[str, ...] = Field(
        (),
        max_length=2,
        description="names of the first convolution and its batch norm in the float net ([conv1, bn1] in the "
        "toolkit's ResNets): all nets share the student's, at its bits; default: they share "
        "nothing",
    )
    taps: tuple[str, ...] = Field(
        (), description="modules of the student whose features are compared with the leader's"
    )
    temperature: Positive = Field(3.0, description="temperature of the soft targets from the average")
    label_weight: NonNegative = Field(0.7, description="weight of the cross-entropies")
    feature_weight: NonNegative = Field(0.15, description="weight of the squared differences of features")
    ensemble_weight: NonNegative = Field(0.15, description="weight of the soft targets from the average")
    lr_factor: Positive = Field(1.0, description="the peers' learning rate, as a factor of the student's")

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out newer keys that have their defaults: configs and hashes of older runs do not change."""
        return without_defaults(self, serialize(self), "leader", "stem")

    @model_validator(mode="after")
    def _taps_pair_up(self) -> PeersConfig:
        default = type(self).model_fields["feature_weight"].default  # has no effect without taps
        if self.feature_weight not in (0, default) and not self.taps:
            raise ValueError(
                f"`feature_weight` is {self.feature_weight}, but it weights the features of `taps`, which are empty"
            )
        for index, peer in enumerate(self.nets):
            if peer.taps is not None and len(peer.taps) != len(self.taps):
                raise ValueError(f"nets[{index}].taps names {len(peer.taps)} modules, `taps` names {len(self.taps)}")
        return self


class AuxiliaryConfig(Section):
    """An auxiliary teacher: it is trained from the teacher first, and then teaches the student in its place."""

    net: str | None = Field(None, description="default: the student's net")
    quant: QuantConfig | None = Field(
        None,
        description="bits and quantizers; default: full precision; 8 bits suit a net between teacher and student",
    )
    init: Literal["auto", "random"] = Field(
        "auto",
        description="auto: from float_train if given; else what the student starts from (its weights or its "
        "float training) or the teacher, if the net is the same; else random",
    )
    float_train: TrainConfig | None = Field(None, description="a separate float training, on the labels, to start from")
    train: TrainConfig = Field(description="training from the teacher")
    terms: tuple[TermConfig, ...] = Field(
        (TermConfig(loss="information_flow", taps=(("flatten", "flatten"),)),),
        description="weighted loss terms; default: information flow before the last layer, by its name in the"
        " toolkit's nets",
    )
    phases: tuple[PhaseConfig, ...] = Field(
        (), description="default: as for a student; a single phase in full precision"
    )

    @model_validator(mode="after")
    def _phases_fit(self) -> AuxiliaryConfig:
        total = sum(phase.epochs for phase in self.phases)
        if self.phases and total != self.train.epochs:
            raise ValueError(f"epochs of `phases` add up to {total}, but `train.epochs` is {self.train.epochs}")
        if any(phase.teacher_terms is not None for phase in self.phases):
            raise ValueError("`phases` with teacher_terms are for the student")
        if any(phase.meta is not None for phase in self.phases):
            raise ValueError("`phases` with meta are for the student: the quiz is held out from the student only")
        if self.quant is None and any(phase.freeze_batch_norm for phase in self.phases):
            raise ValueError("`phases` with freeze_batch_norm need `quant`: a float net has no deployed arithmetic")
        return self


class BranchTrainingConfig(Section):
    """How the teacher's auxiliary branches learn."""

    joint: bool = Field(
        False,
        description="true: together with the teacher, in its own training (teacher.train); false: on the "
        "finished teacher",
    )
    train: TrainConfig | None = Field(
        None, description="optimizer and length of the branches' own training, if not joint"
    )

    @model_validator(mode="after")
    def _has_one_training(self) -> BranchTrainingConfig:
        if self.joint == (self.train is not None):
            raise ValueError(
                "`train` is required if `joint` is false, and not allowed otherwise: with `joint`, the branches are "
                "trained by teacher.train"
            )
        return self


class RotationsConfig(Section):
    """Distillation on images in four orientations, through auxiliary branches that are discarded afterward."""

    mode: Literal["offline", "online"] = Field(
        "offline", description="offline: the fixed teacher and its branches teach; online: both nets learn, as peers"
    )
    student_taps: tuple[str, ...] = Field(
        (), description="modules of the student that branches read, from input to output; default: its residual stages"
    )
    teacher_taps: tuple[str, ...] = Field(
        (), description="modules of the teacher that branches read, the same number; default: its residual stages"
    )
    teacher_branches: BranchTrainingConfig | None = Field(None, description="offline: how the teacher's branches learn")
    temperature: Positive = Field(3.0, description="temperature of all soft targets, which are scaled by its square")
    task_weight: NonNegative = Field(1.0, description="weight of the cross-entropy of upright images with the labels")
    branch_weight: NonNegative = Field(1.0, description="weight of the branches' soft targets")
    logit_weight: NonNegative = Field(1.0, description="weight of the soft targets of the nets' own logits")
    joint_weight: NonNegative = Field(
        1.0, description="online: weight of the branches' cross-entropy with joint labels of class and orientation"
    )

    @model_validator(mode="after")
    def _branches_can_learn(self) -> RotationsConfig:
        if (self.mode == "offline") != (self.teacher_branches is not None):
            raise ValueError(
                "`teacher_branches` is required if `mode` is offline, and not allowed otherwise: online, the branches "
                "of both nets learn with the student"
            )
        if self.student_taps and self.teacher_taps and len(self.student_taps) != len(self.teacher_taps):
            raise ValueError(
                f"`student_taps` and `teacher_taps` must have the same length, got {len(self.student_taps)} and "
                f"{len(self.teacher_taps)}"
            )
        joint = self.joint_weight if self.mode == "online" else 0.0
        if max(self.task_weight, self.branch_weight, self.logit_weight, joint) == 0:
            raise ValueError("at least one weight must be positive, or there is nothing to learn from")
        if self.mode == "offline" and self.joint_weight != 1:
            raise ValueError("`joint_weight` is for mode online: offline, the student's branches have no joint labels")
        return self


class AdaptationConfig(Section):
    """Joint distillation and domain adaptation: teacher and student learn, and the unseen domain has no labels."""

    temperature: Positive = Field(20.0, description="temperature of the soft targets, which are scaled by its square")
    source_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.3, description="share of the soft targets on labeled images; the labels get the rest"
    )
    kernel: Literal["gaussian", "linear"] = Field(
        "gaussian",
        description="kernel of the discrepancy between the teacher's features: Gaussians of five widths, "
        "averaged, or linear (compares the means)",
    )
    teacher_tap: str = Field("flatten", description="module of the teacher whose features are aligned")
    teacher_lr_factor: Positive = Field(1.0, description="the teacher's learning rate, as a factor of student.train.lr")


class WidthConfig(Section):
    """Bit widths that a student is trained at before its own."""

    weight_bits: Bits = Field(description="bits of weights")
    act_bits: Bits = Field(description="bits of activations; other keys are those of student.quant")
    epochs: Epochs = Field(description="length of training at these widths")


class SelfDistillationConfig(Section):
    """SPEQ: the student learns from itself with some activations at 8 bits, drawn at every step."""

    weight: Positive = Field(1.0, description="weight of this term, which is added to `terms`")
    temperature: Positive = Field(
        2.0, description="temperature of the compared probabilities; the loss is scaled by its square"
    )
    low_share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.5, description="probability that an activation keeps its own bits in the copy"
    )
