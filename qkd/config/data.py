"""The schema of images and of the agents that augment them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from qkd.config.sections import MOST_PIXELS, NEWER, BatchSize, Fraction, Images, Pixels, Section, UserPath, Workers
from qkd.image_size import ImageSize, image_size_of

UNSCHEDULED = ("none", "crop", "crop_flip", "cutmix", "trivial", "randaugment")  # the same policy in every epoch


def _size(value: Any) -> ImageSize | None:
    """Return an image size in the form the rest of the code uses: one number if it is square."""
    if value is None:
        return None
    sides = [value, value] if isinstance(value, int) else value
    is_two = isinstance(sides, list | tuple) and len(sides) == 2
    if not is_two or not all(type(side) is int and 1 <= side <= MOST_PIXELS for side in sides):
        raise ValueError(f"must be a side in pixels, or [height, width], each 1 to {MOST_PIXELS}, got {value!r}")
    return image_size_of(*sides)


def _plain_size(size: Any, info: SerializationInfo) -> Any:
    """Return an image size as plain data; pydantic's own serializer warns of the list that it makes for JSON."""
    return list(size) if info.mode == "json" and isinstance(size, tuple) else size


_SIDE = {"type": "integer", "minimum": 1, "maximum": MOST_PIXELS}
Size = Annotated[
    ImageSize,
    PlainValidator(_size),
    PlainSerializer(_plain_size, return_type=Any),
    WithJsonSchema({"anyOf": [_SIDE, {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}]}),
]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
DomainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]


class DomainConfig(Section):
    """Changes to all images of a domain: rotation, then inversion, then coloring; none by default."""

    rotate: Annotated[float, Field(ge=-180, le=180, allow_inf_nan=False)] = Field(
        0.0, description="degrees, counterclockwise; corners become black"
    )
    invert: bool = Field(False, description="replace each pixel by 255 minus its value")
    color: tuple[Share, Share, Share] | None = Field(
        None, description="factors 0..1 for red, green and blue; gray images become color"
    )


class DataConfig(Section):
    """Which images, and how they are split and batched."""

    name: str = Field(description="digits, cifar10, cifar100, fashion-mnist, mnist, svhn, npz or folder")
    path: UserPath | None = Field(
        None,
        description="npz: folder with train.npz and test.npz; folder: one with train/<class>/ and "
        "test/<class>/ (or val/), or only class folders; relative to the current folder",
    )
    root: UserPath = Field(Path("data"), description="where torchvision stores (and downloads) its data sets")
    download: bool = Field(True, description="download a torchvision data set that is not in root")
    image_size: Size | None = Field(
        None,
        description="size in pixels that images are resized to (digits are only enlarged): one side,"
        " or [height, width]; default: keep their size",
    )
    resize: Annotated[Literal["crop", "stretch", "pad"], NEWER] = Field(
        "crop",
        description="crop: cover the size, then crop the center; stretch: resize both sides, changing the "
        "aspect ratio; pad: fit inside, with black borders",
    )
    resize_size: Annotated[Annotated[Pixels, Field(ge=1)] | None, NEWER] = Field(
        None, description="crop: shorter side in pixels before the center crop; default: just large enough"
    )
    interpolation: Annotated[Literal["bilinear", "bicubic"], NEWER] = Field(
        "bilinear", description="interpolation when resizing (digits: always bilinear)"
    )
    train_crop: Annotated[Literal["fixed", "random"], NEWER] = Field(
        "fixed",
        description="folder: fixed: resize training images by `resize`; random: a new random crop of each "
        "image in every epoch, stretched to the size",
    )
    crop_area: Annotated[tuple[Share, Share], NEWER] = Field(
        (0.08, 1.0), description="train_crop random: smallest and largest share of the image's area, 0..1"
    )
    crop_ratio: Annotated[tuple[Ratio, Ratio], NEWER] = Field(
        (3 / 4, 4 / 3), description="train_crop random: smallest and largest ratio of width to height"
    )
    train_decode: Annotated[Literal["full", "reduced"], NEWER] = Field(
        "full",
        description="folder: reduced: decode training JPEGs at a half, a quarter or an eighth of their sides "
        "if that is still as large as the size they are resized to; faster for large photographs,"
        " but changes pixels",
    )
    channels: Annotated[Literal[1, 3] | None, NEWER] = Field(
        None, description="1 gray, 3 color; default: gray if all images are"
    )
    mean: Annotated[tuple[Share, ...] | None, NEWER] = Field(
        None,
        min_length=1,
        description="mean per channel, 0..1, to match given weights; default: that of the training images",
    )
    std: Annotated[tuple[Share, ...] | None, NEWER] = Field(
        None, min_length=1, description="standard deviation per channel, 0..1; given together with `mean`"
    )
    preprocess: Annotated[str | None, NEWER] = Field(
        None,
        pattern=r"^torchvision(/[A-Za-z0-9_]+)?$",
        description="torchvision: use the mean, std, size and resize rule of torchvision's ImageNet weights "
        "for the teacher's net (torchvision/<net>: for that net); a set that is not a folder keeps its size "
        "unless image_size is given",
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1), NEWER] = Field(
        0.2, description="folder without test/ and val/: share of each class that becomes the test set"
    )
    split_seed: Annotated[int, Field(ge=0, lt=2**31), NEWER] = Field(
        0, description="folder without test/ and val/: seed that draws the test images, independent of the run's seed"
    )
    domains: Annotated[dict[DomainName, DomainConfig] | None, NEWER] = Field(
        None, description="domain name -> changes to its images; every training image belongs to one domain"
    )
    unseen_domain: Annotated[DomainName | None, NEWER] = Field(
        None,
        description="name of the domain of all test images; training leaves out its images "
        "(student.adaptation reads them, without labels)",
    )
    val_fraction: Fraction = Field(0.1, description="share of training images held out for search and model selection")
    train_limit: Images | None = Field(None, description="use only this many training images (stratified, seeded)")
    batch_size: BatchSize = Field(128, description="training images per step")
    eval_batch_size: BatchSize = Field(500, description="images per forward pass when scoring")
    batch_statistics: Annotated[BatchSize | None, NEWER] = Field(
        None,
        description="to match role-kd's released code (128): score nets with batch norm on each batch's own "
        "statistics, with this many images per batch, and drop the last incomplete batch; "
        "default: running statistics, as in the exported file",
    )
    workers: Workers = Field(2, description="processes that decode or resize images; none if they are in memory")

    @model_validator(mode="after")
    def _one_domain_is_unseen(self) -> DataConfig:
        if self.domains is None and self.unseen_domain is None:
            return self
        if self.domains is None or len(self.domains) < 2:
            raise ValueError("`domains` must name at least two: training uses the images of all but `unseen_domain`")
        if self.unseen_domain not in self.domains:
            found = "nothing" if self.unseen_domain is None else f"`{self.unseen_domain}`"
            raise ValueError(f"`unseen_domain` must name one of {', '.join(self.domains)}, got {found}")
        return self

    @field_validator("channels", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):  # True == 1, so it would mean gray
            raise ValueError(f"must be 1 (gray), 3 (color) or null, got {str(value).lower()}")
        return value

    @model_validator(mode="after")
    def _mean_and_std_come_together(self) -> DataConfig:
        if (self.mean is None) != (self.std is None) or (self.mean and self.std and len(self.mean) != len(self.std)):
            raise ValueError("`mean` and `std` must be given together, with one value per channel each")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"`std` must be positive, got {list(self.std)}")
        if self.mean is not None and self.preprocess is not None:
            raise ValueError("`preprocess` also sets mean and std; remove either it or `mean` and `std`")
        if self.resize_size is not None and self.resize != "crop":
            raise ValueError(f"`resize_size` is for resize: crop, which trims the longer side, got `{self.resize}`")
        return self

    @model_validator(mode="after")
    def _pieces_are_of_files(self) -> DataConfig:
        asked = [f"`{key}: {value}`" for key, value, default in (
            ("train_crop", self.train_crop, "fixed"), ("train_decode", self.train_decode, "full"),
        ) if value != default]  # fmt: skip
        if asked and (self.name != "folder" or self.domains is not None):
            raise ValueError(
                f"{' and '.join(asked)}: only for a folder of images, without `domains`; images in memory are cropped "
                "by the agents (`crop_padding`)"
            )
        for key, (least, most) in (("crop_area", self.crop_area), ("crop_ratio", self.crop_ratio)):
            if least > most or most == 0:
                raise ValueError(f"`{key}` must be [smallest, largest], with a positive largest, got {[least, most]}")
        return self


class AgentConfig(Section):
    """A role's augmentation agent."""

    policy: str = Field(
        "crop_flip",
        description="none, crop_flip, crop, cutmix, trivial, randaugment, pba; file: a schedule file; search:"
        " the schedule that this run's search finds for the role; teacher (student only): same as "
        "the teacher's",
    )
    schedule: UserPath | None = Field(None, description="schedule file (YAML), for policy file")
    crop_padding: Pixels = Field(4, description="pixels of padding before the random crop")
    crop_offsets: Annotated[Literal["all", "released"], NEWER] = Field(
        "all",
        description="released: match role-kd's released code, which never draws the last of the 2 * "
        "crop_padding + 1 offsets",
    )
    flip: bool = Field(True, description="horizontal flip with probability 1/2")
    cutout: Pixels = Field(0, description="side in pixels of a square that is cut out at the end; 0: off")
    cutmix: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="probability that a box of another image is pasted in; default: 0.5 for policy cutmix, else 0"
    )
    flatten: bool = Field(
        False,
        description="pba, file: every image uses the policy of a random epoch (ignores the order of the schedule)",
    )
    magnitude: Annotated[int, Field(ge=0, le=30)] = Field(9, description="randaugment: level of every operation, 0..30")
    operations: Annotated[int, Field(ge=1, le=100)] = Field(2, description="randaugment: operations per image")

    @model_validator(mode="after")
    def _file_needs_path(self) -> AgentConfig:
        if (self.policy == "file") != (self.schedule is not None):
            raise ValueError("`schedule` (a file) is required if `policy` is `file`, and not allowed otherwise")
        return self

    @model_validator(mode="after")
    def _flatten_has_epochs_to_mix(self) -> AgentConfig:
        if self.flatten and self.policy in UNSCHEDULED:
            raise ValueError(
                f"`flatten` mixes the epochs of a schedule (policy pba, file or search), but policy `{self.policy}` "
                f"has none; leave `flatten` out"
            )
        return self

    def named(self, teachers: AgentConfig) -> AgentConfig:
        """Return this agent with policy ``teacher`` replaced by the policy of the teacher's agent.

        What a policy does not include stays this agent's: crop, flip, cut-out, and a CutMix that is given by itself.

        Args:
            teachers: The teacher's agent.
        """
        if self.policy != "teacher":
            return self
        fields = ("policy", "schedule", "magnitude", "operations")
        return self.model_copy(update={name: getattr(teachers, name) for name in fields})

    @property
    def cutmix_probability(self) -> float:
        """Return the probability of CutMix that applies."""
        if self.cutmix is not None:
            return self.cutmix
        return 0.5 if self.policy == "cutmix" else 0.0  # 0.5: as published for CIFAR
