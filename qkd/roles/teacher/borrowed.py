"""A teacher from another run: checked against this run's images, and copied with its hashes."""

from __future__ import annotations

from pathlib import Path

from qkd.config import RunConfig
from qkd.config.borrowed import form_faults
from qkd.data import DataError
from qkd.methods.table import methods_of
from qkd.nets.own.copies import change_nets, portable_net
from qkd.progress import Progress
from qkd.roles.images import keep_normalization, require_same_images
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.run.identity import identity

SPLIT = ("seed", "data.val_fraction", "data.train_limit")  # which images are held out from training


def borrow_teacher(run: RunFolder, source: Path, progress: Progress) -> None:
    """Copy the teacher of another run to this run; an interrupted call starts over.

    Args:
        run: The run.
        source: The other run's folder; its teacher must be complete.
        progress: Where to report it.

    Raises:
        qkd.data.DataError: If its images, their form or their domains are not this run's.
        ValueError: If its teacher is not complete, has other settings than in this config, or lacks what a method
            needs besides it.
        OSError: If a file cannot be read or written.
    """
    configs = (stored_config(source), run.config)
    theirs, ours = (change_nets(config.model_dump(mode="json"), portable_net) for config in configs)
    for values in (theirs, ours):
        values["teacher"].pop("run", None)
    if theirs["teacher"] != ours["teacher"]:
        raise ValueError(f"teacher.run: the teacher's settings of {source} are no longer those of this run's config")
    if faults := form_faults(run.config.data, configs[0].data, str(source)):
        raise DataError("; ".join(faults))
    require_same_images(run, source, progress)
    _require_same_domains(*configs, source)
    methods = methods_of(run.config)
    for method in methods:
        method.require_source(source)
    before, now = identity(theirs), identity(ours)
    others = [f"{key} {before.get(key)} there, {now.get(key)} here" for key in SPLIT if before.get(key) != now.get(key)]
    if others:
        progress.warn(
            f"teacher.run: training and validation images were split differently ({'; '.join(others)}), so the teacher "
            f"may have learned from validation images of this run; test images are separate from both"
        )
    keep_normalization(run, source, configs[0], is_same_part=not others)
    found = "search_teacher"
    if "teacher" in run.config.searched_roles and RunFolder(run.config, source.resolve()).is_complete(found):
        run.adopt(found, source)
    run.adopt("teacher", source)
    progress.say(f"teacher: copied from {source}, not retrained")
    for method in methods:
        method.borrow(run, source, progress)


def _require_same_domains(theirs: RunConfig, ours: RunConfig, source: Path) -> None:
    """Raise unless images are in the same domains; otherwise the teacher has seen what this run calls unseen.

    Raises:
        qkd.data.DataError: If the domains differ.
    """
    there, here = (
        (list((data.domains or {}).items()), data.unseen_domain) for data in (theirs.data, ours.data)
    )  # the order determines which image is in which domain
    if there != here:
        raise DataError(
            f"teacher.run: the teacher of {source} was trained on other domains (unseen: {there[1] or 'none'}) "
            f"than this run's (unseen: {here[1] or 'none'}); set data.domains and data.unseen_domain as there, or let "
            f"this run train its teacher"
        )
