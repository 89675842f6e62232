"""The schema of data-free distillation: which method makes images from the teacher, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from qkd.config.sections import (
    NEWER,
    BatchSize,
    Epochs,
    Fraction,
    Images,
    NonNegative,
    Optimizer,
    Positive,
    Schedule,
    Section,
    without_defaults,
)
from qkd.config.training import TrainConfig

Latent = Annotated[int, Field(ge=1, le=100_000)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]

NOISE, PROCEDURAL, GENERATOR, POOL = "noise", "procedural", "generator", "pool"
ADVERSARIAL, JOINT, GROWING = "adversarial", "joint", "growing"  # made while the student learns
FAMILIES: Mapping[str, str] = {  # method -> how it makes images
    "noise": NOISE,
    "procedural": PROCEDURAL,
    "rdskd": GENERATOR,
    "dafl": GENERATOR,
    "mskd": GENERATOR,
    "gdfq": GENERATOR,
    "generative": GENERATOR,
    "deep_inversion": POOL,
    "zskd": POOL,
    "cmi": POOL,
    "zskt": ADVERSARIAL,
    "dfad": ADVERSARIAL,
    "dfq": ADVERSARIAL,
    "dafl_joint": JOINT,
    "adaptive_inversion": GROWING,
    "cmi_adversarial": GROWING,
    "fast_dfkd": GROWING,
}
WARMED_UP: Mapping[str, int] = {"dfq": 300, "dafl_joint": 0}  # losses with terms of the teacher alone -> default steps
_READ_BY: Mapping[str, tuple[str, ...]] = {  # key -> families that read it
    "train": (GENERATOR,),
    "steps_per_epoch": (GENERATOR,),
    "groups": (GENERATOR,),
    "latent": (GENERATOR, POOL, ADVERSARIAL, JOINT, GROWING),
    "width": (GENERATOR, POOL, ADVERSARIAL, JOINT, GROWING),
    "batch_size": (GENERATOR, POOL, GROWING),
    "lr": (POOL, ADVERSARIAL, JOINT, GROWING),
    "pool_images": (POOL, GROWING),
    "pool_steps": (POOL, GROWING),
    "warmup_steps": (ADVERSARIAL, JOINT),
    "student_steps": (ADVERSARIAL,),
    "student_for_generator": (ADVERSARIAL, GROWING),
    "weights": (GENERATOR, POOL, ADVERSARIAL, JOINT, GROWING),
    "beta": (POOL,),
    "compat": (POOL,),
}
# Of a family that reads a key, the methods that do: the others invert images themselves, not a generator's latents.
_GENERATING = ("cmi", "cmi_adversarial", "fast_dfkd")
_OF_METHODS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    POOL: {"latent": _GENERATING, "width": _GENERATING, "beta": ("zskd",), "compat": ("zskd",)},
    GROWING: {"latent": _GENERATING, "width": _GENERATING},
}
ARRANGING = ("procedural_share", "float_procedural_share", "procedural_kinds", "boxed")
STUDENTS_OWN = ("images_per_epoch", *ARRANGING)  # what a generator does not depend on


class GeneratorTrainConfig(TrainConfig):
    """Optimizer, learning-rate schedule and length of the training of a generator."""

    epochs: Epochs = Field(20, description="epochs of `steps_per_epoch` steps")
    optimizer: Optimizer = Field("adamw", description="optimizer; sgd has Nesterov momentum")
    lr: Positive = Field(1e-3, description="peak learning rate")
    weight_decay: NonNegative = Field(0.0, description="weight decay of weights with at least two dimensions")
    schedule: Schedule = Field("constant", description="learning-rate schedule after the warm-up")


class DataFreeConfig(Section):
    """Distillation without real images: the student learns from images that are made from the teacher."""

    method: Literal[
        "noise", "procedural", "rdskd", "dafl", "mskd", "gdfq", "generative", "deep_inversion", "zskd", "cmi", "zskt",
        "dfad", "dfq", "dafl_joint", "adaptive_inversion", "cmi_adversarial", "fast_dfkd",
    ] = Field(
        description="noise; procedural images; rdskd, dafl, mskd, gdfq, generative: a generator trained once; "
            "deep_inversion, zskd, cmi: a pool of inverted images; zskt, dfad, dfq: a generator that learns against "
            "the student; dafl_joint: one that learns with it; adaptive_inversion, cmi_adversarial, fast_dfkd: a pool "
            "that grows with the student"
    )  # fmt: skip
    images_per_epoch: Images = Field(12_800, description="images made per epoch of the student")
    procedural_share: Annotated[Fraction, NEWER] = Field(
        0.0,
        description="share of procedural images in a batch; the rest come from `method`, and the teacher "
        "labels all of them",
    )
    float_procedural_share: Annotated[Fraction | None, NEWER] = Field(
        None, description="`procedural_share` in the student's own float training; default: the same"
    )
    procedural_kinds: Annotated[tuple[Literal["fields", "windows", "shapes", "strokes"], ...], NEWER] = Field(
        ("fields", "windows"),
        min_length=1,
        description="what procedural images show: smooth random fields; fields through soft windows, on "
        "black; flat shapes that overlap; curves on black, for line drawings (strokes)",
    )
    boxed: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), NEWER] = Field(
        0.0,
        description="probability that a made image is scaled, tilted and moved, on black, so that objects have borders",
    )
    train: GeneratorTrainConfig = Field(
        default_factory=GeneratorTrainConfig, description="generator trained once: optimizer and length"
    )
    steps_per_epoch: Count = Field(120, description="generator trained once: steps per epoch")
    batch_size: BatchSize = Field(256, description="images per step of a generator trained once, or of an inversion")
    latent: Latent = Field(100, description="size of a generator's latents")
    width: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] = Field(128, description="channels of a generator")
    groups: Count = Field(1, description="generative: number of generators, one per group of classes")
    lr: Positive = Field(
        1e-3, description="learning rate (Adam) of inverted images, or of a generator that learns with the student"
    )
    pool_images: Images = Field(
        2048, description="number of inverted images; a growing pool reaches it at the end, one batch at a time"
    )
    pool_steps: Count = Field(400, description="steps per inversion")
    student_steps: Count = Field(5, description="generator against the student: student steps per generator step")
    warmup_steps: Annotated[Annotated[int, Field(ge=0, le=1_000_000)] | None, NEWER] = Field(
        None,
        description="dfq, dafl_joint: generator steps before the student is calibrated and begins to learn; they read "
        "the teacher alone; default: dfq 300, dafl_joint 0",
    )
    student_for_generator: Literal["ste", "fp_shadow"] = Field(
        "ste",
        description="student that images or a generator are optimized against: ste: the low-bit one, with "
        "straight-through gradients; fp_shadow: its float weights, quantizers off",
    )
    weights: dict[str, NonNegative] = Field(
        default_factory=dict, description="weights of the method's loss, by the keyword names of its function"
    )
    beta: tuple[Positive, ...] = Field(
        (1.0, 0.1), min_length=1, description="zskd: scales of the concentrations; batches alternate between them"
    )
    compat: Literal["paper", "released"] = Field(
        "paper", description="zskd: released: beta has no effect, as in the released code"
    )

    @property
    def family(self) -> str:
        """Return how the method makes images."""
        return FAMILIES[self.method]

    @property
    def made_once(self) -> bool:
        """Return whether images come from something that is made once, before any student, and that all of them use."""
        return self.family in (GENERATOR, POOL)

    def of_float_student(self) -> DataFreeConfig:
        """Return the settings for the student's own float training."""
        share = self.procedural_share if self.float_procedural_share is None else self.float_procedural_share
        changes: dict[str, Any] = {"procedural_share": share, "float_procedural_share": None}
        if not share and self.family != PROCEDURAL:
            changes["procedural_kinds"] = type(self).model_fields["procedural_kinds"].default
        return self.model_copy(update=changes)

    @property
    def without_training(self) -> bool:
        """Return whether making images needs no training, neither before nor along with the student's."""
        return self.family in (NOISE, PROCEDURAL)

    @property
    def learns_along(self) -> bool:
        """Return whether a generator learns while the student does."""
        return self.family in (ADVERSARIAL, JOINT)

    @property
    def warmed_up(self) -> int:
        """Return the number of steps of the generator's warm-up."""
        return WARMED_UP.get(self.method, 0) if self.warmup_steps is None else self.warmup_steps

    @property
    def idle(self) -> list[str]:
        """Keys that are set, and that the method's family reads, but not the method."""
        fields, of_methods = type(self).model_fields, _OF_METHODS.get(self.family, {})
        return [
            key
            for key, methods in of_methods.items()
            if self.method not in methods and getattr(self, key) != fields[key].get_default()
        ]

    def origin(self) -> dict[str, Any]:
        """Return the settings that determine a generator or a pool, as plain data."""
        return self.model_dump(mode="json", exclude=set(STUDENTS_OWN))

    def tried(self, batch_size: int) -> DataFreeConfig:
        """Return the section for a few steps; keys that the method does not read are kept, so it can be bound again.

        Args:
            batch_size: Images per batch of the student.
        """
        pool = 8 if self.family == GROWING else 4  # the student competes from the second batch on
        few = {"images_per_epoch": 2 * batch_size, "steps_per_epoch": 2, "pool_images": pool, "pool_steps": 2}
        short = self.train.model_copy(update={"epochs": 1, "warmup_epochs": 0.0})
        changes = {**few, "batch_size": min(self.batch_size, 4), "train": short}
        if self.method in WARMED_UP:
            changes["warmup_steps"] = min(self.warmed_up, 2)
        return self.model_copy(
            update={key: value for key, value in changes.items() if self.family in _READ_BY.get(key, (self.family,))}
        )

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out newer keys that are not used: configs and hashes of older runs do not change."""
        return without_defaults(self, serialize(self), *ARRANGING, "warmup_steps")

    @model_validator(mode="after")
    def _procedural_images_are_used(self) -> DataFreeConfig:
        if len(set(self.procedural_kinds)) < len(self.procedural_kinds):
            raise ValueError(f"`procedural_kinds` has duplicates: {', '.join(self.procedural_kinds)}")
        shares = [key for key in ("procedural_share", "float_procedural_share") if getattr(self, key)]
        if self.family == PROCEDURAL and shares:
            raise ValueError(f"with method `procedural`, all images are procedural; leave `{shares[0]}` out")
        unused = self.family != PROCEDURAL and not shares
        if unused and self.procedural_kinds != type(self).model_fields["procedural_kinds"].default:
            raise ValueError("`procedural_kinds` is for method `procedural`, or for a `procedural_share` above 0")
        return self

    @model_validator(mode="after")
    def _keys_are_read(self) -> DataFreeConfig:
        fields = type(self).model_fields
        unread = [
            key
            for key, families in _READ_BY.items()
            if self.family not in families and getattr(self, key) != fields[key].get_default(call_default_factory=True)
        ]
        if unread:
            raise ValueError(f"method `{self.method}` ({self.family}) does not read {', '.join(map(repr, unread))}")
        if self.warmup_steps is not None and self.method not in WARMED_UP:
            raise ValueError(
                f"`warmup_steps` is for methods {' and '.join(WARMED_UP)}; the whole loss of `{self.method}` reads the "
                f"student"
            )
        if self.groups > 1 and self.method != "generative":
            raise ValueError(f"`groups` is for method `generative`, got {self.groups} with `{self.method}`")
        if self.batch_size % 2 and self.method in ("rdskd", "mskd"):
            raise ValueError(
                f"`batch_size` must be even with method `{self.method}`, which compares two halves, "
                f"got {self.batch_size}"
            )
        return self
