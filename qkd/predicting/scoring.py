"""Score an exported file on labeled images: a folder of class folders, an npz file, or a config's test set."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qkd.failures import ConfigError, UsageError
from qkd.predicting.own_images import OwnRun, own_run, splits_of
from qkd.predicting.predict import InputError, Model, from_array, read_image
from qkd.report.caveats import interval_text, wilson
from qkd.report.findings.confusion import class_name
from qkd.report.table import align
from qkd.units import percent

BATCH = 32  # images per run of the file
PARTS = ("test", "val", "valid", "validation")  # subfolders of a whole data set; the first that exists is used
MOST_ROWS = 40  # classes with a line in the table; --json has all
Batches = Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]


@dataclass(frozen=True)
class LabeledImages:
    """Images with labels.

    Args:
        count: How many.
        classes: Names; a label is an index into them.
        batches: uint8 ``[images, height, width, channels]`` and labels int64 ``[images]``, once.
        shape: Height, width and channels of the stored images, if all have the same; None for image files.
        files: The image files, or the archive; empty for a set that torchvision or scikit-learn provides.
        is_divided: Whether a config draws them from the set of the file's own run, in another way than the run.
        notes: What of a folder is not read.
    """

    count: int
    classes: tuple[str, ...]
    batches: Batches
    shape: tuple[int, int, int] | None = None
    files: tuple[Path, ...] = ()
    is_divided: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """How an exported file did on labeled images.

    Args:
        model: The file.
        data: What it was scored on.
        images: How many.
        right: How many of them were classified correctly.
        classes: Names.
        confusion: Class -> predicted class -> images.
        notes: What makes the figures doubtful.
    """

    model: str
    data: str
    images: int
    right: int
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """Fraction of the images that were classified correctly."""
        return self.right / self.images

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data; fractions are 0..1."""
        return {**asdict(self), "accuracy": self.accuracy, "interval": list(wilson(self.accuracy, self.images))}

    def to_text(self) -> str:
        """Return the accuracy, and a line for each class."""
        interval = interval_text(wilson(self.accuracy, self.images))
        head = f"{self.model} on {self.data}: {percent(self.accuracy)} ({self.right} of {self.images}; 95 % {interval})"
        rows = [["class", "images", "accuracy", "most often mistaken for"], *self._rows()]
        more = [f"and {len(rows) - 1 - MOST_ROWS} more classes (--json has all)"] if len(rows) - 1 > MOST_ROWS else []
        return "\n".join([head, align(rows[: MOST_ROWS + 1]), *more, *(f"note: {note}" for note in self.notes)])

    def _rows(self) -> list[list[str]]:
        rows = []
        for label, counts in enumerate(self.confusion):
            total = sum(counts)
            if total:
                wrong = [(count, other) for other, count in enumerate(counts) if other != label and count]
                mostly = max(wrong, key=lambda pair: (pair[0], -pair[1]), default=None)
                taken = f"{class_name(self.classes, mostly[1])} ({mostly[0]})" if mostly else "-"
                rows.append([class_name(self.classes, label), str(total), percent(counts[label] / total), taken])
        return rows


def score_file(path: Path, data: str) -> Score:
    """Score a file on labeled images.

    Args:
        path: An exported ONNX file with metadata about its input.
        data: A folder of class folders (or with ``test/`` or ``val/`` of them), an npz file of ``images`` and
            ``labels`` (or a folder with ``test.npz``), or a config, whose test set is used.

    Raises:
        UsageError: If ``data`` is none of these, or its classes are not the file's.
        InputError: If the file or an image cannot be used.
        ValueError: If a config is wrong, or its data set cannot be read, or is not what its run began with.
    """
    model, run = Model(str(path)), own_run(path)
    found = labeled_images(data, model, run)
    confusion = np.zeros((0, 0), np.int64)
    for images, labels in found.batches:
        scores = model.scores(images)
        if scores.ndim != 2:
            raise InputError(f"{path}: returns {list(scores.shape)}, not [images, classes]")
        if not confusion.size:
            outputs = max(scores.shape[1], len(found.classes))
            confusion = np.zeros((outputs, outputs), np.int64)
        np.add.at(confusion, (labels, scores.argmax(1)), 1)
    rows = tuple(tuple(int(count) for count in row) for row in confusion)
    names = tuple(model.classes) or found.classes
    learned = () if run is None else run.note(found.files, is_divided=found.is_divided)
    notes = (*learned, *found.notes, *_converted(found, model))
    return Score(str(path), data, int(confusion.sum()), int(np.trace(confusion)), names, rows, notes)


def _converted(found: LabeledImages, model: Model) -> tuple[str, ...]:
    """Return a note if the images have another size or other channels than the model's input."""
    taken = (*model.facts["input_size"], len(model.facts["input_mean"]))
    if found.shape is None or found.shape == taken:
        return ()
    theirs, ours = ("x".join(map(str, shape)) for shape in (found.shape, taken))
    return (f"the images are {theirs} (height, width, channels); they were converted to the model's {ours}",)


def labeled_images(data: str, model: Model, run: OwnRun | None = None) -> LabeledImages:
    """Return the images that ``data`` refers to, with labels in the order of the model's classes.

    Args:
        data: As for :func:`score_file`.
        model: The file that is scored.
        run: The run that it was exported by, if any.

    Raises:
        UsageError: If there are none, or their classes are not the model's.
        ValueError: If a config is wrong, or its data set cannot be read, or is not what its run began with.
    """
    path = Path(data)
    if path.is_dir() and (path / "config.yaml").is_file():
        return _of_config(str(path / "config.yaml"), model, run)
    if path.is_dir():
        archive = path / "test.npz"
        return _of_archive(archive, model) if archive.is_file() else _of_folder(path, model)
    if path.is_file() and path.suffix == ".npz":
        return _of_archive(path, model)
    return _of_config(data, model, run)


def _of_folder(path: Path, model: Model) -> LabeledImages:
    from qkd.data.sets.folder import class_files

    root = next((path / part for part in PARTS if _is_part(path / part, model)), path)
    folders = _folders_in(root)
    if not folders:
        raise UsageError(f"{path}: has no class folders; needs {root}/<class>/*.png|jpg|..., or test.npz")
    classes = _labels_of(folders, model, path)
    found, notes = class_files(root)
    files = [(file, classes[name]) for name, some in found.items() for file in some]
    names = tuple(model.classes) or tuple(classes)
    return LabeledImages(
        len(files), names, _read_files(files, model), files=tuple(file for file, _ in files), notes=notes
    )


def _folders_in(path: Path) -> list[str]:
    from qkd.data.sets.folder import is_hidden

    return sorted(one.name for one in path.iterdir() if one.is_dir() and not is_hidden(one.name))


def _is_part(path: Path, model: Model) -> bool:
    """Return whether a folder is a part of a set: it has class folders. A class may be called `test`, too."""
    from qkd.data.sets.folder import composed

    if not path.is_dir() or not (folders := _folders_in(path)):
        return False
    known = {composed(name) for name in model.classes}
    return composed(path.name) not in known or any(composed(name) in known for name in folders)


def _labels_of(names: Sequence[str], model: Model, where: Path) -> dict[str, int]:
    from qkd.data.sets.folder import composed

    if not model.classes:
        return {name: label for label, name in enumerate(names)}
    labels = {composed(name): label for label, name in enumerate(model.classes)}  # macOS decomposes accents
    unknown = [name for name in names if composed(name) not in labels]
    if unknown:
        raise UsageError(
            f"{where}: the model does not have class {', '.join(map(repr, unknown[:3]))}; it has "
            f"{', '.join(map(repr, model.classes[:8]))}{', ...' if len(model.classes) > 8 else ''}"
        )
    return {name: labels[composed(name)] for name in names}


def _read_files(files: Sequence[tuple[Path, int]], model: Model) -> Batches:
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        yield (
            np.concatenate([read_image(str(file), model.facts) for file, _ in part]),
            np.array([one for _, one in part]),
        )


def _of_archive(path: Path, model: Model) -> LabeledImages:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            images, labels = content["images"], content["labels"]
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path}: needs arrays `images` and `labels` ({error})") from error
    most = len(model.classes) or None
    if not labels.size and not images.size:
        raise UsageError(f"{path}: has no images")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise UsageError(f"{path}: needs one label per image, found {labels.dtype} {labels.shape}")
    if labels.min() < 0 or (most and labels.max() >= most):
        raise UsageError(f"{path}: labels are {labels.min()} to {labels.max()}, but the model has {most} classes")
    images = images[..., None] if images.ndim == 3 else images
    from_array(images[:1], model.facts, str(path))  # whatever is wrong is wrong with the first one
    classes = tuple(model.classes) or tuple(str(one) for one in range(int(labels.max()) + 1))
    if (beside := path.parent / "classes.json").is_file():
        from qkd.data.sets.arrays import read_class_names

        _require_same_classes(str(beside), read_class_names(beside, images=len(labels)), model)
    return LabeledImages(
        len(labels), classes, _parts(images, labels.astype(np.int64), model), _shape_of(images), (path,)
    )


def _shape_of(images: npt.NDArray[Any]) -> tuple[int, int, int] | None:
    if images.ndim != 4:
        return None
    _, *sides = images.shape
    height, width, channels = (*sides[1:], sides[0]) if sides[0] in (1, 3) and sides[2] not in (1, 3) else sides
    return height, width, channels


def _parts(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], model: Model) -> Batches:
    for start in range(0, len(labels), BATCH):
        yield from_array(images[start : start + BATCH], model.facts), labels[start : start + BATCH]


def _of_config(config: str, model: Model, run: OwnRun | None) -> LabeledImages:
    from qkd.checking import name_faults
    from qkd.config.binding import find_config, load_config

    try:
        file = find_config(config)
    except ConfigError as error:
        raise UsageError(f"{error} (DATA is a folder of class folders, an npz file, a config or a run)") from error
    settings = load_config(config, [], checks=(name_faults,))
    splits, data = splits_of(settings, file, run), settings.data
    _require_same_classes(config, splits.classes, model)
    channels, height, width = splits.test.image_shape
    archive = () if data.name != "npz" or data.path is None else (data.path / "test.npz",)
    return LabeledImages(
        len(splits.test), tuple(splits.classes), _of_split(splits, model), (height, width, channels),
        files=getattr(splits.test, "files", archive),
        is_divided=run is not None and run.has_set(data) and run.divides_otherwise(data),
    )  # fmt: skip


def _require_same_classes(where: str, names: Sequence[str], model: Model) -> None:
    if model.classes and tuple(model.classes) != tuple(names):
        raise UsageError(f"{where}: its classes are {list(names)[:8]}, the model's {list(model.classes)[:8]}")


def _of_split(splits: Any, model: Model) -> Batches:
    import torch

    from qkd.data import iterate

    order = torch.arange(len(splits.test))
    for images, labels in iterate(splits.test, order, BATCH, "cpu", drop_last=False):
        yield from_array(images.permute(0, 2, 3, 1).contiguous().numpy(), model.facts), labels.numpy()
