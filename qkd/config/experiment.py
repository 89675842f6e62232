"""The schema of an experiment: two roles, and everything that is done with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from qkd.config.conflicts import FEDERATED_STUDENT, data_free_faults, federated_faults, low_bit_faults, method_faults
from qkd.config.data import UNSCHEDULED, AgentConfig, DataConfig
from qkd.config.data_free import DataFreeConfig
from qkd.config.methods import (
    AdaptationConfig,
    AuxiliaryConfig,
    PeersConfig,
    RotationsConfig,
    SelfDistillationConfig,
    WidthConfig,
)
from qkd.config.sections import MOST_MEMBERS, NEWER, Positive, Section, Threads, UserPath, without_defaults
from qkd.config.stages import BenchConfig, ExportConfig, FederatedConfig, LogConfig, SearchConfig
from qkd.config.training import (
    DEFAULT_TERMS,
    LowBitConfig,
    PhaseConfig,
    QuantConfig,
    StudentTrainConfig,
    TermConfig,
    TrainConfig,
)
from qkd.nets.own.spelling import spelled

NET = "a name from `qkd ls nets`, or your own code: path/to/file.py:function, package.module:name"
WEIGHTS = "file of float weights (relative to the current folder), or `imagenet` for torchvision's own,"
HEAD = "new: replace the last linear layer of `weights` with a random one; new:<layer> names the layer"
Head = Annotated[str, Field(pattern=r"^(keep|new(:[A-Za-z0-9_.]+)?)$"), NEWER]
NetOptions = Annotated[dict[str, Any], NEWER]


class TeacherConfig(Section):
    """The full-precision role."""

    net: str = Field(description=f"{NET}; if `run` is given, that run's net")
    net_options: NetOptions = Field(default_factory=dict, description="keyword arguments of the net's builder")
    run: UserPath | None = Field(
        None,
        description="run folder to copy the teacher from; its settings need not be repeated here",
    )
    weights: UserPath | None = Field(None, description=f"{WEIGHTS} to start from")
    head: Head = Field("keep", description=HEAD)
    untrained: bool = Field(
        False, description="start from random weights, for a phase with teacher_terms or online rotations"
    )
    train: TrainConfig | None = Field(
        None,
        description="training of the teacher; default: none if there are `weights` and the head is kept, else"
        " the defaults below",
    )
    agent: AgentConfig = Field(default_factory=AgentConfig)
    members: Annotated[int, Field(ge=1, le=MOST_MEMBERS)] = Field(
        1, description="number of teachers that differ only by seed; the student learns from their average"
    )
    ensemble: Literal["probability", "logit"] = Field("probability", description="what is averaged over the members")
    ensemble_temperature: Positive = Field(
        1.0, description="probability: temperature at which probabilities are averaged; terms have their own"
    )

    @model_validator(mode="after")
    def _a_new_head_has_weights(self) -> TeacherConfig:
        if self.head != "keep" and self.weights is None:
            raise ValueError("`head` applies to the last layer of `weights`, which are missing")
        return self

    @model_validator(mode="after")
    def _members_are_trained(self) -> TeacherConfig:
        if self.members > 1 and (self.train is None or self.weights is not None):
            raise ValueError(
                "`members` above 1 needs `train` and no `weights`: each member starts from its own weights"
            )
        return self

    @model_validator(mode="after")
    def _needs_some_weights(self) -> TeacherConfig:
        if self.untrained and (self.train is not None or self.weights is not None):
            raise ValueError("`untrained` cannot be combined with `train` or `weights`")
        if not self.untrained and self.train is None and self.weights is None:
            raise ValueError("needs `train` (how to train it) or `weights` (a file of trained weights)")
        return self


class StudentConfig(Section):
    """The low-bit role."""

    net: str | None = Field(None, description=f"{NET}; default: the teacher's net")
    net_options: NetOptions = Field(
        default_factory=dict, description="keyword arguments of the net's builder, instead of the teacher's"
    )
    init: Literal["auto", "teacher", "float", "random"] = Field(
        "auto",
        description="initial weights; auto: `weights` if given, else the teacher's if both have the same net,"
        " else a separate float training",
    )
    weights: UserPath | None = Field(None, description=f"{WEIGHTS} of the student's net to start from, with init auto")
    head: Head = Field("keep", description=HEAD)
    float_train: TrainConfig | None = Field(None, description="the student's own float training, for init: float")
    recipe: Annotated[Literal["none", "default"], NEWER] = Field(
        "none",
        description="default: sets the training options recommended for the bit width, for keys that are not "
        "given; `qkd show --explain student.recipe` lists them",
    )
    quant: QuantConfig = Field(description="bits and quantizers")
    low_bit: Annotated[LowBitConfig, NEWER] = Field(
        default_factory=LowBitConfig, description="options for low-bit training"
    )
    widths: Annotated[tuple[WidthConfig, ...], NEWER] = Field(
        (),
        description="bit widths that the student is trained at before its own, each from the weights of the "
        "previous one",
    )
    self_distillation: Annotated[SelfDistillationConfig | None, NEWER] = Field(
        None, description="the student also learns from itself with more precise activations (SPEQ)"
    )
    train: StudentTrainConfig = Field(default_factory=StudentTrainConfig, description="training of the low-bit student")
    agent: AgentConfig = Field(default_factory=AgentConfig)
    float_agent: Annotated[AgentConfig | None, NEWER] = Field(
        None, description="agent of the student's own float training; default: `agent`"
    )
    view: Literal["same", "own", "clean"] = Field(
        "same", description="images for the teacher: same: the student's; own: from its own agent; clean: not augmented"
    )
    terms: tuple[TermConfig, ...] = Field(DEFAULT_TERMS, description="weighted loss terms")
    phases: tuple[PhaseConfig, ...] = Field(
        (), description="phases of training; default: a single one whose last tenth trains the deployed arithmetic"
    )
    rotations: RotationsConfig | None = Field(
        None, description="HSSAKD: rotated images and auxiliary branches instead of `terms`"
    )
    calibration_batches: Annotated[int, Field(ge=1, le=100_000)] = Field(
        8, description="number of training batches from which activation scales are set"
    )
    bn: Literal["train", "frozen_teacher"] = Field(
        "train",
        description="frozen_teacher: during calibration and training, batch norm keeps the statistics that "
        "the student starts with (the teacher's if both have the same net)",
    )
    data_free: DataFreeConfig | None = Field(
        None, description="use no real images: the student learns from images that are made from the teacher"
    )
    adaptation: Annotated[AdaptationConfig | None, NEWER] = Field(
        None, description="the teacher adapts to data.unseen_domain without its labels, and the student learns from it"
    )
    auxiliary: AuxiliaryConfig | None = Field(
        None, description="a net between teacher and student: it learns from the teacher, then teaches the student"
    )
    peers: PeersConfig | None = Field(None, description="nets that learn alongside the student (a student ensemble)")
    method: str | None = Field(
        None,
        description="a custom method: path/to/file.py:Class, package.module:Class, or an entry point of group"
        " qkd.methods",
    )
    method_options: dict[str, Any] = Field(default_factory=dict, description="options for `method`")

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out newer keys that are not used: configs and hashes of older runs do not change."""
        newer = ["bn", "data_free", "adaptation", "self_distillation", "widths", "float_agent"]
        newer += ["method", "method_options"] if self.method is None else []  # a method's options are always written
        if self.recipe == "none":  # with a recipe, write every key: one left out would be set again on reading
            newer += ["recipe", "low_bit"]
        return without_defaults(self, serialize(self), *newer)

    @model_validator(mode="after")
    def _a_new_head_has_weights(self) -> StudentConfig:
        if self.head != "keep" and self.weights is None:
            raise ValueError("`head` applies to the last layer of `weights`, which are missing")
        return self

    @model_validator(mode="after")
    def _low_bits_can_be_trained(self) -> StudentConfig:
        if faults := low_bit_faults(self):
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _options_have_a_method(self) -> StudentConfig:
        if self.method_options and self.method is None:
            raise ValueError("`method_options` are for `method`, which is missing")
        return self

    @model_validator(mode="after")
    def _rotations_bring_their_loss(self) -> StudentConfig:
        if self.rotations is None:
            return self
        if self.peers is not None:
            raise ValueError("`rotations` and `peers` each define the training step; choose one")
        if self.auxiliary is not None:
            raise ValueError("`rotations` learn from the teacher's branches, but the student learns from `auxiliary`")
        if self.terms != DEFAULT_TERMS:
            raise ValueError("`rotations` define the loss: put `terms` on the phases without rotations, not here")
        if any(phase.teacher_terms is not None for phase in self.phases):
            raise ValueError(
                "a phase has `teacher_terms`, but `rotations` need a teacher that matches its branches; use mode "
                "online to train the teacher along with the student"
            )
        if any(phase.meta is not None for phase in self.phases):
            raise ValueError(
                "a phase has `meta`, which moves the teacher away from what its branches were trained on; choose one"
            )
        turned = [phase for phase in self.phases if phase.terms is None]
        if any(phase.trains != "student" or phase.combine != "sum" for phase in turned):
            raise ValueError(
                "`trains` and `combine` are for phases with `terms`; a phase without `terms` trains on `rotations`, "
                "whose terms are summed"
            )
        if self.phases and not turned:
            raise ValueError("every phase has its own `terms`, so none would train on `rotations`; remove one of them")
        return self

    @model_validator(mode="after")
    def _terms_are_used(self) -> StudentConfig:
        if self.peers is None or self.terms == DEFAULT_TERMS:
            return self
        if not any(phase.terms is None and not phase.peers for phase in self.phases):
            raise ValueError(
                "`peers` define the loss, so `terms` would never be used: put them on a phase (they are added "
                "to the peers' terms there), or turn peers off in a phase (`peers: false`)"
            )
        return self

    @model_validator(mode="after")
    def _phases_add_up(self) -> StudentConfig:
        total = sum(phase.epochs for phase in self.phases)
        if self.phases and total != self.train.epochs:
            raise ValueError(f"epochs of `phases` add up to {total}, but `train.epochs` is {self.train.epochs}")
        return self

    @property
    def quiz_images(self) -> int | None:
        """Size of the quiz that is held out from the student's images; None if no phase has one."""
        return next((phase.meta.quiz_images for phase in self.phases if phase.meta is not None), None)

    @model_validator(mode="after")
    def _one_teacher_is_taught_one_way(self) -> StudentConfig:
        metas = [phase.meta for phase in self.phases if phase.meta is not None]
        for name in ("quiz_images", "teacher_momentum", "teacher_weight_decay"):
            values = sorted({getattr(meta, name) for meta in metas})
            if len(values) > 1:
                raise ValueError(f"`meta.{name}` must be the same in all phases, got {values}")
        factors = sorted({phase.teacher_lr_factor for phase in self.phases if phase.teacher_terms is not None})
        if len(factors) > 1:
            raise ValueError(f"`teacher_lr_factor` must be the same in all phases, got {factors}")
        if metas and any(phase.teacher_terms is not None for phase in self.phases):
            raise ValueError("`meta` and `teacher_terms` both train the teacher; use only one of them in a run")
        if self.peers is not None and any(phase.meta is not None and phase.peers for phase in self.phases):
            raise ValueError("a phase can have `meta` or peers, not both; set `peers: false` there")
        first = 0
        for phase in self.phases:
            first += phase.epochs
            if phase.meta is not None and phase.meta.teacher_start_epoch >= first:
                raise ValueError(
                    f"`meta.teacher_start_epoch` of phase `{phase.name}` is {phase.meta.teacher_start_epoch}, but the "
                    f"phase ends with epoch {first - 1} (counted from 0), so the teacher would never be taught"
                )
        return self


class RunConfig(Section):
    """One experiment, from teacher to report."""

    name: str = Field(description="name of the run folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="seed of all random draws")
    device: str = Field("auto", description="auto, cpu or cuda", pattern=r"^(auto|cpu|cuda(:\d+)?)$", max_length=8)
    threads: Threads | None = Field(None, description="CPU threads for training, per process; default: all cores")
    sync_batch_norm: bool = Field(
        True,
        description="on several devices: batch norm over whole batches, as on one device; false: each device "
        "over its own share",
    )
    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig
    search: SearchConfig = Field(default_factory=SearchConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    bench: BenchConfig = Field(default_factory=BenchConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    federated: FederatedConfig | None = Field(None, description="clients that train together, without a teacher")

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out unused clients, or the keys that clients do not read: hashes of other runs do not change."""
        values: dict[str, Any] = serialize(self)
        if self.federated is None:
            values.pop("federated", None)
        else:
            values["student"] = {key: values["student"][key] for key in FEDERATED_STUDENT}
        return values

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
                f"would otherwise see a different mixture from the student"
            )
        return self

    @model_validator(mode="after")
    def _teachers_branches_can_learn(self) -> RunConfig:
        own = self.student.rotations
        branches = None if own is None else own.teacher_branches
        if branches is not None and branches.joint and self.teacher.train is None:
            raise ValueError(
                "teacher.train is missing: student.rotations.teacher_branches.joint trains branches by its settings; "
                "use joint false with separate training"
            )
        if branches is not None and branches.joint and self.teacher.train and self.teacher.train.ema_decay:
            raise ValueError(
                f"teacher.train.ema_decay: must be 0 with student.rotations.teacher_branches.joint, got "
                f"{self.teacher.train.ema_decay}: it averages the teacher, but not the branches that read its features"
            )
        if own is not None and self.teacher.members > 1:
            raise ValueError(
                f"teacher.members: must be 1 with student.rotations, got {self.teacher.members}: branches read the "
                f"features of one net"
            )
        if branches is not None and self.teacher.untrained:
            raise ValueError("teacher.untrained: offline rotations learn from a trained teacher; use mode online")
        return self

    @property
    def teacher_net(self) -> str:
        """Spelling of the teacher's net: its name, then its options."""
        return spelled(self.teacher.net, self.teacher.net_options)

    @property
    def student_net(self) -> str:
        """Spelling of the student's net: its own, or the teacher's; its options replace the teacher's."""
        if self.student.net is None:
            return spelled(self.teacher.net, self.student.net_options or self.teacher.net_options)
        return spelled(self.student.net, self.student.net_options)

    @property
    def student_start(self) -> Literal["weights", "teacher", "float", "random"]:
        """What the student starts from, with ``auto`` resolved."""
        if self.student.weights is not None:
            return "weights"
        if self.student.init == "auto":
            return "teacher" if self.student_net == self.teacher_net else "float"
        return self.student.init

    @property
    def student_agent(self) -> AgentConfig:
        """The student's agent, with ``teacher`` resolved to the teacher's policy; ``search`` is kept."""
        return self.student.agent.named(self.teacher.agent)

    @property
    def searched_roles(self) -> tuple[str, ...]:
        """Roles (``teacher``, ``student``) whose agent this run searches for, in search order."""
        agents = (("teacher", self.teacher.agent), ("student", self.student.agent))
        return tuple(role for role, agent in agents if agent.policy == "search")

    @model_validator(mode="after")
    def _agents_can_be_found(self) -> RunConfig:
        if self.teacher.agent.policy == "teacher":
            raise ValueError("teacher.agent.policy: `teacher` is for the student; name a policy, or use `search`")
        taken = self.teacher.agent.policy
        if self.student.agent.policy == "teacher" and self.student.agent.flatten and taken in UNSCHEDULED:
            raise ValueError(
                f"student.agent.flatten: it mixes the epochs of a schedule, but the teacher's policy `{taken}`, which "
                f"the student uses, has none; leave `flatten` out"
            )
        if self.teacher.agent.policy == "search" and self.teacher.train is None:
            raise ValueError(
                "teacher.agent.policy: `search` needs teacher.train, by which the search trains teachers; a teacher "
                "loaded from a file does not use an agent"
            )
        return self

    @model_validator(mode="after")
    def _target_takes_the_student(self) -> RunConfig:
        target = self.export.chosen_target
        faults = [] if target is None else target.faults(self.student.quant.model_dump())
        if faults:
            raise ValueError("; ".join(f"student.quant.{key}: {text}" for key, text in faults))
        return self

    @model_validator(mode="after")
    def _methods_go_together(self) -> RunConfig:
        faults = method_faults(self.teacher, self.student) + data_free_faults(self) + federated_faults(self)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _student_can_start(self) -> RunConfig:
        if self.student.weights is not None and self.student.init != "auto":
            raise ValueError(
                f"student.weights and init `{self.student.init}` both set what the student starts from; remove one "
                f"of them"
            )
        if self.student_start == "teacher" and self.student_net != self.teacher_net:
            raise ValueError(
                f"student.init `teacher` needs the same net for both roles, but the student's is {self.student_net} "
                f"and the teacher's {self.teacher_net}; use `float` with student.float_train, or `random`"
            )
        if self.student_start == "float" and self.student.float_train is None:
            raise ValueError(
                f"student.float_train is missing: the student ({self.student_net}, init `{self.student.init}`) starts "
                f"from its own float training; configure it in student.float_train, or use init `random`"
            )
        return self
