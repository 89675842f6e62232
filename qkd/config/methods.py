"""The schema of nets and branches that learn alongside a student, and which keys of a student do not go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from qkd.config.data_free import OF_METHODS
from qkd.config.sections import Bits, Epochs, NonNegative, Positive, Section, without_defaults
from qkd.config.training import PhaseConfig, QuantConfig, TermConfig, TrainConfig

if TYPE_CHECKING:
    from qkd.config.bind_faults import Fault
    from qkd.config.experiment import RunConfig, StudentConfig, TeacherConfig

STEPS = ("rotations", "peers", "adaptation", "method")  # keys of a student that define the training step


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


def low_bit_faults(student: StudentConfig) -> list[str]:
    """Return the incompatible settings of a student, one sentence with the keys for each.

    Args:
        student: The section, whose keys are each valid on their own.
    """
    return [*_rule_faults(student), *_width_faults(student), *_self_faults(student), *_float_agent_faults(student)]


def _float_agent_faults(student: StudentConfig) -> list[str]:
    agent = student.float_agent
    if agent is None:
        return []
    faults = []
    if student.float_train is None:
        faults.append("`float_agent` is for `float_train`, which is missing")
    if agent.policy in ("search", "teacher", "file"):
        faults.append(f"`float_agent.policy` must name a self-contained policy, got `{agent.policy}`")
    distilled = [key for key in ("data_free", "adaptation") if getattr(student, key) is not None]
    if agent.cutmix_probability and distilled:
        faults.append(f"`float_agent` cannot use CutMix with {distilled[0]}, whose images have no labels to mix")
    return faults


def _rule_faults(student: StudentConfig) -> list[str]:
    rules, faults = student.low_bit, []
    if rules.places_weights and student.quant.weight_quantizer == "dorefa":
        faults.append(
            "`low_bit.dampening` and `low_bit.oscillation_thresholds` need `quant.weight_quantizer` lsq or stats, got "
            "dorefa, whose codes have no fixed positions among the weights"
        )
    if rules.reestimate_batches and student.bn == "frozen_teacher":
        faults.append("`low_bit.reestimate_batches` needs `bn: train`: with frozen_teacher, the teacher's are kept")
    if rules.transition_rate is not None and student.bn == "frozen_teacher":
        faults.append(
            "`low_bit.transition_rate` needs `bn: train`: with frozen_teacher, all weights train at the schedule's rate"
        )
    return faults


def _width_faults(student: StudentConfig) -> list[str]:
    if not student.widths:
        return []
    used = [f"`{key}`" for key in (*STEPS, "auxiliary", "data_free") if getattr(student, key) is not None]
    faults = [f"`widths` cannot be combined with {', '.join(used)}: they use only `terms`"] if used else []
    if any(phase.teacher_terms is not None or phase.meta is not None for phase in student.phases):
        faults.append(
            "`widths` cannot be combined with `teacher_terms` or `meta` in `phases`: they need a fixed teacher"
        )
    return faults


def _self_faults(student: StudentConfig) -> list[str]:
    if student.self_distillation is None:
        return []
    used = [f"`{key}`" for key in STEPS if getattr(student, key) is not None]
    faults = (
        [f"`self_distillation` cannot be combined with {', '.join(used)}, which define another step"] if used else []
    )
    if student.quant.act_bits >= 8:
        faults.append("`self_distillation` needs `quant.act_bits` below 8: the copy differs only in finer activations")
    if all(phase.teacher_terms or phase.meta or phase.combine != "sum" or phase.trains == "modules"
           for phase in student.phases) and student.phases:  # fmt: skip
        faults.append("`self_distillation` needs a phase that trains the student on a sum of terms")
    return faults


def method_faults(teacher: TeacherConfig, student: StudentConfig) -> list[str]:
    """Return the incompatible settings: an ensemble has no features and does not learn; an auxiliary net is fixed."""
    learner, where = (student, "student") if student.auxiliary is None else (student.auxiliary, "student.auxiliary")
    terms = [*learner.terms, *(term for phase in learner.phases for term in phase.terms or ())]
    faults = [
        f"{where}: {term.loss} has taps, but teacher.members is {teacher.members}, and an ensemble has no features: "
        f"use losses on logits, or one member"
        for term in terms if term.taps and term.weight > 0 and teacher.members > 1
    ]  # fmt: skip
    if student.quiz_images is not None:
        faults += ["student.phases: meta needs teacher.members 1"] if teacher.members > 1 else []
        faults += ["student.phases: meta cannot be combined with student.auxiliary"] if student.auxiliary else []
    if any(phase.teacher_terms is not None for phase in student.phases):
        faults += ["student.phases: teacher_terms needs teacher.members 1"] if teacher.members > 1 else []
        faults += (
            ["student.phases: teacher_terms cannot be combined with student.auxiliary"] if student.auxiliary else []
        )
    if student.peers is not None and any(phase.peers and phase.teacher_terms for phase in student.phases):
        faults.append("student.phases: a phase can have teacher_terms or peers, not both; set `peers: false` there")
    return faults


def data_free_faults(config: RunConfig) -> list[str]:
    """Return the settings that need real images, which ``student.data_free`` rules out."""
    student = config.student
    if student.data_free is None:
        return []
    agent = student.agent
    wrong = {
        f"student.view: must be `same` with data_free, got `{student.view}`: there are no raw images": (
            student.view != "same"
        ),
        f"student.agent: policy `{agent.policy}` does not work with data_free: name one that changes single images, or "
        f"`none` (a search scores real validation images; CutMix needs the next images)": (
            agent.policy in ("search", "teacher") or bool(agent.cutmix_probability)
        ),
        "student.rotations: cannot be combined with data_free: the teacher's branches learn from real images": (
            student.rotations is not None
        ),
        "student.phases: meta and teacher_terms cannot be combined with data_free: images are "
        "made from a teacher that does not change": any(
            phase.meta is not None or phase.teacher_terms is not None for phase in student.phases
        ),
        "student.auxiliary: cannot be combined with data_free: images are made from the net that teaches the student, "
        "and the auxiliary would need them first": student.auxiliary is not None,
        "bench.int8_baseline: cannot be used with data_free: it calibrates on real images": config.bench.int8_baseline,
    }
    return [fault for fault, is_there in wrong.items() if is_there]


MOST_BITS = 4  # of weights that the rules act on, as in quantizers.recipes.codes; a test keeps them equal
RULES = ("dampening", "oscillation_thresholds", "transition_rate")


def idle_faults(config: RunConfig) -> Iterator[Fault]:
    """Yield each key of a new config that has no effect beside the others, or a harmful one.

    They were accepted before, so that a run's own config may have them, and is still read.

    Args:
        config: Valid otherwise.
    """
    teacher, student = config.teacher, config.student
    if teacher.members == 1 and (teacher.ensemble != "probability" or teacher.ensemble_temperature != 1):
        yield ("teacher",), "`ensemble` and `ensemble_temperature` are for `members` above 1, got 1"
    yield from _idle_rules(student)
    if student.data_free is not None:
        own, fields = student.data_free, type(student.data_free).model_fields
        for key, methods in OF_METHODS.get(own.family, {}).items():
            if own.method not in methods and getattr(own, key) != fields[key].get_default():
                yield ("student", "data_free"), f"method `{own.method}` does not read {key!r}; leave it out"


def _idle_rules(student: StudentConfig) -> Iterator[Fault]:
    rules, where = student.low_bit, ("student", "low_bit")
    idle = [key for key in RULES if getattr(rules, key)]
    if idle and _fewest_bits(student) > MOST_BITS:
        yield (
            where,
            f"`{idle[0]}` acts on weights of at most {MOST_BITS} bits, but the student has none; leave it out",
        )
    elif rules.oscillation_thresholds is not None and student.quant.weight_quantizer == "stats":
        yield (
            where,
            "`oscillation_thresholds` needs `quant.weight_quantizer: lsq`, got stats: its step size follows the "
            "weights, so that each freeze would move it, and with it all frozen weights",
        )


def _fewest_bits(student: StudentConfig) -> int:
    """Return the fewest bits of a weight, also on the way to the student's own widths."""
    quant = student.quant
    own = (quant.weight_bits, quant.first_bits, quant.last_bits)
    others = (one.get("weight_bits") for one in quant.overrides.values())
    widths = (one.weight_bits for one in student.widths)
    return min(bits for bits in (*own, *others, *widths) if bits is not None)
