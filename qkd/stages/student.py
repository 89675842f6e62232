"""The distill stage: a low-bit student from its start, through its phases, to settled weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from qkd.agents import build_agent
from qkd.config import AgentConfig, PhaseConfig, RunConfig
from qkd.data import Splits, load_splits, normalise
from qkd.distill import build_terms
from qkd.distill.step import DistillStep
from qkd.files import sha256_of
from qkd.progress import Progress
from qkd.rundir import RunFolder
from qkd.seeding import stream
from qkd.stages.float_training import keep_last_checkpoint, warn_of_another_environment
from qkd.stages.models import WEIGHTS, load_teacher, save_net
from qkd.stages.outcome import score, write_outcome
from qkd.stages.role_agents import agent_inputs, agent_mark, role_agent
from qkd.stages.student_start import StudentStart, phases_of
from qkd.training import Batch, Job, Phase, cpu_threads, fit
from qkd.training.precision import choose_device
from quantizers import Student, freeze_batch_norm, quantizer_scales, settle


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


class _Distillation:
    """One run of the stage; the steps share run, data and device."""

    def __init__(self, run: RunFolder, progress: Progress) -> None:
        self.folder, self.progress, self.config = run, progress, run.config
        self.device = choose_device(run.config.device)
        self.splits: Splits = load_splits(run.config.data, seed=run.config.seed).to(self.device)
        self.start = StudentStart(run, self.splits, self.device, progress)

    def run(self) -> None:
        config, run = self.config, self.folder
        teacher = load_teacher(run).to(self.device).requires_grad_(False)
        files = self.start.float_files()
        student = self.start.student()
        folder = run.folder("student")
        fitted = fit(self._job(student, teacher, folder), self.progress, begin=lambda: self.start.calibrate(student))
        settle(student)
        save_net(folder / WEIGHTS, student, self.start.facts())
        outcome = score(
            "student",
            config.student_net,
            student,
            self.splits,
            config.data,
            fitted,
            parameters=sum(parameter.numel() for parameter in self.start.net().parameters()),
            weight_bits=config.student.quant.weight_bits,
            act_bits=config.student.quant.act_bits,
            start=self.start.kind,
            view=config.student.view,
        )
        files += [folder / WEIGHTS, folder / "metrics.jsonl", write_outcome(folder, outcome)]
        run.complete("distill", files, [run.path / "teacher" / WEIGHTS, *agent_inputs(run, "student")])
        keep_last_checkpoint(folder)

    def _job(self, student: Student, teacher: nn.Module, folder: Path) -> Job:
        config = self.config
        train = config.student.train
        source = self.start.file()
        agent = role_agent(self.folder, "student")
        return Job(
            role="student",
            model=student,
            config=train,
            data=config.data,
            splits=self.splits,
            agent=build_agent(agent, epochs=train.epochs, mean=self.splits.mean),
            phases=distill_phases(
                self.config,
                phases_of(config.student),
                student,
                teacher,
                run_view(self.folder, self.config, self.splits),
            ),
            seed=config.seed,
            device=self.device,
            folder=folder,
            fingerprint={
                "data": self.splits.fingerprint,
                "teacher": sha256_of(self.folder.path / "teacher" / WEIGHTS),
                **({"start": sha256_of(source)} if source is not None else {}),
                **agent_mark(agent),
            },
            scales=lambda: quantizer_scales(student),
            others={"teacher": teacher},
        )


def distill_phases(
    config: RunConfig,
    phases: Sequence[PhaseConfig],
    student: Student,
    teacher: nn.Module,
    view: Callable[[Batch], Tensor] | None,
) -> tuple[Phase, ...]:
    """Return the phases of a distillation, ready to train.

    Args:
        config: Its ``student`` section has the loss terms.
        phases: Names, lengths and what is special about each.
        student: The net that is trained.
        teacher: The fixed teacher.
        view: Gives the teacher's images; None where it sees the student's.
    """
    return tuple(_phase(config, phase, student, teacher, view) for phase in phases)


def _phase(
    config: RunConfig,
    phase: PhaseConfig,
    student: Student,
    teacher: nn.Module,
    view: Callable[[Batch], Tensor] | None,
) -> Phase:
    own = config.student
    terms = build_terms(own.terms if phase.terms is None else phase.terms, label_smoothing=own.train.label_smoothing)
    step = DistillStep(student, teacher, terms, view=view, tap_paths=student.tap_paths)

    def enter() -> None:
        freeze_batch_norm(student, phase.freeze_batch_norm)

    # the deployed arithmetic is float32: reduced precision would train something else
    return Phase(phase.name, phase.epochs, step, enter, step.tapped, not phase.freeze_batch_norm, phase.rate_factor)


def teacher_view(
    config: RunConfig, splits: Splits, agent: AgentConfig | None = None
) -> Callable[[Batch], Tensor] | None:
    """Return what gives the teacher its images for a batch (normalised); None where it sees the student's.

    ``own``: the teacher's agent augments the same raw images, with random draws of its own; ``clean``: raw images.

    Args:
        config: Its ``student.view`` says which.
        splits: The images' mean and standard deviation.
        agent: The teacher's; the config's where absent.
    """
    if config.student.view == "same":
        return None
    if config.student.view == "clean":
        return lambda batch: normalise(batch.raw, splits.mean, splits.std)
    agent_of_teacher = build_agent(agent or config.teacher.agent, epochs=config.student.train.epochs, mean=splits.mean)

    def own(batch: Batch) -> Tensor:
        # Without positions in the data set, batches are told apart by their step.
        names = (batch.epoch, batch.step) if batch.samples is None else (batch.epoch,)
        generator = stream(config.seed, "teacher_view", *names)
        seen = agent_of_teacher(batch.raw, generator=generator, epoch=batch.epoch, samples=batch.samples)
        return normalise(seen, splits.mean, splits.std)

    return own


def run_view(run: RunFolder, config: RunConfig, splits: Splits) -> Callable[[Batch], Tensor] | None:
    """Return :func:`teacher_view` with the agent that the run has found for its teacher, where it needs one.

    Args:
        run: The run.
        config: The run's, or one with another length of the student's training.
        splits: The images' mean and standard deviation.
    """
    return teacher_view(config, splits, role_agent(run, "teacher") if config.student.view == "own" else None)
