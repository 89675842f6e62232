"""The teacher stage: a full-precision net, trained with the teacher's agent or taken from a file."""

from __future__ import annotations

from qkd.files import sha256_of, write_text
from qkd.nets import load_weights
from qkd.progress import Progress
from qkd.run.folder import RunFolder
from qkd.stages.borrowed import borrow_teacher
from qkd.stages.float_training import (
    keep_last_checkpoint,
    train_float,
    warn_of_another_environment,
    write_float,
)
from qkd.stages.images import run_images
from qkd.stages.members import ensemble_results, fresh_teacher, train_members
from qkd.stages.role_agents import agent_inputs, role_agent
from qkd.stages.rotating import JOINT_FILE, fresh_branches, is_joint, joint_training, save_branches
from qkd.stages.searching import search_agent
from qkd.training import cpu_threads
from qkd.training.precision import choose_device


def run(run: RunFolder, progress: Progress) -> None:
    """Search the teacher's agent where the config says so, train the teacher (both resuming), score it once
    on the test images, and write ``teacher/``; or take all that from another run.

    Raises:
        ValueError: If the data, the net or the given weights cannot be used.
        qkd.search.SearchError: If the search's whole population diverges.
        qkd.training.TrainingError: If the training diverges.
        OSError: If a file cannot be written.
    """
    if run.config.teacher.run is not None:
        borrow_teacher(run, run.config.teacher.run, progress)
        return
    warn_of_another_environment(run, progress)
    with cpu_threads(run.config.threads):
        search_agent(run, "teacher", progress)
        _run(run, progress)


def _run(run: RunFolder, progress: Progress) -> None:
    config, teacher = run.config, run.config.teacher
    device = choose_device(config.device)
    splits = run_images(run, progress).to(device)
    net = fresh_teacher(config, splits)
    fingerprint = {}
    if teacher.weights is not None:
        if note := load_weights(net, teacher.weights):
            progress.say(f"teacher: {teacher.weights}: {note}")
        fingerprint[f"weights {teacher.weights}"] = sha256_of(teacher.weights)
    folder = run.folder("teacher")
    fitted = None
    branches = fresh_branches(config, net.to(device), splits, "teacher") if is_joint(config) else None
    if teacher.train is None:
        progress.say("teacher: untrained" if teacher.untrained else f"teacher: {teacher.weights} as it is")
        net.to(device)
        write_text(folder / "metrics.jsonl", "")
    else:
        fitted = train_float(
            net,
            teacher.train,
            role_agent(run, "teacher"),
            role="teacher",
            data=config.data,
            splits=splits,
            seed=config.seed,
            device=device,
            folder=folder,
            fingerprint=fingerprint,
            progress=progress,
            **({} if branches is None else joint_training(config, net, branches)),
        )
    others = train_members(run, splits, device, progress)
    details = ensemble_results(run, net, splits, device)
    files = write_float(folder, net, teacher.net, splits, config.data, fitted, role="teacher", **details)
    files += [] if branches is None else [save_branches(folder / JOINT_FILE, branches, config, splits)]
    run.complete("teacher", [*files, *others], agent_inputs(run, "teacher"))
    keep_last_checkpoint(folder)
