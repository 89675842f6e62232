"""The schema of a training: optimizer, bits, loss terms, phases."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qkd.config.sections import (
    MOST_EPOCHS,
    NEWER,
    Bits,
    Epochs,
    Fraction,
    Images,
    NonNegative,
    Optimizer,
    Positive,
    Schedule,
    Section,
)

FROZEN_SHARE = 10  # without phases, one epoch in ten (at least one) trains the deployed arithmetic at the end
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
SAVING = frozenset({"checkpoint_every_s", "keep_checkpoint"})  # keys for how training is saved, not for what it learns


class TrainConfig(Section):
    """Optimizer, learning-rate schedule and length of one training."""

    epochs: Epochs = Field(30, description="passes over the training images")
    optimizer: Optimizer = Field("sgd", description="optimizer; sgd has Nesterov momentum")
    lr: Positive = Field(0.1, description="peak learning rate")
    momentum: Fraction = Field(0.9, description="Nesterov momentum, for sgd only")
    weight_decay: NonNegative = Field(
        5e-4, description="weight decay of weights with at least two dimensions, not of biases, norms or scales"
    )
    scale_lr_factor: Positive = Field(1.0, description="learning rate of quantizer scales, as a factor of lr")
    schedule: Schedule = Field("cosine", description="learning-rate schedule after the warm-up")
    milestones: tuple[Fraction, ...] = Field(
        (0.3, 0.6, 0.8), description="schedule step: fractions of training at which the rate drops"
    )
    gamma: Positive = Field(0.1, description="schedule step: factor at each milestone")
    warmup_epochs: NonNegative = Field(0.0, description="epochs of linear warm-up of the learning rate")
    clip_grad_norm: Positive | None = Field(
        None,
        description="gradient norm to clip at, over the net and everything trained in the same step; default:"
        " no clipping",
    )
    label_smoothing: Fraction = Field(0.0, description="share of the label that is spread over all classes")
    ema_decay: Fraction = Field(
        0.0, description="keep an exponential moving average of the weights, with this decay per step; 0: off"
    )
    keep: Annotated[Literal["last", "best"], NEWER] = Field(
        "last",
        description="best: keep the weights of the epoch with the highest validation accuracy; last: those of"
        " the last epoch",
    )
    precision: Annotated[Literal["auto", "float32", "bf16", "fp16"], NEWER] = Field(
        "auto",
        description="bf16 and fp16: mixed precision, if the device supports it; auto: bf16 if the processor "
        "multiplies it natively and a short race at the start shows that it is faster, else "
        "float32",
    )
    memory_format: Annotated[Literal["auto", "contiguous", "channels_last"], NEWER] = Field(
        "auto", description="memory format of images and convolutions; auto: the faster one in a race at the start"
    )
    checkpoint_every_s: NonNegative = Field(
        60.0, description="minimum seconds between checkpoints; there is always one at the end of an epoch"
    )
    keep_checkpoint: bool = Field(
        False,
        description="keep the last checkpoint (optimizer, partners) after training; it can restore altered "
        "weights without retraining",
    )

    @model_validator(mode="after")
    def _warmup_is_shorter(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"`warmup_epochs` must be less than `epochs`, got {self.warmup_epochs} of {self.epochs}")
        return self


class StudentTrainConfig(TrainConfig):
    """Optimizer, learning-rate schedule and length of the low-bit training."""

    lr: Positive = Field(0.02, description="peak learning rate")


class LowBitConfig(Section):
    """Options for training weights of at most 4 bits, in addition to those for all weights."""

    transition_rate: Share | None = Field(
        None,
        description="target share of weights whose code changes in a step, at the peak of the schedule; sets "
        "their learning rate (TRS); default: they use the schedule's learning rate",
    )
    decay_by_bits: bool = Field(
        False,
        description="a quarter of the weight decay for 2-bit weights, half for 3-bit weights (LSQ); scales have none",
    )
    dampening: NonNegative = Field(
        0.0,
        description="weight of the squared distance between weights and their quantized values; rises from 0 "
        "over the training",
    )
    oscillation_thresholds: tuple[Share, Share] | None = Field(
        None,
        description="[first, last]: a weight that oscillates more often than the threshold is frozen at its "
        "code; the threshold moves from first to last over the training; default: none is frozen."
        " Published: [0.04, 0.01]",
    )
    oscillation_momentum: Share = Field(0.01, description="momentum of the running frequency of oscillation")
    step_size_bound: Annotated[Share | None, NEWER] = Field(
        None,
        description="largest relative change of a learned step size (a scale) in one optimizer step, so that "
        "none jumps to a multiple or crosses zero at a high learning rate; default: no limit",
    )
    reestimate_batches: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0,
        description="training batches for re-estimating batch-norm statistics before batch norm is frozen, or"
        " at the end if it is not; 0: keep the running ones",
    )

    @model_validator(mode="after")
    def _one_oscillation_is_none(self) -> LowBitConfig:
        last = None if self.oscillation_thresholds is None else min(self.oscillation_thresholds)
        if last is not None and last < self.oscillation_momentum:
            raise ValueError(
                f"`oscillation_thresholds` must be at least `oscillation_momentum` ({self.oscillation_momentum}), got "
                f"{last}: a single change of direction would freeze a weight"
            )
        return self

    def tried(self, batch_size: int) -> LowBitConfig:  # noqa: ARG002
        """Return the section for a dry run: a few batches show what goes wrong."""
        return self.model_copy(update={"reestimate_batches": min(self.reestimate_batches, 2)})

    @property
    def places_weights(self) -> bool:
        """Whether it moves latent weights onto their codes, or toward them."""
        return bool(self.dampening) or self.oscillation_thresholds is not None


class QuantConfig(Section):
    """Bits and quantizers of the student (the keys of `quantizers.QuantSpec`)."""

    preset: Literal["fast"] | None = Field(
        None,
        exclude=True,
        description="bit widths by name, instead of the keys for widths; fast: 2-bit weights and activations,"
        " which the low-bit execution provider is fastest at, and 8 bits where fewer bits gain "
        "nothing",
    )
    weight_bits: Bits = Field(description="bits of weights")
    act_bits: Bits = Field(description="bits of activations that enter a convolution or linear layer")
    first_bits: Bits | None = Field(
        8, description="bits of the first layer, for its weights and the image; null: same as the other layers"
    )
    last_bits: Bits | None = Field(
        8, description="bits of the last layer, for its weights and its input; null: same as the other layers"
    )
    sum_bits: Bits = Field(
        8, description="bits of the inputs and outputs of residual sums, and of what pooling averages"
    )
    weight_quantizer: Literal["lsq", "stats", "dorefa"] = Field(
        "lsq",
        description="quantizer of weights: learned step sizes, step sizes from their statistics, or DoReFa",
    )
    act_quantizer: Literal["lsq", "pact", "dorefa"] = Field("lsq", description="quantizer of activations")
    per_channel: bool = Field(True, description="one weight scale per output channel; false: one per tensor")
    symmetric: Annotated[bool, NEWER] = Field(
        False,
        description="no zero points: the image and functions use signed grids, which some targets need (`qkd "
        "ls targets`)",
    )
    overrides: dict[str, dict[Literal["weight_bits", "act_bits"], Bits]] = Field(
        default_factory=dict, description="layer name pattern -> {weight_bits, act_bits}"
    )


class TermConfig(Section):
    """One weighted term of the student's loss.

    Example:
        >>> term = TermConfig(loss="soft_target", weight=0.9, options={"temperature": 4})
        >>> term.loss, term.weight, term.decay
        ('soft_target', 0.9, 1.0)
    """

    loss: str = Field(description="a name from `qkd ls losses`")
    weight: NonNegative = Field(1.0, description="weight in the sum")
    taps: tuple[tuple[str, str], ...] = Field(
        (), description="for feature losses: pairs [student module, teacher module]"
    )
    tap: Literal["quantized", "pre_quant"] = Field(
        "quantized",
        description="what taps read in a low-bit student: what its next layers see, or the values before the "
        "quantizer, whose gradient is smoother",
    )
    decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="factor on the weight after each epoch of its phase; for student.terms, epochs count from"
        " the first phase that uses them",
    )
    options: dict[str, float | int | str | bool] = Field(
        default_factory=dict, description="keyword arguments of the loss, e.g. temperature"
    )


DEFAULT_TERMS = (
    TermConfig(loss="cross_entropy", weight=0.5),
    TermConfig(loss="soft_target", weight=0.5, options={"temperature": 4.0}),
)


class MetaConfig(Section):
    """MetaDistil: the teacher learns to teach, from how well a student that learns from it does on a quiz."""

    quiz_images: Images = Field(
        description="size of the quiz: training images (stratified, seeded) that the student is not distilled"
        " on; the teacher's own training has seen them, and so has a student that starts from the"
        " teacher"
    )
    inner_lr: NonNegative | None = Field(
        None,
        description="peak learning rate of the student's trial step, on the student's schedule; default: "
        "student.train.lr",
    )
    teacher_lr: NonNegative = Field(0.05, description="peak learning rate of the teacher; decays like the student's")
    teacher_start_epoch: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] = Field(
        0,
        description="first epoch of student.train, counted from 0, in which the teacher is taught; earlier "
        "steps are ordinary distillation",
    )
    teacher_momentum: Fraction = Field(0.9, description="momentum of the teacher's SGD")
    teacher_weight_decay: NonNegative = Field(
        5e-4, description="weight decay of the teacher's SGD, for all its weights"
    )
    order: Literal["second", "first"] = Field(
        "second",
        description="second: differentiate the student's gradient; first: finite differences of first gradients",
    )


class PhaseConfig(Section):
    """A phase of the student's training, with its own loss terms."""

    name: str = Field("tutoring", description="shown in logs, e.g. self_study, co_study, tutoring")
    epochs: Epochs = Field(description="epochs of this phase; those of all phases must add up to student.train.epochs")
    terms: tuple[TermConfig, ...] | None = Field(None, description="loss terms; default: student.terms")
    teacher_terms: tuple[TermConfig, ...] | None = Field(
        None,
        description="co-study: train the teacher as well, with these terms, in which the two swap roles: the "
        "teacher learns from the student",
    )
    teacher_lr_factor: Positive = Field(1.0, description="co-study: the teacher's learning rate, as a factor of lr")
    peers: bool = Field(
        True,
        description="whether student.peers learn in this phase, if there are any; student.terms then do not "
        "apply, and `terms` are added",
    )
    trains: Literal["student", "modules"] = Field(
        "student",
        description="modules: train only the modules of loss terms (attention, adapters), not the student",
    )
    combine: Literal["sum", "clipped"] = Field(
        "sum",
        description="clipped: in each weight tensor, clip the gradient of the terms that use the teacher to "
        "the length of the other terms' gradient, times a factor that rises from 0.5 to 1 over "
        "the epochs",
    )
    meta: MetaConfig | None = Field(None, description="MetaDistil: the teacher is taught by a quiz")
    freeze_batch_norm: bool = Field(
        False, description="train the deployed arithmetic: folded batch norm with running statistics, int32 biases"
    )
    lr_factor: Positive | None = Field(
        None,
        description="factor on the learning rate; default: 1, or 0.1 with freeze_batch_norm, which fails at high rates",
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
                raise ValueError(
                    f"`trains: modules` cannot be combined with {', '.join(wrong)}: the student "
                    "does not learn in this phase"
                )
        if self.teacher_terms is not None and self.combine != "sum":
            raise ValueError("`combine: clipped` cannot be combined with `teacher_terms`: it needs a fixed teacher")
        if self.teacher_terms is None and self.teacher_lr_factor != 1:
            raise ValueError("`teacher_lr_factor` is for co-study: the phase has no `teacher_terms`")
        return self

    @property
    def rate_factor(self) -> float:
        """Return the factor on the learning rate that applies in this phase."""
        if self.lr_factor is not None:
            return self.lr_factor
        return 0.1 if self.freeze_batch_norm else 1.0


def default_phases(train: TrainConfig) -> tuple[PhaseConfig, ...]:
    """Return the default phases of low-bit training: tutoring, with batch norm frozen in the last tenth."""
    frozen = max(1, train.epochs // FROZEN_SHARE)
    # Frozen batch norm diverges at high rates (seen at half a cosine from 0.03); the end of a cosine is already low.
    factor = 1.0 if train.schedule == "cosine" and train.epochs >= FROZEN_SHARE else None
    settling = PhaseConfig(name="settling", epochs=frozen, freeze_batch_norm=True, lr_factor=factor)
    return (PhaseConfig(epochs=train.epochs - frozen), settling) if train.epochs > frozen else (settling,)
