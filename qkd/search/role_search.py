"""The population search of one role's agent: what a member trains, and what the search leaves in the run folder."""

from __future__ import annotations

import functools
import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkd.config import PhaseConfig, RunConfig, StudentConfig, TrainConfig
from qkd.data import Splits
from qkd.files import sha256_of
from qkd.methods.auxiliary.training import train_auxiliary
from qkd.methods.rotations.branches import branches_file, load_branches, train_branches
from qkd.nets import build_net, load_weights
from qkd.progress import Progress, Silent
from qkd.roles.agents import Role, agent_inputs, agent_mark, named_agent
from qkd.roles.images import run_images, stored_images
from qkd.roles.nets import guide_files, load_guide
from qkd.roles.phases import distillation
from qkd.roles.start import StudentStart, phases_of, student_images
from qkd.roles.stored import stored_config
from qkd.roles.views import run_view
from qkd.rundir import RunFolder
from qkd.search import (
    Journal,
    SearchBoard,
    Trial,
    cost_report,
    run_local,
    search_splits,
    write_search,
)
from qkd.search.ray_engine import run_ray
from qkd.seeding import global_stream
from qkd.training import Phase, supervised_step
from qkd.training.precision import choose_device
from qkd.training.state import fill
from quantizers import quantizer_scales

REWARDS = {
    "teacher": "the teacher's own validation accuracy, batch norm in eval mode",
    "student": "validation accuracy of the low-bit student (deployed arithmetic), distilled from the run's teacher",
}
# settings that say where a search runs, not what it finds
_WHERE = ("engine", "workers", "gpus_per_worker", "address", "worker_failures")


def search_agent(run: RunFolder, role: Role, progress: Progress) -> list[Path]:
    """Search a role's agent (resuming) if the config says so and it has not been found yet; return its files.

    Args:
        run: The run. For the student's search its teacher is complete.
        role: Whose agent.
        progress: Shows the population.

    Raises:
        qkd.search.SearchError: If the whole population diverges.
        ValueError: If there are not enough images, or the search was begun with other inputs.
        ImportError: If the engine is ``ray`` and Ray is not installed.
        OSError: If a file cannot be written.
    """
    if role not in run.config.searched_roles:
        return []
    folder, stage = run.folder("search"), f"search_{role}"
    files = [folder / f"{role}.{kind}" for kind in ("schedule.yaml", "population.jsonl", "cost.json")]
    if run.is_complete(stage):
        return files
    device = choose_device(run.config.device)
    splits = _images(run.config, role, run_images(run, progress)).to(device)
    inputs = _inputs(run, role, splits, device, progress)
    journal = open_journal(run, role, splits, inputs)
    found = search_splits(splits, run.config.search, seed=run.config.seed)
    _engine(run, role, journal, found, device, progress)
    report = cost_report(journal, len(found.val))
    write_search(journal, folder, _provenance(run, role, journal, found), report)
    progress.say(report.to_text())
    journal.discard_states()  # before the manifest: after it nobody would come to do it; the journal is all it takes
    run.complete(stage, files, inputs)
    return files


def open_journal(run: RunFolder, role: Role, splits: Splits, inputs: list[Path]) -> Journal:
    """Return the journal of a role's search, where it stopped or at its beginning.

    Args:
        run: The run.
        role: Whose agent.
        splits: The run's images.
        inputs: Files of the run folder that the search is made from.
    """
    settings = run.config.search
    marks = {path.relative_to(run.path).as_posix(): sha256_of(path) for path in inputs}
    return Journal(
        run.path / "search" / role,
        role=role,
        seed=run.config.seed,
        members=settings.members,
        epochs=settings.epochs,
        interval_epochs=settings.interval_epochs,
        fingerprint={"config": config_mark(run.config, role), "data": splits.fingerprint, **marks},
    )


def config_mark(config: RunConfig, role: Role) -> str:
    """Return the SHA-256 of all settings that a role's search depends on."""
    own = config.teacher if role == "teacher" else config.student
    values: dict[str, Any] = {
        "data": config.data.model_dump(mode="json", exclude={"root", "download", "workers", "path"}),
        "search": config.search.model_dump(mode="json", exclude=set(_WHERE)),
        role: own.model_dump(mode="json"),
    }
    if own.weights is not None:
        values["weights"] = sha256_of(own.weights)
    if role == "student" and config.student.view == "own":
        values["view"] = agent_mark(config.teacher.agent) or config.teacher.agent.model_dump(mode="json")
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()


def build_trial(run: RunFolder, role: Role, splits: Splits, device: torch.device, progress: Progress) -> Trial:
    """Return what the members of a role's search share.

    Args:
        run: The run. For the student's search its teacher is complete, and so is its own float training.
        role: Whose agent.
        splits: The search's images.
        device: Where to train.
        progress: Where to talk.
    """
    return (_teacher_trial if role == "teacher" else _student_trial)(run, splits, device, progress)


def trial_of_folder(path: str, role: Role) -> Trial:
    """Return :func:`build_trial` of a run folder, in a process of its own: a worker's.

    Args:
        path: The run folder; it is read, not locked.
        role: Whose agent.
    """
    config = stored_config(Path(path))
    torch.set_num_threads(config.threads or 1)
    device = choose_device(config.device)
    splits = _images(config, role, stored_images(config, Path(path))).to(device)
    found = search_splits(splits, config.search, seed=config.seed)
    return build_trial(RunFolder(config, Path(path)), role, found, device, Silent())


def stretched_train(train: TrainConfig, epochs: int) -> TrainConfig:
    """Return a training's settings with the search's length; the warm-up keeps its share."""
    warmup = train.warmup_epochs * epochs / train.epochs
    return train.model_copy(update={"epochs": epochs, "warmup_epochs": warmup})


def stretched_phases(student: StudentConfig, epochs: int) -> tuple[PhaseConfig, ...]:
    """Return a student's phases with the search's length; the last one fills what whole epochs leave over."""
    if not student.phases:
        return phases_of(student.model_copy(update={"train": stretched_train(student.train, epochs)}))
    # attention that never learned is of no use, so that its phase is kept, however short the search
    least = [1 if phase.trains == "modules" else 0 for phase in student.phases]
    shares = [phase.epochs * epochs // student.train.epochs for phase in student.phases]
    lengths = [max(pair) for pair in zip(least, shares, strict=True)]
    lengths[-1] += epochs - sum(lengths)
    if lengths[-1] < 0:
        raise ValueError(f"search.epochs: {epochs} are too few for the student's {len(student.phases)} phases")
    factor, ends = epochs / student.train.epochs, accumulate(lengths)
    triples = zip(student.phases, lengths, ends, strict=True)
    return tuple(_stretched(phase, length, factor, end) for phase, length, end in triples if length)


def _stretched(phase: PhaseConfig, epochs: int, factor: float, end: int) -> PhaseConfig:
    """Return a phase with another length, and what is counted in epochs of the training in the same proportion.

    A quiz begins before the phase ends (at ``end``, in epochs of the training), however short the search.
    """
    if phase.meta is None:
        return phase.model_copy(update={"epochs": epochs})
    start = min(int(phase.meta.teacher_start_epoch * factor), end - 1)
    meta = phase.meta.model_copy(update={"teacher_start_epoch": start})
    return phase.model_copy(update={"epochs": epochs, "meta": meta})


def _images(config: RunConfig, role: Role, splits: Splits) -> Splits:
    """Return the images that a role may learn from."""
    return student_images(config, splits) if role == "student" else splits


def _inputs(run: RunFolder, role: Role, full: Splits, device: torch.device, progress: Progress) -> list[Path]:
    """Return the files of the run folder that a search is made from, after making those that are its own to make."""
    if role == "teacher":
        return []
    start = StudentStart(run, full, device, progress)
    start.float_files()
    train_auxiliary(run, full, device, progress)
    train_branches(run, full, device, progress)
    branches = branches_file(run)
    files = [*guide_files(run), *start.inputs(), *([] if branches is None else [branches])]
    files += agent_inputs(run, "teacher") if run.config.student.view == "own" else []
    return list(dict.fromkeys(files))


def _engine(
    run: RunFolder, role: Role, journal: Journal, splits: Splits, device: torch.device, progress: Progress
) -> None:
    settings = run.config.search
    board = SearchBoard(progress.board(), role, settings.members)
    if journal.is_done:
        return
    if settings.engine == "ray":
        run_ray(journal, functools.partial(trial_of_folder, str(run.path), role), board, settings)
    else:
        run_local(journal, build_trial(run, role, splits, device, progress), board)


def _teacher_trial(run: RunFolder, splits: Splits, device: torch.device, progress: Progress) -> Trial:
    config, teacher = run.config, run.config.teacher
    if teacher.train is None:
        raise ValueError("teacher.train: missing; the search trains teachers as it says")
    sizes = {"classes": len(splits.classes), "channels": splits.channels, "image_size": splits.image_size}
    net = build_net(teacher.net, **sizes).to(device)
    train = stretched_train(teacher.train, config.search.epochs)

    def begin(member: int) -> None:
        with global_stream(config.seed, "init", "search teacher", member):
            fresh = build_net(teacher.net, **sizes)
        if teacher.weights is not None:
            load_weights(fresh, teacher.weights)
        fill(net, fresh.state_dict())

    step = supervised_step(net, label_smoothing=train.label_smoothing)
    phases = (Phase("supervised", train.epochs, step),)
    return _trial(run, "teacher", net, train, splits, phases, device, begin=begin, progress=progress)


def _student_trial(run: RunFolder, splits: Splits, device: torch.device, progress: Progress) -> Trial:
    config, epochs = run.config, run.config.search.epochs
    teacher = load_guide(run).to(device)
    start = StudentStart(run, splits, device, progress)
    student = start.student()
    train, lengths = stretched_train(config.student.train, epochs), stretched_phases(config.student, epochs)
    own = config.student.model_copy(update={"train": train, "phases": lengths})
    as_searched = config.model_copy(update={"student": own})
    view = run_view(run, as_searched, splits)
    peers = start.peers()
    made = distillation(
        as_searched, lengths, student, teacher, view,
        net=start.net(), splits=splits, peers=peers, branches=load_branches(run, teacher, splits),
    )  # fmt: skip
    modules = [partner.module for partner in made.partners]
    fresh = [_state_of(module) for module in modules]
    calibrated: list[dict[str, torch.Tensor]] = []

    def begin(member: int) -> None:  # noqa: ARG001 - every member starts from the same weights
        if not calibrated:
            for module, state in zip((student, *modules), (start.student().state_dict(), *fresh), strict=True):
                fill(module, state)
            start.calibrate(student, *made.low_bit)
            calibrated.extend(_state_of(module) for module in (student, *modules))
        for module, state in zip((student, *modules), calibrated, strict=True):
            fill(module, state)
        for partner in made.partners:
            if partner.optimizer is not None:
                partner.optimizer.state.clear()

    return _trial(
        run, "student", student, train, splits, made.phases, device, begin=begin, progress=progress,
        scales=lambda: quantizer_scales(student), others={"teacher": teacher}, partners=made.partners,
    )  # fmt: skip


def _state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _trial(
    run: RunFolder,
    role: Role,
    model: nn.Module,
    train: TrainConfig,
    splits: Splits,
    phases: tuple[Phase, ...],
    device: torch.device,
    **details: Any,
) -> Trial:
    config = run.config
    return Trial(
        role=role,
        model=model,
        train=train,
        data=config.data,
        splits=splits,
        agent=named_agent(config, role),
        phases=phases,
        seed=config.seed,
        device=device,
        compat=config.search.compat,
        **details,
    )


def _provenance(run: RunFolder, role: Role, journal: Journal, splits: Splits) -> dict[str, Any]:
    settings = run.config.search.model_dump(mode="json", exclude=set(_WHERE))
    return {
        "seed": run.config.seed,
        "net": run.config.teacher.net if role == "teacher" else run.config.student_net,
        "reward": REWARDS[role],
        "made_from": dict(journal.fingerprint),
        "settings": {**settings, "train_images": len(splits.train), "val_images": len(splits.val)},
    }
