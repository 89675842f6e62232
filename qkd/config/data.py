"""The schema of images and of the agents that augment them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from qkd.config.sections import BatchSize, Fraction, Images, Pixels, Section, UserPath, Workers

UNSCHEDULED = ("none", "crop", "crop_flip", "cutmix", "trivial", "randaugment")  # policies that are alike in all epochs


class DataConfig(Section):
    """Which images, and how they are split and batched."""

    name: str = Field(description="digits, cifar10, cifar100, fashion-mnist, mnist, svhn, npz or folder")
    path: UserPath | None = Field(
        None, description="npz: folder with train.npz and test.npz; folder: with train/<class>/ and test/<class>/"
    )
    root: UserPath = Field(Path("data"), description="where torchvision keeps (and downloads) its sets")
    download: bool = Field(True, description="fetch a torchvision set that is not in root")
    image_size: Annotated[Pixels, Field(ge=1)] | None = Field(
        None, description="side in pixels that images of a folder are resized to"
    )
    val_fraction: Fraction = Field(0.1, description="share of the training images kept for search and model selection")
    train_limit: Images | None = Field(None, description="use only this many training images (stratified, seeded)")
    batch_size: BatchSize = Field(128, description="training images a step")
    eval_batch_size: BatchSize = Field(500, description="images a forward pass when scoring")
    workers: Workers = Field(2, description="decoding processes; folders only")


class AgentConfig(Section):
    """A role's augmentation agent."""

    policy: str = Field(
        "crop_flip",
        description="none, crop_flip, crop, cutmix, trivial, randaugment, pba; file: a schedule; search: what this "
        "run's search finds for the role; teacher (student only): the teacher's",
    )
    schedule: UserPath | None = Field(None, description="schedule file (YAML) when policy is file")
    crop_padding: Pixels = Field(4, description="pixels of padding before the random crop")
    flip: bool = Field(True, description="horizontal flip with probability 1/2")
    cutout: Pixels = Field(0, description="side in pixels of a final cut-out square; 0 is off")
    cutmix: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="probability that an image gets a box of another one; absent: 0.5 for cutmix, else 0"
    )
    flatten: bool = Field(
        False, description="pba, file: every image takes the policy of a random epoch (the order is left out)"
    )
    magnitude: Annotated[int, Field(ge=0, le=30)] = Field(9, description="randaugment: level of every operation, 0..30")
    operations: Annotated[int, Field(ge=1, le=100)] = Field(2, description="randaugment: operations an image")

    @model_validator(mode="after")
    def _file_needs_path(self) -> AgentConfig:
        if (self.policy == "file") != (self.schedule is not None):
            raise ValueError("`schedule` names a file exactly when `policy` is `file`")
        return self

    @model_validator(mode="after")
    def _flatten_has_epochs_to_mix(self) -> AgentConfig:
        if self.flatten and self.policy in UNSCHEDULED:
            raise ValueError(
                f"`flatten` mixes the epochs of a schedule (policy pba, file or search), but policy `{self.policy}` "
                f"has none; leave `flatten` out"
            )
        return self

    @property
    def cutmix_probability(self) -> float:
        """Return the probability of CutMix that applies."""
        if self.cutmix is not None:
            return self.cutmix
        return 0.5 if self.policy == "cutmix" else 0.0  # 0.5: as published for CIFAR
