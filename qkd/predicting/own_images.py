"""What a scored file's own run has learned from: is it among the scored images, and is the run's set still the same?"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.config import DataConfig, RunConfig
    from qkd.data import Splits


@dataclass(frozen=True)
class OwnRun:
    """The run that a file was exported by.

    Args:
        folder: Of the run.
        config: Of the run; a relative path of its set is resolved.
    """

    folder: Path
    config: RunConfig

    def is_tested_by(self, data: DataConfig) -> bool:
        """Return whether another config names the run's own folder or archives, and divides them alike."""
        return self.has_set(data) and not self.divides_otherwise(data)

    def has_set(self, data: DataConfig) -> bool:
        """Return whether another config names the run's own folder or archives."""
        own = self.config.data
        if data.path is None or own.path is None or data.name != own.name:
            return False
        return os.path.realpath(data.path) == os.path.realpath(own.path)

    def divides_otherwise(self, data: DataConfig) -> bool:
        """Return whether another config of the same folder draws other test images from it."""
        from qkd.data.sets.folder import is_hidden
        from qkd.data.sets.layout import layout_of

        own = self.config.data
        keys = ("test_fraction", "split_seed")
        if own.name != "folder" or own.path is None or all(getattr(own, key) == getattr(data, key) for key in keys):
            return False
        return layout_of(own.path, is_hidden).test is None  # otherwise, none are drawn

    def note(self, files: Iterable[Path], *, is_divided: bool = False) -> tuple[str, ...]:
        """Return a note if the run was trained on some of these files.

        Args:
            files: The scored images, or their archive.
            is_divided: Whether a config divides the run's own set in another way.
        """
        from qkd.methods.table import reads_images

        real, scored = _resolver(), list(files)
        if not reads_images(self.config):  # a data-free student learned from none
            return ()
        is_archive = any(path.suffix == ".npz" for path in scored)
        if not scored or is_archive != (self.config.data.name == "npz"):
            return ()
        try:
            learned = {real(path) for path in _learned_files(self.config.data)}
        except (ValueError, OSError):  # the set is gone
            return ()
        count = sum(real(path) in learned for path in scored)
        if not count:
            return ()
        run = shlex.quote(str(self.folder))
        what, how = "these images", ""
        if not is_archive:
            what = f"some of these images ({count:,} of {len(scored):,} are in its run's training part)"
        if is_divided:
            how += "; this config divides the set differently from the run"
        return (f"the student was trained on {what}; `qkd val {run} {run}` scores it on its test images alone{how}",)


def own_run(model: Path) -> OwnRun | None:
    """Return the run that a file was exported by; None if it is in none.

    Args:
        model: The ONNX file.
    """
    from qkd.roles.stored import stored_config

    folder = model.resolve().parent.parent
    try:
        config = stored_config(folder)
        return OwnRun(folder, with_its_set(config, folder))
    except (ValueError, OSError):
        return None


def with_its_set(config: RunConfig, folder: Path) -> RunConfig:
    """Return a run's config with the path of its set resolved.

    A relative path is one from the folder in which the run was started: the current one, or the one that holds
    ``runs/``. If both have such a set, it is the one that the run has a record of.

    Args:
        config: Of the run.
        folder: The run folder.

    Raises:
        qkd.data.DataError: If the run's record of its set is damaged.
    """
    path = config.data.path
    if path is None or path.is_absolute():
        return config
    places = {os.path.realpath(one): one for one in (path, folder.resolve().parent.parent / path) if one.is_dir()}
    configs = [config.data.model_copy(update={"path": place}) for place in places.values()]
    chosen = next((data for data in configs if len(configs) > 1 and _is_recorded(data, folder)), None)
    return config.model_copy(update={"data": chosen or next(iter(configs), config.data)})


def splits_of(settings: RunConfig, file: Path, run: OwnRun | None) -> Splits:
    """Return the images of a config, and those of a run only if they are still what the run began with.

    Args:
        settings: The config.
        file: Its file, maybe one in a run folder.
        run: That of the scored file; its record is compared if the config names its set.

    Raises:
        qkd.data.DataError: If they cannot be read, or are not those that the run was started with.
    """
    from qkd.data import load_splits
    from qkd.roles.images import FILE, stored_images

    if file.name == "config.yaml" and (file.parent / FILE).is_file():
        return stored_images(with_its_set(settings, file.parent), file.parent)
    if run is not None and run.is_tested_by(settings.data):
        return stored_images(settings, run.folder)
    return load_splits(settings.data, seed=settings.seed)


def _is_recorded(data: DataConfig, folder: Path) -> bool:
    from qkd.data import changes, read_facts
    from qkd.roles.images import recorded_facts

    then = recorded_facts(folder)
    try:
        return then is not None and not changes(then, read_facts(data))
    except (ValueError, OSError):
        return False


def _learned_files(data: DataConfig) -> list[Path]:
    """Return the files of a set that are trained on, or that the drawn validation images are among."""
    if data.path is None:
        return []
    if data.name == "npz":
        return [data.path / "train.npz"]
    from qkd.data.loading.load import folder_form
    from qkd.data.sets import FolderSplit, list_folder

    parts = list_folder(data.path, folder_form(data))
    train, rows = parts.train, parts.learned_rows.tolist()
    return [train.files[row] for row in rows] if isinstance(train, FolderSplit) else []


def _resolver() -> Callable[[Path], str]:
    """Return a function that resolves links, of each folder once."""
    folder_of = cache(os.path.realpath)

    def real(path: Path) -> str:
        return os.path.realpath(path) if path.is_symlink() else os.path.join(folder_of(path.parent), path.name)

    return real
