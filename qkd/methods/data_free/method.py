"""Data-free distillation as a method: the image source is made before the student, or learns along with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from qkd.config import RunConfig
from qkd.config.data_free import GENERATOR, GROWING, NOISE, POOL, PROCEDURAL, DataFreeConfig
from qkd.data import Splits
from qkd.methods.data_free.checks import require_classes, require_teacher_fits
from qkd.methods.data_free.config_checks import config_faults
from qkd.methods.data_free.float_twin import FLOAT, DataFreeFloatRole, is_same_twin
from qkd.methods.data_free.inverting.growing import GrowingPool, GrowingSource
from qkd.methods.data_free.inverting.pooling import FOLDER as POOL_FOLDER
from qkd.methods.data_free.inverting.pooling import PoolRole, load_pool
from qkd.methods.data_free.making.adversary import AdversarialSource, Adversary
from qkd.methods.data_free.making.arranging import Arranged, arrangement_of
from qkd.methods.data_free.making.blind import blind
from qkd.methods.data_free.making.generating import (
    NAME,
    GeneratorRole,
    TrainedGenerator,
    build_generator,
    load_generator,
    logits_of,
)
from qkd.methods.data_free.making.kinds import KINDS
from qkd.methods.data_free.making.procedural import Procedural
from qkd.methods.data_free.making.sources import Generated, MadeSource, Noise, Pool
from qkd.methods.data_free.making.watching import Watched
from qkd.methods.method import Lesson, Method, Synthesis
from qkd.progress import Progress
from qkd.roles.guide import load_guide
from qkd.roles.learner import StudentRole
from qkd.roles.nets import fresh_net
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.training import Partner
from qkd.training.assembly import WEIGHTS, Context, Role
from qkd.training.job import Job, Source

ADVERSARY, GROWN = "generator", "growing_pool"  # names of their tensors in checkpoints


class DataFree(Method):
    """Method that gives the student generated images in place of real ones: for training, calibration, batch norm.

    Phases, terms and taps are as in the config. Labels are the classes that images were made for or, if none was
    requested, the teacher's decisions.
    """

    brings_loss = False
    reads_images = False

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._adversary: Adversary | None = None
        self._growing: GrowingPool | None = None
        self._pool: Pool | None = None  # a training needs it twice: for calibration, and for its batches

    @property
    def why_one_device(self) -> str:
        """Return why a batch cannot be split across devices: each would make the whole batch."""
        return "made images are drawn for a whole batch, and a generator's batch norm and diversity need all of it"

    @property
    def settings(self) -> DataFreeConfig:
        """Return the section of the config."""
        return cast(DataFreeConfig, self.config.student.data_free)

    def faults(self) -> Iterable[str]:
        """Return faults of the config for the method."""
        return config_faults(self.config)

    # images

    def images(self, splits: Splits) -> Splits:
        """Return the data set without its training and validation images.

        Raises:
            ValueError: If the teacher's net cannot be used by the method.
        """
        require_classes(len(splits.classes))
        net = fresh_net(self.config, self.config.teacher_net, splits, "teacher")
        require_teacher_fits(
            self.settings.method,
            self.config.teacher_net,
            net,
            len(splits.classes),
            splits.image_shape,
            groups=self.settings.groups,
        )
        return blind(splits)

    def synthesis(self, context: Context) -> Synthesis:
        """Return the source of images, arranged as in the config."""
        arrangement = arrangement_of(self.settings, context.splits, context.device)
        made = self._synthesis(context)
        return made if arrangement.is_idle else Arranged(made, arrangement)

    def _synthesis(self, context: Context) -> Synthesis:
        """Return the method's source of images."""
        settings, splits, device = self.settings, context.splits, context.device
        if settings.family == NOISE:
            return Noise(splits.image_shape, device)
        if settings.family == PROCEDURAL:
            kinds = settings.procedural_kinds
            return Procedural(splits.image_shape, kinds, splits.mean, splits.std, device)
        if settings.family == POOL:
            self._pool = self._pool or _pool_of(context, settings)
            return self._pool
        if settings.family == GENERATOR:
            net = load_generator(context.run, settings, splits).to(device)
            asks = KINDS[settings.method].condition != "none"
            return Generated(net, latent=settings.latent, classes=len(splits.classes), device=device, asks=asks)
        return self._grown() if settings.family == GROWING else self._opponent()

    def source(self, context: Context) -> Callable[[Job], Source]:
        """Return the source of the student's batches."""
        settings, agent = self.settings, self.config.student.agent
        arrangement = arrangement_of(settings, context.splits, context.device)
        more: dict[str, Any] = {"images": settings.images_per_epoch, "agent": agent, "arrangement": arrangement}
        if settings.learns_along:
            opponent = self._opponent()
            return lambda job: AdversarialSource(job, opponent, **more)
        if settings.family == GROWING:
            pool = self._grown()
            return lambda job: GrowingSource(job, pool, **more)
        synthesis, teacher = self._synthesis(context), load_guide(context.run).to(context.device)
        return lambda job: MadeSource(job, synthesis, teacher, **more)

    # trainings before the student's

    def sub_trainings(self, context: Context, before: str) -> Iterator[Role]:
        """Yield the generator or pool if it is made once, before the student, for any width."""
        if before != "student":
            return
        if self.settings.family == GENERATOR:
            yield GeneratorRole(context, self.settings)
        elif self.settings.family == POOL:
            yield PoolRole(context, self.settings)

    def float_twin(self, role: StudentRole) -> Role:
        """Return the float net that the student starts from, also distilled from generated images."""
        return DataFreeFloatRole(role)

    def taken_over(self) -> tuple[str, ...]:
        """Return the manifest of the image source, if it is made once for students of all widths."""
        return (NAME,) if self.settings.made_once else ()

    def borrow(self, run: RunFolder, source: Path, progress: Progress) -> None:
        """Copy the generator or pool of the run that the teacher comes from, if its settings are the same.

        Also copy the float student that a student of the same net starts from: its training does not depend on widths.
        """
        theirs, own = stored_config(source), self.settings
        other, there = theirs.student.data_free, RunFolder(theirs, source.resolve())
        if not own.made_once or other is None or other.origin() != own.origin() or theirs.seed != run.config.seed:
            return
        if not there.is_complete(NAME):
            return
        run.adopt(NAME, source)
        progress.say(f"{NAME}: copied from {source}, not retrained")
        if there.is_complete(FLOAT) and is_same_twin(theirs, run.config):
            run.adopt(FLOAT, source)
            progress.say(f"float student: copied from {source}, not retrained")

    def made_from(self, run: RunFolder) -> Mapping[str, Path]:
        """Return the files of the image source, by their path in the run folder."""
        folder, family = run.path / NAME, self.settings.family
        files = [folder / WEIGHTS] if family == GENERATOR else []
        if family == POOL:
            files = sorted((folder / POOL_FOLDER).glob("batch_*.npz"))
        return {path.relative_to(run.path).as_posix(): path for path in files}

    # image sources that change while the student learns

    def prepare(self, lesson: Lesson) -> None:
        """Build a generator that learns with the student, or a growing pool, if the method has one."""
        settings, device = self.settings, next(lesson.student.parameters()).device
        teacher = Watched(lesson.teacher)
        if settings.family == GROWING:
            self._growing = GrowingPool(teacher, lesson.student, settings, lesson.splits, self.config.seed, device)
            self.partners = (Partner(GROWN, self._growing.grown),)
        if not settings.learns_along:
            return
        net = TrainedGenerator(build_generator(settings, lesson.splits, self.config.seed, NAME)).to(device).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=settings.lr)
        self._adversary = Adversary(net, optimizer, teacher, lesson.student, settings, len(lesson.splits.classes))
        self.partners = (Partner(ADVERSARY, net, optimizer=optimizer),)

    def begin(self, role: str, context: Context) -> None:
        """Warm up a generator that learns with the student."""
        if self._adversary is not None:
            self._adversary.warm_up(self.config.data.batch_size, self.config.seed, role, context.progress)

    def enter(self, lesson: Lesson, phase: object) -> None:  # noqa: ARG002
        """Let the generator's batch norm see its batches."""
        if self._adversary is not None:
            self._adversary.net.train()

    def _opponent(self) -> Adversary:
        if self._adversary is None:
            raise ValueError(f"student.data_free: the generator of {self.settings.method} is not prepared yet")
        return self._adversary

    def _grown(self) -> GrowingPool:
        if self._growing is None:
            raise ValueError(f"student.data_free: the pool of {self.settings.method} is not prepared yet")
        return self._growing


def _pool_of(context: Context, settings: DataFreeConfig) -> Pool:
    """Return the images of a run's pool, with the teacher's class of each."""
    images = load_pool(PoolRole(context, settings).files()).to(context.device)
    teacher = Watched(load_guide(context.run).to(context.device))
    return Pool(images, logits_of(teacher, images).argmax(1))
