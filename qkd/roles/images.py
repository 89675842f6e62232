"""The images of a run: loaded, and compared with those that the run was started with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qkd.config import RunConfig
from qkd.data import DataError, DataFacts, Splits, changes, load_splits, read_facts, sampling_note
from qkd.engines.engine import current
from qkd.files import DamagedFileError, read_json, write_json
from qkd.progress import Progress, Silent
from qkd.run.folder import RunFolder

FILE = "data.json"  # in the run folder: facts about the data set when the first stage read it
NORMALIZATION = "teacher/normalization.json"  # of a teacher from another run that learned from another part of the set


def run_images(run: RunFolder, progress: Progress | None = None) -> Splits:
    """Return the images of a run, the same that its other stages saw.

    The first stage that reads images records facts about them; a run that was started without a record gets one now.

    Args:
        run: The run, locked by this process.
        progress: Where to report what the user should know about the data set, once per run.

    Raises:
        qkd.data.DataError: If they cannot be read, or are not those that the run was started with.
        OSError: If the record cannot be written.
    """
    return current().in_turn(lambda: _run_images(run, progress))  # one process downloads and records


def _run_images(run: RunFolder, progress: Progress | None) -> Splits:
    splits = load_splits(run.config.data, seed=run.config.seed)
    if splits.facts is not None:
        is_first = not (run.path / FILE).exists()
        _hold(run, splits.facts, splits.notes, progress or Silent())
        if is_first and progress is not None and splits.held_out:
            progress.say(f"data: {splits.held_out}")
    return _as_its_teacher(splits, run.path)


def check_images(run: RunFolder, progress: Progress) -> None:
    """Compare the data set with the one a run was started with, without loading it for training.

    Args:
        run: The run, locked by this process.
        progress: Where to report that a run without a record gets one now.

    Raises:
        qkd.data.DataError: If the set cannot be read, or is not the one the run was started with.
        OSError: If the record cannot be written.
    """
    _hold(run, read_facts(run.config.data), (), progress)


def stored_images(config: RunConfig, folder: Path) -> Splits:
    """Return the images of a run folder that is only read: compared with its record, if it has one.

    Args:
        config: The run's config.
        folder: The run folder; nothing is written to it.

    Raises:
        qkd.data.DataError: If they cannot be read, or are not those that the run was started with.
    """
    splits = load_splits(config.data, seed=config.seed)
    if splits.facts is not None and (then := recorded_facts(folder)) is not None:
        _refuse_changes(folder, then, splits.facts)
    return _as_its_teacher(splits, folder)


def keep_normalization(run: RunFolder, source: Path, theirs: RunConfig, *, is_same_part: bool) -> None:
    """Record the mean and the standard deviation of a teacher from another run, if this run's could differ.

    They are of the training images; another seed or limit chooses others of the same set.

    Args:
        run: The run that takes the teacher.
        source: The run folder that it comes from.
        theirs: Its config.
        is_same_part: Whether both runs train on the same part of the set.

    Raises:
        qkd.data.DataError: If the images of the other run cannot be read.
        OSError: If the record cannot be written.
    """
    if run.config.data.mean is not None and run.config.data.std is not None:
        return
    known = _normalization(source)
    if known is None and not is_same_part:  # the images are the same, but may have moved since
        part = {key: getattr(theirs.data, key) for key in ("val_fraction", "train_limit")}
        splits = load_splits(run.config.data.model_copy(update=part), seed=theirs.seed)
        known = splits.mean, splits.std
    if known is None:
        (run.path / NORMALIZATION).unlink(missing_ok=True)  # of a copy that was interrupted
    else:
        run.folder("teacher")
        write_json(run.path / NORMALIZATION, {"mean": list(known[0]), "std": list(known[1])})


def _as_its_teacher(splits: Splits, folder: Path) -> Splits:
    known = _normalization(folder)
    return splits if known is None else replace(splits, mean=known[0], std=known[1])


def _normalization(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    path = folder / NORMALIZATION
    try:
        values = read_json(path)
        mean, std = (tuple(float(value) for value in values[key]) for key in ("mean", "std"))
    except FileNotFoundError:
        return None
    except (DamagedFileError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} does not hold a mean and a std ({error}); run the teacher stage again") from error
    return mean, std


def require_same_images(run: RunFolder, other: Path, progress: Progress) -> None:
    """Raise unless a run's images are those that another run was started with.

    Args:
        run: The run, locked by this process.
        other: The other run's folder.
        progress: Where to report what the user should know about the data set.

    Raises:
        qkd.data.DataError: If they differ, or the other run has no record of its images.
    """
    now, then = read_facts(run.config.data), recorded_facts(other)
    if then is None:
        raise DataError(f"{other} has no record of its images ({FILE}), so they cannot be compared with this run's")
    lines = changes(then, now)
    if lines:
        raise DataError(f"the teacher of {other} was trained on other images than this run's: {'; '.join(lines)}")
    _hold(run, now, (), progress)


def _hold(run: RunFolder, now: DataFacts, notes: tuple[str, ...], progress: Progress) -> None:
    then = recorded_facts(run.path)
    if then is not None:
        _refuse_changes(run.path, then, now)
        return
    for line in (*notes, sampling_note(now)):
        if line:
            progress.warn(f"data: {line}")
    if run.is_complete("teacher"):
        progress.warn(f"this run has no record of its images ({FILE}): their current state is recorded instead")
    write_json(run.path / FILE, now.to_json())


def recorded_facts(folder: Path) -> DataFacts | None:
    """Return what a run folder recorded of its images; None if it has no record.

    Args:
        folder: The run folder.

    Raises:
        qkd.data.DataError: If the record is damaged.
    """
    path = folder / FILE
    try:
        return DataFacts.from_json(read_json(path))
    except FileNotFoundError:
        return None
    except (DamagedFileError, ValueError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise DataError(
            f"{path} is not a record of a data set ({reason}); if you are sure that the images are those of the run, "
            "delete it, and it will be written again"
        ) from error


def _refuse_changes(folder: Path, then: DataFacts, now: DataFacts) -> None:
    lines = changes(then, now)
    if lines:
        raise DataError(
            f"the data set is not what {folder} began with; changed: {'; '.join(lines)}. Restore it, or give this "
            "run another name (name=...), or delete the folder to start over"
        )
