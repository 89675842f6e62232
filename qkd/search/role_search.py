"""The population search of one role's agent: what a member trains, and what the search writes to the run folder."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from qkd.config import RunConfig
from qkd.config.sections import NEWER, Section
from qkd.config.training import TrainConfig
from qkd.data import Splits
from qkd.engines.engine import current
from qkd.files import sha256_of
from qkd.methods.table import method_mark
from qkd.moved import json_in_first_spelling, train_in_first_spelling
from qkd.nets.own.copies import change_nets, portable_net
from qkd.progress import Progress, Silent
from qkd.roles.agents import Role, agent_inputs, named_agent, unsearched_agent
from qkd.roles.images import run_images, stored_images
from qkd.roles.learner import StudentRole, stretched_phases, stretched_train, student_images
from qkd.roles.stored import WEIGHTS_HASH, start_mark, stored_config
from qkd.roles.teacher.role import teacher_role
from qkd.run.folder import RunFolder
from qkd.search.board import SearchBoard
from qkd.search.cost import cost_report
from qkd.search.images import search_splits
from qkd.search.journal import Journal
from qkd.search.local import run_local
from qkd.search.outcome import write_search
from qkd.search.ray_engine import run_ray
from qkd.search.trial import Trial
from qkd.training.assembly import Context, agent_mark, assemble, train_part
from qkd.training.precision import choose_device

REWARDS = {
    "teacher": "the teacher's own validation accuracy, batch norm in eval mode",
    "student": "validation accuracy of the low-bit student (deployed arithmetic), distilled from the run's teacher",
}
# settings that affect where a search runs, not what it finds
_WHERE = ("engine", "workers", "gpus_per_worker", "address", "worker_failures")
_UNMARKED = {"keep_checkpoint"}  # does not affect what a search finds


def search_agent(run: RunFolder, role: Role, progress: Progress) -> list[Path]:
    """Search a role's agent (resuming) if the config says so and none has been found yet; return its files.

    Args:
        run: The run. For the student's search, its teacher must be complete.
        role: The role whose agent is searched.
        progress: Shows the population.

    Raises:
        qkd.search.SearchError: If the whole population diverges.
        ValueError: If there are not enough images, or the search was started with other inputs.
        ImportError: If the engine is ``ray`` and Ray is not installed.
        OSError: If a file cannot be written.
    """
    if role not in run.config.searched_roles:
        return []
    folder, stage = run.folder("search"), f"search_{role}"
    files = [folder / f"{role}.{kind}" for kind in ("schedule.yaml", "population.jsonl", "cost.json")]
    if current().first(lambda: run.is_complete(stage)):
        return files
    if run.config.search.engine == "ray":  # which runs in separate processes
        current().first(lambda: _search(run, role, files, progress))
    else:
        _search(run, role, files, progress)
        current().wait()
    return files


def _search(run: RunFolder, role: Role, files: list[Path], progress: Progress) -> None:
    folder, stage = run.folder("search"), f"search_{role}"
    device = choose_device(run.config.device)
    splits = _images(run.config, role, run_images(run, progress)).to(device)
    inputs = _inputs(run, role, splits, device, progress)
    start = start_mark(run.config, role)  # now: the file may change meanwhile
    journal = open_journal(run, role, splits, inputs)
    found = search_splits(splits, run.config.search, seed=run.config.seed)
    _engine(run, role, journal, found, device, progress)
    report = cost_report(journal, len(found.val))
    write_search(journal, folder, _provenance(run, role, journal, found, start), report)
    progress.say(report.to_text())
    journal.discard_states()  # before the manifest: nothing would do it afterward; only the journal is needed
    run.complete(stage, files, inputs)


def open_journal(run: RunFolder, role: Role, splits: Splits, inputs: list[Path]) -> Journal:
    """Return the journal of a role's search: an existing one or a new one.

    Args:
        run: The run.
        role: The role whose agent is searched.
        splits: The run's images.
        inputs: Files of the run folder that the search depends on.
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
        fingerprint={
            "config": config_mark(run.config, role),
            "data": splits.fingerprint,
            **marks,
            **_parts(),
            **_mixing(run.config, role),
            **(method_mark(run.config) if role == "student" else {}),
        },
    )


def _parts() -> dict[str, str]:
    """Return what identifies searches whose batch norm uses parts of batches; empty if it uses whole ones."""
    engine = current()
    return {} if engine.synchronizes or engine.size == 1 else {"parts of a batch": str(engine.size)}


def _mixing(config: RunConfig, role: Role) -> dict[str, str]:
    """Return what identifies searches whose members mix images; earlier versions ignored CutMix in searches."""
    return {"CutMix of members": "on"} if named_agent(config, role).cutmix_probability else {}


def config_mark(config: RunConfig, role: Role) -> str:
    """Return the SHA-256 of all settings that a role's search depends on."""
    own = config.teacher if role == "teacher" else config.student
    values: dict[str, Any] = {
        "data": _as_marked(config.data, {"root", "download", "workers", "path"}),
        "search": config.search.model_dump(mode="json", exclude=set(_WHERE)),
        role: _as_marked(own, {"run"}),  # where a teacher comes from; searched ones come from this run
    }
    if start := start_mark(config, role):
        values["weights"] = start[WEIGHTS_HASH]
    if role == "student" and config.student.view == "own":
        values["view"] = agent_mark(config.teacher.agent) or config.teacher.agent.model_dump(mode="json")
    text = json_in_first_spelling(json.dumps(change_nets(values, portable_net), sort_keys=True))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _as_marked(section: Section, unmarked: Collection[str] = ()) -> dict[str, Any]:
    """Return a section's settings; newer keys only if they are not the default, so that older searches resume."""
    values = section.model_dump(mode="json", exclude=set(unmarked) | _UNMARKED)
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if NEWER in field.metadata and value == field.get_default(call_default_factory=True):
            values.pop(key, None)
        elif isinstance(value, Section) and key in values:
            values[key] = _as_marked(value)
    return train_in_first_spelling(values) if isinstance(section, TrainConfig) else values


def build_trial(run: RunFolder, role: Role, splits: Splits, device: torch.device, progress: Progress) -> Trial:
    """Return what the members of a role's search share.

    Args:
        run: The run. For the student's search, its teacher and its own float training must be complete.
        role: The role whose agent is searched.
        splits: The search's images.
        device: Where to train.
        progress: Where to talk.
    """
    as_searched = RunFolder(searched_config(run.config, role), run.path)
    context = Context(as_searched, splits, device, progress)
    who = teacher_role(context, alone=True) if role == "teacher" else StudentRole(context)
    agent, compat = named_agent(run.config, role), run.config.search.compat
    return Trial(assemble(who), agent, compat=compat, progress=progress)


def searched_config(config: RunConfig, role: Role) -> RunConfig:
    """Return a config whose role trains for the length of its search, with an agent still to be found.

    Raises:
        ValueError: If the config has no training for the role, or too few epochs for all of the student's phases.
    """
    epochs = config.search.epochs
    own = config.teacher if role == "teacher" else config.student
    if own.train is None:
        raise ValueError("teacher.train: missing; the search trains teachers with these settings")
    changes: dict[str, Any] = {"train": stretched_train(own.train, epochs), "agent": unsearched_agent(own.agent)}
    if role == "student":
        changes["phases"] = stretched_phases(config, epochs)
    return config.model_copy(update={role: own.model_copy(update=changes)})


def trial_of_folder(path: str, role: Role) -> Trial:
    """Return :func:`build_trial` of a run folder, in a worker's process.

    Args:
        path: The run folder; it is read, not locked.
        role: The role whose agent is searched.
    """
    config = stored_config(Path(path))
    torch.set_num_threads(config.threads or 1)
    device = choose_device(config.device)
    splits = _images(config, role, stored_images(config, Path(path))).to(device)
    found = search_splits(splits, config.search, seed=config.seed)
    return build_trial(RunFolder(config, Path(path)), role, found, device, Silent())


def _images(config: RunConfig, role: Role, splits: Splits) -> Splits:
    """Return the images that a role may train on."""
    return student_images(config, splits) if role == "student" else splits


def _inputs(run: RunFolder, role: Role, full: Splits, device: torch.device, progress: Progress) -> list[Path]:
    """Return the files of the run folder that a search depends on, after creating those that it creates itself."""
    if role == "teacher":
        return []
    student = StudentRole(Context(run, full, device, progress))
    for part in student.sub_trainings():
        train_part(part)
    files = [*student.inputs(), *student.start_inputs()]
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


def _provenance(
    run: RunFolder, role: Role, journal: Journal, splits: Splits, start: Mapping[str, str]
) -> dict[str, Any]:
    settings = run.config.search.model_dump(mode="json", exclude=set(_WHERE))
    return {
        "seed": run.config.seed,
        "net": portable_net(run.config.teacher_net if role == "teacher" else run.config.student_net),
        "reward": REWARDS[role],
        "made_from": dict(journal.fingerprint),
        **start,
        "settings": {**settings, "train_images": len(splits.train), "val_images": len(splits.val)},
    }
