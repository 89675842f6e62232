"""The training of a generator: once, against the teacher alone, for students of all widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.config import AgentConfig, RunConfig, TrainConfig
from qkd.config.data_free import DataFreeConfig
from qkd.data import Splits
from qkd.files import read_safetensors, sha256_of, write_json, write_safetensors
from qkd.image_size import side_of_square
from qkd.methods.data_free.making.blind import sightless
from qkd.methods.data_free.making.kinds import KINDS, weights_of
from qkd.methods.data_free.making.objectives import OBJECTIVES, Moment, facts_of
from qkd.methods.data_free.making.samples import SHOWN, is_sampled, sample_files, to_pixels, write_sample
from qkd.methods.data_free.making.sources import LatentSource, draw_latents
from qkd.methods.data_free.making.watching import Watched
from qkd.nets.generator import Generator, GeneratorGroup
from qkd.roles.guide import guide_of, load_guide
from qkd.run.folder import RunFolder
from qkd.run.identity import leaves
from qkd.seeding import global_stream, stream
from qkd.training import Batch, FitResult, Phase, StepResult
from qkd.training.assembly import WEIGHTS, Context, Made
from qkd.training.state import fill
from quantizers.modes import evaluating

NAME = "generator"  # of the stage, its folder and its manifest
JUDGED = 512  # images for its histogram


class TrainedGenerator(nn.Module):
    """A generator and the state that its training keeps besides its weights.

    Args:
        generator: The net that is kept in the end.
    """

    references: Tensor

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.register_buffer("references", torch.zeros(2))  # RDSKD's two losses near the start of the epoch

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Return images."""
        images: Tensor = self.generator(latents, labels)
        return images


def build_generator(settings: DataFreeConfig, splits: Splits, seed: int, *names: str | int) -> nn.Module:
    """Return a generator with random weights from the run's seed, on the CPU.

    Args:
        settings: The generator's kind and sizes.
        splits: The images to imitate: their shape and classes.
        seed: Seed of the run.
        *names: Names of the random stream.
    """
    sizes = {
        "classes": len(splits.classes),
        "channels": splits.channels,
        "image_size": side_of_square(splits.image_size, "a generator"),
    }
    shape: dict[str, Any] = {**sizes, "latent": settings.latent, "width": settings.width}
    condition = KINDS[settings.method].condition
    with global_stream(seed, "init", *names):
        made = [Generator(**shape, condition=condition) for _ in range(settings.groups)]
    return made[0] if settings.groups == 1 else GeneratorGroup(made)


def load_generator(run: RunFolder, settings: DataFreeConfig, splits: Splits) -> nn.Module:
    """Return the run's trained generator, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If it does not exist yet.
        ValueError: If its file is damaged or of a different generator.
    """
    path = run.path / NAME / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the distill stage trains the generator first")
    net = build_generator(settings, splits, run.config.seed, NAME)
    try:
        fill(net, read_safetensors(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return net.eval()


@dataclass(frozen=True)
class GeneratorStep:
    """A step of a generator against the teacher.

    Args:
        net: The net to train.
        teacher: Frozen.
        settings: The method, with its weights.
        splits: Mean and standard deviation of the images, for samples.
        seed: Seed of the run.
        folder: Folder for samples.
    """

    net: TrainedGenerator
    teacher: Watched
    settings: DataFreeConfig
    splits: Splits
    seed: int
    folder: Path

    def __call__(self, batch: Batch) -> StepResult:
        """Return the loss of a batch of latents; the labels are the requested classes."""
        if batch.step == 0 and is_sampled(batch.epoch, self.settings.train.epochs):
            self.sample(batch.epoch)
        latents = batch.images.flatten(1)
        images = self.net(latents, batch.labels)
        seen = self.teacher(images)
        moment = Moment(images, latents, batch.labels, seen, self.net.references.clone())
        found = OBJECTIVES[self.settings.method](moment, weights_of(self.settings.method, self.settings.weights))
        second = min(1, self.settings.steps_per_epoch - 1)  # the released code's place, if an epoch has a second step
        if found.references is not None and batch.step == second:
            self.net.references.copy_(found.references)
        terms: dict[str, Tensor] = {self.settings.method: found.loss}
        return StepResult(found.loss, terms, seen.logits, facts=facts_of(seen))

    def sample(self, epoch: int) -> Path:
        """Write a sample of the current generator."""
        return sample_generator(self.net, self.settings, self.splits, self.seed, self.folder, epoch)


def sample_generator(
    net: TrainedGenerator, settings: DataFreeConfig, splits: Splits, seed: int, folder: Path, epoch: int
) -> Path:
    """Write a sample of a generator for fixed latents.

    Args:
        net: The generator.
        settings: Size of its latents.
        splits: Classes, mean and standard deviation of the images.
        seed: Seed of the run.
        folder: Folder for the sample.
        epoch: Number of finished epochs.
    """
    latents, labels = draw_latents(
        SHOWN, settings.latent, len(splits.classes), stream(seed, "samples"), net.references.device
    )  # fmt: skip
    with evaluating(net), torch.no_grad():
        images = net(latents, labels)
    return write_sample(folder, epoch, to_pixels(images, splits.mean, splits.std))


class GeneratorRole:
    """The generator of a run.

    Args:
        context: The run; the student's teachers are trained already.
        settings: The config's ``student.data_free``.
    """

    def __init__(self, context: Context, settings: DataFreeConfig) -> None:
        data = context.config.data.model_copy(update={"batch_size": settings.batch_size})
        config = context.config.model_copy(update={"data": data})
        inner = replace(context, run=RunFolder(config, context.run.path), splits=sightless(context.splits))
        self.context, self.settings = inner, settings
        self.name, self.folder, self.title = NAME, NAME, NAME

    @property
    def train(self) -> TrainConfig:
        """Return optimizer and length of its training."""
        return self.settings.train

    def agent(self) -> AgentConfig:
        """Return an agent that does nothing: there are no images."""
        return AgentConfig(policy="none")

    def make(self) -> Made:
        """Build generator and teacher.

        Raises:
            FileNotFoundError: If what it learns from does not exist yet.
            ValueError: If the teacher's file is damaged.
        """
        context, settings = self.context, self.settings
        teacher = Watched(load_guide(context.run).to(context.device))
        net = TrainedGenerator(build_generator(settings, context.splits, context.config.seed, NAME))
        net.to(context.device)
        step = GeneratorStep(
            net, teacher, settings, context.splits, context.config.seed, context.run.path / self.folder
        )  # fmt: skip
        classes = len(context.splits.classes)
        return Made(
            net,
            (Phase(settings.method, settings.train.epochs, step),),
            begin=lambda: None,
            save=lambda: [self._save(net), *self._shown(step)],
            score=lambda fitted: [self._score(net, teacher, fitted)],
            others={"teacher": teacher.net},
            marks=teacher_marks(context.run),
            settings=origin_settings(context.config, settings),
            inputs=guide_of(context.run).files,
            source=lambda job: LatentSource(
                job, latent=settings.latent, classes=classes, steps=settings.steps_per_epoch
            ),
            takes_images=False,
        )

    def _save(self, net: TrainedGenerator) -> Path:
        path = self.context.run.folder(self.folder) / WEIGHTS
        write_safetensors(path, net.generator.state_dict(), metadata={"method": self.settings.method})
        return path

    def _shown(self, step: GeneratorStep) -> list[Path]:
        """Write the last sample; return those of all epochs, which are copied along with a reused generator."""
        step.sample(self.settings.train.epochs)
        return sample_files(step.folder)

    def _score(self, net: TrainedGenerator, teacher: Watched, fitted: FitResult | None) -> Path:
        """Write what the teacher sees in its images: the frequency of each class, and its confidence."""
        context, settings = self.context, self.settings
        classes = len(context.splits.classes)
        drawn = draw_latents(
            JUDGED, settings.latent, classes, stream(context.config.seed, "judged"), context.device
        )  # fmt: skip
        with evaluating(net), torch.no_grad():
            logits = logits_of(teacher, net(*drawn))
        path = context.run.path / self.folder / "result.json"
        details = {
            "method": settings.method,
            "about": KINDS[settings.method].about,
            "steps": settings.train.epochs * settings.steps_per_epoch,
            "seconds": fitted.seconds if fitted else 0.0,
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
        }
        write_json(path, {"role": NAME, **details, **judged(logits)})
        return path


def judged(logits: Tensor) -> dict[str, Any]:
    """Return what a teacher sees in made images, from its logits: a histogram of classes, and its confidence."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).double()
    shares = counts / counts.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum() / torch.tensor(float(len(counts))).log()
    return {
        "images": len(logits),
        "class_histogram": [int(one) for one in counts],
        "histogram_entropy": float(entropy),  # 1: all classes are equally frequent
        "mean_confidence": float(functional.softmax(logits, dim=1).amax(1).mean()),
    }


@torch.no_grad()
def logits_of(teacher: Watched, images: Tensor) -> Tensor:
    """Return the teacher's logits of images on its device, 256 at a time."""
    return torch.cat([teacher.net(part) for part in torch.split(images, 256)])


def teacher_marks(run: RunFolder) -> dict[str, str]:
    """Return the hashes of the files that the student's images are made from."""
    return {path.relative_to(run.path).as_posix(): sha256_of(path) for path in guide_of(run).files}


def origin_settings(config: RunConfig, settings: DataFreeConfig) -> Mapping[str, Any]:
    """Return the settings that the made images depend on: dotted key -> plain value."""
    return {"seed": config.seed, **dict(leaves(settings.origin(), "data_free"))}
