"""What a student starts from: its own float training where it has one, the weights, the calibration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from qkd.config import PhaseConfig, RunConfig, StudentConfig
from qkd.data import Splits, epoch_order, iterate, normalise, take_quiz
from qkd.losses.turns import turn_images
from qkd.methods.peers.nets import Peer, build_peers
from qkd.nets import build_net, load_weights
from qkd.progress import Progress
from qkd.roles.agents import named_agent, role_agent, unsearched_agent
from qkd.roles.float_training import keep_last_checkpoint, train_float, write_float
from qkd.roles.nets import WEIGHTS, net_facts, prepare_student
from qkd.rundir import RunFolder
from qkd.seeding import global_stream, stream
from quantizers import Student, calibrate

FROZEN_SHARE = 10  # without phases, one epoch in ten (at least one) trains the deployed arithmetic at the end


def phases_of(student: StudentConfig) -> tuple[PhaseConfig, ...]:
    """Return the phases of a student; without any in the config: tutoring, its last tenth with batch norm frozen."""
    if student.phases:
        return student.phases
    epochs = student.train.epochs
    frozen = max(1, epochs // FROZEN_SHARE)
    # Frozen batch norm diverges at high rates (seen at half a cosine from 0.03); the end of a cosine is low by itself.
    factor = 1.0 if student.train.schedule == "cosine" and epochs >= FROZEN_SHARE else None
    settling = PhaseConfig(name="settling", epochs=frozen, freeze_batch_norm=True, lr_factor=factor)
    return (PhaseConfig(name="tutoring", epochs=epochs - frozen), settling) if epochs > frozen else (settling,)


def student_images(config: RunConfig, splits: Splits) -> Splits:
    """Return the images of a run as its student may use them: without the quiz, where a phase has one.

    Raises:
        ValueError: If there are not enough training images for the quiz.
    """
    images = config.student.quiz_images
    if images is None:
        return splits
    try:
        return take_quiz(splits, images, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"student.phases: meta.{error}") from error


class StudentStart:
    """The student of a run before its distillation.

    Args:
        run: The run; its teacher is complete.
        splits: Its images (:func:`student_images`), on ``device``.
        device: Where to train.
        progress: Where to talk.
        role: ``student``, or another that a config in the student's place describes; names random streams.
        folder: Of the role, in the run folder.
        borrowed: Weights it starts from, instead of those that the config names.
    """

    def __init__(
        self,
        run: RunFolder,
        splits: Splits,
        device: torch.device,
        progress: Progress,
        *,
        role: str = "student",
        folder: str = "student",
        borrowed: Path | None = None,
    ) -> None:
        self.run, self.splits, self.device, self.progress = run, splits, device, progress
        self.config = run.config
        self.kind = run.config.student_start
        self.role, self._folder, self._borrowed = role, folder, borrowed

    def float_files(self) -> list[Path]:
        """Run the own float training where there is one (resuming); return its files.

        Raises:
            qkd.training.TrainingError: If it diverges.
            OSError: If a file cannot be written.
        """
        if self.kind != "float":
            return []
        folder, stage = self.run.folder(f"{self._folder}/float"), f"{self.role}_float"
        if self.run.is_complete(stage):  # its manifest: a part of the stage that needs it first
            return [folder / WEIGHTS, folder / "metrics.jsonl", folder / "result.json"]
        train = self.config.student.float_train
        if train is None:
            raise ValueError(f"{self.role}: float_train is missing")
        agent = named_agent(self.config, "student")
        # a searched schedule of the student's is found from this start, so this training does without it
        is_own = self.config.student.agent.policy == "search"
        net = self.net()
        fitted = train_float(
            net,
            train,
            unsearched_agent(agent) if is_own else role_agent(self.run, "student"),
            role=stage,
            data=self.config.data,
            splits=self.splits,
            seed=self.config.seed,
            device=self.device,
            folder=folder,
            fingerprint={},
            progress=self.progress,
        )
        name, data = self.config.student_net, self.config.data
        files = write_float(folder, net, name, self.splits, data, fitted, role=stage)
        self.run.complete(stage, files)
        keep_last_checkpoint(folder)
        return files

    def net(self) -> nn.Module:
        """Return the student's float net, freshly initialised from the run's seed."""
        splits = self.splits
        with global_stream(self.config.seed, "init", self.role):
            return build_net(
                self.config.student_net,
                classes=len(splits.classes),
                channels=splits.channels,
                image_size=splits.image_size,
            )

    def facts(self) -> dict[str, str]:
        """Return what is kept beside the student's weights."""
        splits = self.splits
        sizes = {"classes": len(splits.classes), "channels": splits.channels, "image_size": splits.image_size}
        return net_facts(self.config.student_net, **sizes)

    def file(self) -> Path | None:
        """Return the weights it starts from; None where they are random."""
        return (
            self._borrowed
            or self.config.student.weights
            or {
                "teacher": self.run.path / "teacher" / WEIGHTS,
                "float": self.run.path / self._folder / "float" / WEIGHTS,
            }.get(self.kind)
        )

    def inputs(self) -> list[Path]:
        """Return the weights it starts from as a manifest may name them: those of the run folder, no file elsewhere."""
        source = self.file()
        return [source] if source is not None and source.is_relative_to(self.run.path) else []

    def float_net(self) -> nn.Module:
        """Return the student's float net with its start's weights, on the CPU."""
        net, source = self.net(), self.file()
        if source is not None and (note := load_weights(net, source)):
            self.progress.say(f"{self.role}: {source}: {note}")
        return net

    def student(self) -> Student:
        """Return the low-bit student with its start's weights, on the device, not calibrated."""
        splits = self.splits
        student = prepare_student(self.config, self.float_net(), channels=splits.channels, size=splits.image_size)
        return student.to(self.device)

    def peers(self) -> tuple[Peer, ...]:
        """Return the peers that learn beside the student, on the device, not calibrated."""
        return build_peers(self.config, self.splits, self.file(), self.device)

    def calibrate(self, *students: Student) -> None:
        """Set activation scales and batch-norm statistics from training images."""
        self.progress.say(f"{self.role}: calibrating on {self.config.student.calibration_batches} batches")
        for student in students:
            calibrate(student, self._batches())

    def _batches(self) -> Iterator[Tensor]:
        config, train = self.config, self.splits.train
        size = min(config.data.batch_size, len(train))
        order = epoch_order(len(train), stream(config.seed, "calibration"))[: size * config.student.calibration_batches]
        for images, _ in iterate(train, order, size, self.device, drop_last=True):
            upright = normalise(images, self.splits.mean, self.splits.std)
            yield upright if config.student.rotations is None else turn_images(upright)
