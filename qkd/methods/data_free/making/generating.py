"""The training of a generator: against the teacher alone, once, for students of all widths."""

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
JUDGED = 512  # images that its histogram is taken from


class TrainedGenerator(nn.Module):
    """A generator with what its training remembers beside its weights.

    Args:
        generator: What is kept in the end.
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
        settings: Which, and its sizes.
        splits: The images it shall be like: their shape and classes.
        seed: Of the run.
        *names: Of the random stream.
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
        FileNotFoundError: If there is none yet.
        ValueError: If its file is damaged or of another generator.
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
        net: What is trained.
        teacher: Frozen.
        settings: Which method, with its weights.
        splits: Mean and standard deviation of the images, for samples.
        seed: Of the run.
        folder: Gets samples.
    """

    net: TrainedGenerator
    teacher: Watched
    settings: DataFreeConfig
    splits: Splits
    seed: int
    folder: Path

    def __call__(self, batch: Batch) -> StepResult:
        """Return the loss of a batch of latents; the labels are the classes that were asked for."""
        if batch.step == 0 and is_sampled(batch.epoch, self.settings.train.epochs):
            self.sample(batch.epoch)
        latents = batch.images.flatten(1)
        images = self.net(latents, batch.labels)
        seen = self.teacher(images)
        moment = Moment(images, latents, batch.labels, seen, self.net.references.clone())
        found = OBJECTIVES[self.settings.method](moment, weights_of(self.settings.method, self.settings.weights))
        if found.references is not None and batch.step == 1:  # the released code's place: the second step of an epoch
            self.net.references.copy_(found.references)
        terms: dict[str, Tensor] = {self.settings.method: found.loss}
        return StepResult(found.loss, terms, seen.logits, facts=facts_of(seen))

    def sample(self, epoch: int) -> Path:
        """Write what the generator makes now."""
        return sample_generator(self.net, self.settings, self.splits, self.seed, self.folder, epoch)


def sample_generator(
    net: TrainedGenerator, settings: DataFreeConfig, splits: Splits, seed: int, folder: Path, epoch: int
) -> Path:
    """Write what a generator makes of latents that stay the same.

    Args:
        net: The generator.
        settings: Size of its latents.
        splits: Classes, mean and standard deviation of the images.
        seed: Of the run.
        folder: Gets the sample.
        epoch: Epochs that are done.
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
        context: The run; what the student learns from is trained.
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
        """Return the agent that does nothing: there are no images."""
        return AgentConfig(policy="none")

    def make(self) -> Made:
        """Build generator and teacher.

        Raises:
            FileNotFoundError: If what it learns from is not there yet.
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
        """Write the last sample; return those of all epochs, which go where the generator is taken over."""
        step.sample(self.settings.train.epochs)
        return sample_files(step.folder)

    def _score(self, net: TrainedGenerator, teacher: Watched, fitted: FitResult | None) -> Path:
        """Write what the teacher sees in its images: how often each class, how sure it is."""
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
    """Return what a teacher sees in made images, from its logits: a histogram of classes, and how sure it is."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).double()
    shares = counts / counts.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum() / torch.tensor(float(len(counts))).log()
    return {
        "images": len(logits),
        "class_histogram": [int(one) for one in counts],
        "histogram_entropy": float(entropy),  # 1: all classes are as frequent
        "mean_confidence": float(functional.softmax(logits, dim=1).amax(1).mean()),
    }


@torch.no_grad()
def logits_of(teacher: Watched, images: Tensor) -> Tensor:
    """Return the teacher's logits of images on its device, 256 at a time."""
    return torch.cat([teacher.net(part) for part in torch.split(images, 256)])


def teacher_marks(run: RunFolder) -> dict[str, str]:
    """Return the hashes of what the student's images are made out of."""
    return {path.relative_to(run.path).as_posix(): sha256_of(path) for path in guide_of(run).files}


def origin_settings(config: RunConfig, settings: DataFreeConfig) -> Mapping[str, Any]:
    """Return what of a config the making of images depends on: dotted key -> plain value."""
    return {"seed": config.seed, **dict(leaves(settings.origin(), "data_free"))}
