"""The schema of an experiment: every key a config file may hold, with its unit and its default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qkd.config_methods import MetaConfig, PeersConfig, require_one_quiz
from qkd.config_stages import BenchConfig, ExportConfig, SearchConfig
from qkd.config_types import Bits, Count, Fraction, NonNegative, Positive, Section


class DataConfig(Section):
    """Which images, and how they are split and batched."""

    name: str = Field(description="digits, cifar10, cifar100, fashion-mnist, mnist, svhn, npz or folder")
    path: Path | None = Field(
        None, description="npz: folder with train.npz and test.npz; folder: with train/ and test/"
    )
    root: Path = Field(Path("data"), description="where torchvision keeps (and downloads) its sets")
    download: bool = Field(True, description="fetch a torchvision set that is not in root")
    image_size: Count | None = Field(None, description="side in pixels that images of a folder are resized to")
    val_fraction: Fraction = Field(0.1, description="share of the training images kept for search and model selection")
    train_limit: Count | None = Field(None, description="use only this many training images (stratified, seeded)")
    batch_size: Count = Field(128, description="training images a step")
    eval_batch_size: Count = Field(500, description="images a forward pass when scoring")
    workers: Annotated[int, Field(ge=0)] = Field(2, description="decoding processes; folders only")


class AgentConfig(Section):
    """A role's augmentation agent."""

    policy: str = Field(
        "crop_flip",
        description="none, crop_flip, crop, cutmix, trivial, randaugment, pba; file: a schedule; search: what this "
        "run's search finds for the role; teacher (student only): the teacher's",
    )
    schedule: Path | None = Field(None, description="schedule file (YAML) when policy is file")
    crop_padding: Annotated[int, Field(ge=0)] = Field(4, description="pixels of padding before the random crop")
    flip: bool = Field(True, description="horizontal flip with probability 1/2")
    cutout: Annotated[int, Field(ge=0)] = Field(0, description="side in pixels of a final cut-out square; 0 is off")
    cutmix: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="probability that an image gets a box of another one; absent: 0.5 for cutmix, else 0"
    )
    flatten: bool = Field(
        False, description="pba, file: every image takes the policy of a random epoch (the order is left out)"
    )
    magnitude: Annotated[int, Field(ge=0, le=30)] = Field(9, description="randaugment: level of every operation, 0..30")
    operations: Count = Field(2, description="randaugment: operations an image")

    @model_validator(mode="after")
    def _file_needs_path(self) -> AgentConfig:
        if (self.policy == "file") != (self.schedule is not None):
            raise ValueError("`schedule` names a file exactly when `policy` is `file`")
        return self

    @property
    def cutmix_probability(self) -> float:
        """Return the probability of CutMix that applies."""
        if self.cutmix is not None:
            return self.cutmix
        return 0.5 if self.policy == "cutmix" else 0.0  # 0.5: as published for CIFAR


class TrainConfig(Section):
    """Optimizer, learning-rate schedule and length of one training."""

    epochs: Count = Field(description="passes over the training images")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd is with Nesterov momentum")
    lr: Positive = Field(0.1, description="peak learning rate")
    momentum: Fraction = Field(0.9, description="sgd only")
    weight_decay: NonNegative = Field(5e-4, description="on weights of rank 2 and more, not on biases, norms or scales")
    scale_lr_factor: Positive = Field(1.0, description="learning rate of quantizer scales, as a factor of lr")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="after the warm-up")
    milestones: tuple[Fraction, ...] = Field((0.3, 0.6, 0.8), description="step: fractions of the training")
    gamma: Positive = Field(0.1, description="step: factor at each milestone")
    warmup_epochs: NonNegative = Field(0.0, description="linear rise of the learning rate, in epochs")
    clip_grad_norm: Positive | None = Field(None, description="largest global gradient norm")
    label_smoothing: Fraction = Field(0.0, description="share of the label spread over all classes")
    ema_decay: Fraction = Field(0.0, description="decay a step of the averaged weights that are kept; 0 is off")
    autocast: Literal["off", "bf16", "fp16"] = Field("off", description="reduced precision, where the device has it")
    channels_last: bool = Field(False, description="memory format of images and convolutions")
    checkpoint_every_s: NonNegative = Field(
        60.0, description="least seconds between checkpoints; one at every epoch's end"
    )

    @model_validator(mode="after")
    def _warmup_is_shorter(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"`warmup_epochs` must be less than `epochs`, got {self.warmup_epochs} of {self.epochs}")
        return self


class TermConfig(Section):
    """One weighted term of the student's loss."""

    loss: str = Field(description="a name of `qkd ls losses`")
    weight: NonNegative = Field(1.0, description="factor in the sum")
    taps: tuple[tuple[str, str], ...] = Field((), description="feature losses: pairs [student module, teacher module]")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="factor on the weight after each epoch of its phase"
    )
    options: dict[str, float | int | str | bool] = Field(
        default_factory=dict, description="keyword arguments of the loss, e.g. temperature"
    )


DEFAULT_TERMS = (
    TermConfig(loss="cross_entropy", weight=0.5),
    TermConfig(loss="soft_target", weight=0.5, options={"temperature": 4.0}),
)


class PhaseConfig(Section):
    """A stretch of the student's epochs with its own loss terms."""

    name: str = Field("tutoring", description="shown in logs, e.g. self_study, co_study, tutoring")
    epochs: Count = Field(description="epochs of this phase; all phases add up to student.train.epochs")
    terms: tuple[TermConfig, ...] | None = Field(None, description="loss terms; the student's own where absent")
    teacher_terms: tuple[TermConfig, ...] | None = Field(
        None,
        description="co-study: the teacher is trained along, with these terms; in them it is the student, and the "
        "student is its teacher",
    )
    teacher_lr_factor: Positive = Field(1.0, description="co-study: the teacher's learning rate, as a factor of lr")
    meta: MetaConfig | None = Field(None, description="MetaDistil: the teacher is taught by a quiz")
    peers: bool = Field(
        True,
        description="whether student.peers learn along, where there are any; student.terms do not apply then, and "
        "`terms` come on top",
    )
    trains: Literal["student", "modules"] = Field(
        "student",
        description="modules: only the modules of loss terms learn (attention, adapters); the student stands still",
    )
    combine: Literal["sum", "clipped"] = Field(
        "sum",
        description="clipped: in each weight tensor, the gradient of the terms that need the teacher is no longer than "
        "that of the others, times a factor that rises from 0.5 to 1 with the epochs",
    )
    freeze_batch_norm: bool = Field(
        False, description="train the deployed arithmetic: folded batch norm with running statistics, int32 biases"
    )
    lr_factor: Positive | None = Field(
        None,
        description="factor on the learning rate; absent: 1, but 0.1 with freeze_batch_norm, which high rates break",
    )

    @model_validator(mode="after")
    def _student_learns_or_stands_still(self) -> PhaseConfig:
        if self.trains == "modules":
            asked = {
                "teacher_terms": self.teacher_terms is not None,
                "combine": self.combine != "sum",
                "freeze_batch_norm": self.freeze_batch_norm,
            }
            wrong = [f"`{name}`" for name, is_asked in asked.items() if is_asked]
            if wrong:
                raise ValueError(f"`trains: modules` goes without {', '.join(wrong)}: the student stands still")
        if self.teacher_terms is not None and self.combine != "sum":
            raise ValueError("`combine: clipped` goes without `teacher_terms`: it weighs a fixed teacher's terms")
        return self

    @property
    def rate_factor(self) -> float:
        """Return the factor on the learning rate that applies in this phase."""
        if self.lr_factor is not None:
            return self.lr_factor
        return 0.1 if self.freeze_batch_norm else 1.0


class QuantConfig(Section):
    """Bits and quantizers of the student (the keys of `quantizers.QuantSpec`)."""

    weight_bits: Bits = Field(description="bits of weights")
    act_bits: Bits = Field(description="bits of activations that enter a convolution or linear layer")
    first_bits: Bits = Field(8, description="first layer: weights and image")
    last_bits: Bits = Field(8, description="last layer: weights and input")
    sum_bits: Bits = Field(8, description="inputs and output of residual sums, and what pooling averages")
    weight_quantizer: Literal["lsq", "dorefa"] = Field("lsq", description="how weights meet their grid")
    act_quantizer: Literal["lsq", "pact", "dorefa"] = Field("lsq", description="how activations meet their grid")
    per_channel: bool = Field(True, description="one weight scale an output channel, or one a tensor")
    overrides: dict[str, dict[Literal["weight_bits", "act_bits"], Bits]] = Field(
        default_factory=dict, description="layer name pattern -> {weight_bits, act_bits}"
    )


class TeacherConfig(Section):
    """The full-precision role."""

    net: str = Field(description="a name of `qkd ls nets`")
    weights: Path | None = Field(None, description="float weights (safetensors) to start from")
    untrained: bool = Field(False, description="random weights, for a student phase with teacher_terms to train")
    train: TrainConfig | None = Field(None, description="absent: `weights` are used as they are")
    agent: AgentConfig = Field(default_factory=AgentConfig)
    members: Count = Field(1, description="nets that differ by seed only; the student learns from their average")
    ensemble: Literal["probability", "logit"] = Field("probability", description="what is averaged over the members")
    ensemble_temperature: Positive = Field(
        1.0, description="probability: temperature at which they are averaged; terms have one of their own"
    )

    @model_validator(mode="after")
    def _members_are_trained(self) -> TeacherConfig:
        if self.members > 1 and (self.train is None or self.weights is not None):
            raise ValueError(
                "`members` above 1 needs `train` and no `weights`: members start from weights of their own"
            )
        return self

    @model_validator(mode="after")
    def _needs_some_weights(self) -> TeacherConfig:
        if self.untrained and (self.train is not None or self.weights is not None):
            raise ValueError("`untrained` goes with neither `train` nor `weights`")
        if not self.untrained and self.train is None and self.weights is None:
            raise ValueError("needs `train` (how to train it) or `weights` (a file of trained ones)")
        return self


class AuxiliaryConfig(Section):
    """An auxiliary teacher: trained from the teacher first, then the student's teacher in its place."""

    net: str | None = Field(None, description="absent: the student's net")
    quant: QuantConfig | None = Field(None, description="absent: full precision; between teacher and student: 8 bits")
    init: Literal["auto", "random"] = Field(
        "auto",
        description="auto: float_train where it is there, else the student's float training or the teacher, where the "
        "net is theirs, else random",
    )
    float_train: TrainConfig | None = Field(
        None, description="a float training of its own, on the labels, to start from"
    )
    train: TrainConfig = Field(description="its training from the teacher")
    terms: tuple[TermConfig, ...] = Field(
        (TermConfig(loss="information_flow", taps=(("flatten", "flatten"),)),),
        description="weighted loss terms; by default information flow before the last layer, as our nets name it",
    )
    phases: tuple[PhaseConfig, ...] = Field((), description="absent: as for a student; one phase in full precision")

    @model_validator(mode="after")
    def _phases_fit(self) -> AuxiliaryConfig:
        total = sum(phase.epochs for phase in self.phases)
        if self.phases and total != self.train.epochs:
            raise ValueError(f"epochs of `phases` add up to {total}, but `train.epochs` is {self.train.epochs}")
        if any(phase.teacher_terms is not None for phase in self.phases):
            raise ValueError("`phases` with teacher_terms are for the student")
        if self.quant is None and any(phase.freeze_batch_norm for phase in self.phases):
            raise ValueError("`phases` with freeze_batch_norm need `quant`: full precision has no deployed arithmetic")
        return self


class StudentConfig(Section):
    """The low-bit role."""

    net: str | None = Field(None, description="absent: the teacher's net")
    init: Literal["auto", "teacher", "float", "random"] = Field(
        "auto", description="auto: the teacher's weights where the nets agree, else an own float training"
    )
    float_train: TrainConfig | None = Field(None, description="the own float training, for init: float")
    quant: QuantConfig = Field(description="bits and quantizers")
    train: TrainConfig = Field(description="the low-bit training")
    agent: AgentConfig = Field(default_factory=AgentConfig)
    view: Literal["same", "own", "clean"] = Field(
        "same", description="what the teacher sees: the student's images, its own agent's, or clean ones"
    )
    terms: tuple[TermConfig, ...] = Field(DEFAULT_TERMS, description="weighted loss terms")
    phases: tuple[PhaseConfig, ...] = Field((), description="absent: one phase over all epochs, the last tenth frozen")
    calibration_batches: Count = Field(8, description="training batches that set activation scales")
    auxiliary: AuxiliaryConfig | None = Field(None, description="a net between teacher and student")
    peers: PeersConfig | None = Field(None, description="nets that learn beside the student (a student ensemble)")

    @model_validator(mode="after")
    def _phases_add_up(self) -> StudentConfig:
        total = sum(phase.epochs for phase in self.phases)
        if self.phases and total != self.train.epochs:
            raise ValueError(f"epochs of `phases` add up to {total}, but `train.epochs` is {self.train.epochs}")
        return self

    @property
    def quiz_images(self) -> int | None:
        """Size of the quiz that the student's images lack; None where no phase has one."""
        return next((phase.meta.quiz_images for phase in self.phases if phase.meta is not None), None)

    @model_validator(mode="after")
    def _one_teacher_is_taught_one_way(self) -> StudentConfig:
        metas = [phase.meta for phase in self.phases if phase.meta is not None]
        require_one_quiz(metas)
        if metas and any(phase.teacher_terms is not None for phase in self.phases):
            raise ValueError("`meta` and `teacher_terms` both move the teacher; use one of them in a run")
        if self.peers is not None and any(phase.meta is not None and phase.peers for phase in self.phases):
            raise ValueError("a phase has either `meta` or peers; say `peers: false` there")
        first = 0
        for phase in self.phases:
            first += phase.epochs
            if phase.meta is not None and phase.meta.teacher_start_epoch >= first:
                raise ValueError(
                    f"`meta.teacher_start_epoch` of phase `{phase.name}` is {phase.meta.teacher_start_epoch}, but the "
                    f"phase ends with epoch {first - 1} (counted from 0), so its teacher would never be taught"
                )
        return self


class RunConfig(Section):
    """One experiment, from teacher to report."""

    name: str = Field(description="name of the run folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="every random draw derives from it")
    device: str = Field("auto", description="auto, cpu or cuda", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: Count | None = Field(None, description="CPU threads of training; absent: all cores")
    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig
    search: SearchConfig = Field(default_factory=SearchConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    bench: BenchConfig = Field(default_factory=BenchConfig)

    @model_validator(mode="after")
    def _mixed_images_are_seen_by_both(self) -> RunConfig:
        agents = {
            "student": self.student.agent,
            **({"teacher": self.teacher.agent} if self.student.view == "own" else {}),
        }
        mixing = [role for role, agent in agents.items() if agent.cutmix_probability]
        if mixing and self.student.view != "same":
            raise ValueError(
                f"student.view: must be `same` with CutMix ({mixing[0]}.agent), got `{self.student.view}`: the teacher "
                f"would judge another mixture than the student sees"
            )
        return self

    @property
    def student_net(self) -> str:
        """Name of the student's net: its own, or the teacher's."""
        return self.student.net or self.teacher.net

    @property
    def student_start(self) -> Literal["teacher", "float", "random"]:
        """What the student starts from, with ``auto`` resolved."""
        if self.student.init == "auto":
            return "teacher" if self.student_net == self.teacher.net else "float"
        return self.student.init

    @property
    def searched_roles(self) -> tuple[str, ...]:
        """The roles (``teacher``, ``student``) whose agent this run's search finds, in the order of their searches."""
        agents = (("teacher", self.teacher.agent), ("student", self.student.agent))
        return tuple(role for role, agent in agents if agent.policy == "search")

    @model_validator(mode="after")
    def _agents_can_be_found(self) -> RunConfig:
        if self.teacher.agent.policy == "teacher":
            raise ValueError("teacher.agent.policy: `teacher` is for the student; name a policy, or `search` for one")
        if self.teacher.agent.policy == "search" and self.teacher.train is None:
            raise ValueError(
                "teacher.agent.policy: `search` needs teacher.train: the search trains teachers as it says; a teacher "
                "that is taken from a file has no use for an agent"
            )
        return self

    @model_validator(mode="after")
    def _methods_go_together(self) -> RunConfig:
        faults = _method_faults(self.teacher, self.student)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _student_can_start(self) -> RunConfig:
        if self.student_start == "teacher" and self.student_net != self.teacher.net:
            raise ValueError(
                f"student.init `teacher` needs one net for both roles, but the student's is {self.student_net} and the "
                f"teacher's {self.teacher.net}; use `float` with student.float_train, or `random`"
            )
        if self.student_start == "float" and self.student.float_train is None:
            raise ValueError(
                f"student.float_train is missing: the student ({self.student_net}, init `{self.student.init}`) starts "
                f"from an own float training; say how in student.float_train, or use init `random`"
            )
        return self


def _method_faults(teacher: TeacherConfig, student: StudentConfig) -> list[str]:
    """Return what does not go together: an ensemble has no features and learns nothing, an auxiliary stays as it is."""
    learner, where = (student, "student") if student.auxiliary is None else (student.auxiliary, "student.auxiliary")
    terms = [*learner.terms, *(term for phase in learner.phases for term in phase.terms or ())]
    faults = [
        f"{where}: {term.loss} has taps, but teacher.members is {teacher.members}, and an ensemble has no features: "
        f"use losses on logits, or one member"
        for term in terms if term.taps and term.weight > 0 and teacher.members > 1
    ]  # fmt: skip
    if any(phase.meta is not None for phase in student.phases):
        faults += ["student.phases: meta needs teacher.members 1"] if teacher.members > 1 else []
        faults += ["student.phases: meta goes with no student.auxiliary"] if student.auxiliary else []
    if any(phase.teacher_terms is not None for phase in student.phases):
        faults += ["student.phases: teacher_terms needs teacher.members 1"] if teacher.members > 1 else []
        faults += ["student.phases: teacher_terms goes with no student.auxiliary"] if student.auxiliary else []
    if student.peers is not None and any(phase.peers and phase.teacher_terms for phase in student.phases):
        faults.append("student.phases: a phase has either teacher_terms or peers; say `peers: false` there")
    return faults
