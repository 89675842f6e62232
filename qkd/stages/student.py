"""The distill stage: a low-bit student from its start, through its phases, to settled weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn

from qkd.agents import build_agent
from qkd.config import PhaseConfig, RunConfig, StudentConfig
from qkd.data import Splits, epoch_order, iterate, load_splits, normalise
from qkd.distill import build_terms
from qkd.distill.step import DistillStep
from qkd.files import sha256_of
from qkd.nets import build_net, load_weights
from qkd.progress import Progress
from qkd.rundir import RunFolder
from qkd.seeding import global_stream, stream
from qkd.stages.float_training import (
    agent_mark,
    keep_last_checkpoint,
    train_float,
    warn_of_another_environment,
    write_float,
)
from qkd.stages.models import (
    WEIGHTS,
    load_teacher,
    net_facts,
    prepare_student,
    save_net,
)
from qkd.stages.outcome import score, write_outcome
from qkd.training import Batch, Job, Phase, cpu_threads, fit
from qkd.training.precision import choose_device
from quantizers import Student, calibrate, freeze_batch_norm, quantizer_scales, settle

FROZEN_SHARE = 10  # without phases, one epoch in ten (at least one) trains the deployed arithmetic at the end


def run(run: RunFolder, progress: Progress) -> None:
    """Distil the student (resuming), score it once on the test images, and write ``student/``.

    Raises:
        ValueError: If the data, a net, a loss term or a tap cannot be used.
        qkd.training.TrainingError: If the training diverges.
        OSError: If a file cannot be written.
    """
    warn_of_another_environment(run, progress)
    with cpu_threads(run.config.threads):
        _Distillation(run, progress).run()


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


class _Distillation:
    """One run of the stage; the steps share run, data and device."""

    def __init__(self, run: RunFolder, progress: Progress) -> None:
        self.folder, self.progress, self.config = run, progress, run.config
        self.device = choose_device(run.config.device)
        self.start = run.config.student_start
        self.splits: Splits = load_splits(run.config.data, seed=run.config.seed).to(self.device)

    def run(self) -> None:
        config, run = self.config, self.folder
        teacher = load_teacher(run).to(self.device).requires_grad_(False)
        files, inputs = self._float_files()
        student = self._student()
        folder = run.folder("student")
        fitted = fit(self._job(student, teacher, folder), self.progress, begin=lambda: self._calibrate(student))
        settle(student)
        save_net(folder / WEIGHTS, student, self._facts())
        outcome = score(
            "student",
            config.student_net,
            student,
            self.splits,
            config.data,
            fitted,
            parameters=sum(parameter.numel() for parameter in self._net().parameters()),
            weight_bits=config.student.quant.weight_bits,
            act_bits=config.student.quant.act_bits,
            start=self.start,
            view=config.student.view,
        )
        files += [folder / WEIGHTS, folder / "metrics.jsonl", write_outcome(folder, outcome)]
        run.complete("distill", files, inputs)
        keep_last_checkpoint(folder)

    def _float_files(self) -> tuple[list[Path], list[Path]]:
        """Run the own float training where there is one; return the stage's files so far, and its inputs."""
        inputs = [self.folder.path / "teacher" / WEIGHTS]
        if self.start != "float":
            return [], inputs
        name = "student_float"
        folder = self.folder.folder("student/float")
        if self.folder.is_complete(name):
            return [folder / WEIGHTS, folder / "metrics.jsonl", folder / "result.json"], inputs
        student, train = self.config.student, self.config.student.float_train
        if train is None:
            raise ValueError("student.float_train: missing")
        net = self._net()
        fitted = train_float(
            net,
            train,
            student.agent,
            role=name,
            data=self.config.data,
            splits=self.splits,
            seed=self.config.seed,
            device=self.device,
            folder=folder,
            fingerprint={},
            progress=self.progress,
        )
        files = write_float(folder, net, self.config.student_net, self.splits, self.config.data, fitted, role=name)
        self.folder.complete(name, files)
        keep_last_checkpoint(folder)
        return files, inputs

    def _net(self) -> nn.Module:
        splits = self.splits
        with global_stream(self.config.seed, "init", "student"):
            return build_net(
                self.config.student_net,
                classes=len(splits.classes),
                channels=splits.channels,
                image_size=splits.image_size,
            )

    def _facts(self) -> dict[str, str]:
        splits = self.splits
        sizes = {"classes": len(splits.classes), "channels": splits.channels, "image_size": splits.image_size}
        return net_facts(self.config.student_net, **sizes)

    def _start_file(self) -> Path | None:
        return {
            "teacher": self.folder.path / "teacher" / WEIGHTS,
            "float": self.folder.path / "student" / "float" / WEIGHTS,
        }.get(self.start)

    def _student(self) -> Student:
        net = self._net()
        source = self._start_file()
        if source is not None:
            load_weights(net, source)
        student = prepare_student(self.config, net, channels=self.splits.channels, size=self.splits.image_size)
        return student.to(self.device)

    def _calibrate(self, student: Student) -> None:
        self.progress.say(f"student: calibrating on {self.config.student.calibration_batches} batches")
        calibrate(student, self._calibration_batches())

    def _calibration_batches(self) -> Iterator[Tensor]:
        config, train = self.config, self.splits.train
        size = min(config.data.batch_size, len(train))
        order = epoch_order(len(train), stream(config.seed, "calibration"))[: size * config.student.calibration_batches]
        for images, _ in iterate(train, order, size, self.device, drop_last=True):
            yield normalise(images, self.splits.mean, self.splits.std)

    def _job(self, student: Student, teacher: nn.Module, folder: Path) -> Job:
        config = self.config
        train = config.student.train
        source = self._start_file()
        return Job(
            role="student",
            model=student,
            config=train,
            data=config.data,
            splits=self.splits,
            agent=build_agent(config.student.agent, epochs=train.epochs, mean=self.splits.mean),
            phases=tuple(self._phase(phase, student, teacher) for phase in phases_of(config.student)),
            seed=config.seed,
            device=self.device,
            folder=folder,
            fingerprint={
                "data": self.splits.fingerprint,
                "teacher": sha256_of(self.folder.path / "teacher" / WEIGHTS),
                **({"start": sha256_of(source)} if source is not None else {}),
                **agent_mark(config.student.agent),
            },
            scales=lambda: quantizer_scales(student),
            others={"teacher": teacher},
        )

    def _phase(self, phase: PhaseConfig, student: Student, teacher: nn.Module) -> Phase:
        own = self.config.student
        terms = build_terms(
            own.terms if phase.terms is None else phase.terms, label_smoothing=own.train.label_smoothing
        )
        step = DistillStep(student, teacher, terms, view=self._view(), tap_paths=student.tap_paths)

        def enter() -> None:
            freeze_batch_norm(student, phase.freeze_batch_norm)

        # the deployed arithmetic is float32: reduced precision would train something else
        return Phase(phase.name, phase.epochs, step, enter, step.tapped, not phase.freeze_batch_norm, phase.rate_factor)

    def _view(self) -> Callable[[Batch], Tensor] | None:
        return teacher_view(self.config, self.splits)


def teacher_view(config: RunConfig, splits: Splits) -> Callable[[Batch], Tensor] | None:
    """Return what gives the teacher its images for a batch (normalised); None where it sees the student's.

    ``own``: the teacher's agent augments the same raw images, with random draws of its own; ``clean``: raw images.
    """
    if config.student.view == "same":
        return None
    if config.student.view == "clean":
        return lambda batch: normalise(batch.raw, splits.mean, splits.std)
    agent = build_agent(config.teacher.agent, epochs=config.student.train.epochs, mean=splits.mean)

    def own(batch: Batch) -> Tensor:
        # Without positions in the data set, batches are told apart by their step.
        names = (batch.epoch, batch.step) if batch.samples is None else (batch.epoch,)
        generator = stream(config.seed, "teacher_view", *names)
        seen = agent(batch.raw, generator=generator, epoch=batch.epoch, samples=batch.samples)
        return normalise(seen, splits.mean, splits.std)

    return own
