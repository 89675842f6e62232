"""What a data set is, as a few hashes of its content: a run keeps them, and notices when images or labels change."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.sets import ArraySplit, FolderSplit
from qkd.data.splits import MemorySplit, Parts, Split

WHOLE_BYTES = 1 << 29  # parts of up to 512 MiB are hashed whole: a third of a second
_SAMPLE_BYTES = 1 << 28  # of a larger one, evenly spaced images of so many bytes in all
_SAMPLE_IMAGES = 4096  # and at most so many: each is a seek on a disk
_BLOCK = 1 << 20
_T = TypeVar("_T")
_NAMED = 5  # classes that a message names


@dataclass(frozen=True)
class PartFacts:
    """One part of a data set.

    Args:
        images: How many.
        labels: SHA-256 of its labels in order.
        pixels: SHA-256 of its images in order: pixels, or the bytes of their files with the sizes of all of them.
        sampled: Images that ``pixels`` is made of, evenly spaced; 0 where it is all of them.
    """

    images: int
    labels: str
    pixels: str
    sampled: int


@dataclass(frozen=True)
class DataFacts:
    """A data set before it is split; equal where nothing that was looked at has changed.

    Args:
        classes: Names.
        train: Its training images.
        test: Its test images.
        fingerprint: One SHA-256 of all that, for whoever needs a single value.
    """

    classes: tuple[str, ...]
    train: PartFacts
    test: PartFacts
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> DataFacts:
        """Return what :meth:`to_json` made.

        Raises:
            ValueError: If it was not made by it.
        """
        if not isinstance(value, Mapping) or set(value) != {"classes", "train", "test", "fingerprint"}:
            raise ValueError("needs classes, train, test and fingerprint")
        classes = value["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("`classes` must be a list of names")
        parts = {name: _part_from_json(value[name], name) for name in ("train", "test")}
        return cls(tuple(classes), parts["train"], parts["test"], str(value["fingerprint"]))


def facts_of(parts: Parts) -> DataFacts:
    """Return the facts of a data set.

    Parts of up to 512 MiB are looked at whole. Of a larger one, evenly spaced images of 256 MiB in all (4,096 at most)
    are, and of a folder the sizes of all files: a change elsewhere is not seen.

    Args:
        parts: The set, before a validation part is kept back. Of a folder the files are read, not decoded.

    Raises:
        DataError: If a file cannot be read.
    """
    whole = hashlib.sha256("\n".join(parts.classes).encode())
    is_whole = True
    found = {}
    for name, split in (("train", parts.train), ("test", parts.test)):
        pixels = hashlib.sha256()
        chosen = _chosen(split)
        for block in _content(split, chosen):
            pixels.update(block)
            if not isinstance(split, FolderSplit) and len(chosen) == len(split):
                whole.update(block)
            else:
                is_whole = False
        labels = _label_bytes(split.labels)
        for block in labels:
            whole.update(block)
        digest = hashlib.sha256(b"".join(labels)).hexdigest()
        sampled = 0 if len(chosen) == len(split) else len(chosen)
        found[name] = PartFacts(len(split), digest, pixels.hexdigest(), sampled)
    if not is_whole:
        whole = hashlib.sha256(json.dumps([parts.classes, *map(asdict, found.values())]).encode())
    return DataFacts(tuple(parts.classes), found["train"], found["test"], whole.hexdigest())


def changes(then: DataFacts, now: DataFacts) -> list[str]:
    """Return what has changed, in words; nothing where the facts are equal.

    A change of the number of images or of the classes is not followed by what it brings with it.

    Args:
        then: What the set was.
        now: What was found.

    Returns:
        A line for each change; none where the facts are equal.
    """
    lines = []
    if then.classes != now.classes:
        lines.append(_class_change(then.classes, now.classes))
    for name, before, after in (("train", then.train, now.train), ("test", then.test, now.test)):
        if before.images != after.images:
            lines.append(f"number of images of {name} ({before.images:,} then, {after.images:,} now)")
            continue
        if before.labels != after.labels and then.classes == now.classes:
            lines.append(f"labels of {name}")
        if before.pixels != after.pixels:
            lines.append(f"pixels of {name}" + (f" (of {after.sampled:,} sampled images)" if after.sampled else ""))
    return lines


def sampling_note(facts: DataFacts) -> str:
    """Say what of a set is not looked at.

    Args:
        facts: Of the set.

    Returns:
        A sentence; empty where all of it is looked at.
    """
    large = [f"{part.sampled:,} of {part.images:,} images of {name}"
             for name, part in (("train", facts.train), ("test", facts.test)) if part.sampled]  # fmt: skip
    return f"changes of the images are noticed in a sample: {' and '.join(large)}" if large else ""


def _class_change(then: Sequence[str], now: Sequence[str]) -> str:
    gone, new = ([name for name in one if name not in set(other)] for one, other in ((then, now), (now, then)))
    words = [f"{what}: {', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''}"
             for what, names in (("gone", gone), ("new", new)) if names]  # fmt: skip
    return f"classes ({len(then):,} then, {len(now):,} now{''.join('; ' + text for text in words)})"


def _chosen(split: Split) -> Tensor:
    """Return which images of a part are looked at."""
    count = len(split)
    size = sum(_sizes(split)) if isinstance(split, FolderSplit) else count * _image_bytes(split)
    if size <= WHOLE_BYTES:
        return torch.arange(count)
    most = max(1, min(_SAMPLE_IMAGES, _SAMPLE_BYTES * count // size))
    return torch.arange(most) * count // most if most < count else torch.arange(count)


def _content(split: Split, chosen: Tensor) -> Iterator[bytes]:
    if isinstance(split, FolderSplit):
        yield "\n".join(map(str, _sizes(split))).encode()
        for index in chosen.tolist():
            yield _file_digest(split.files[index])
        return
    step = max(1, _BLOCK // max(1, _image_bytes(split)))
    yield str((len(split), *split.image_shape)).encode()
    for chunk in torch.split(chosen, step):
        yield _pixels(split, chunk).contiguous().numpy().tobytes()


def _pixels(split: Split, indices: Tensor) -> Tensor:
    """Return images for comparing their content: not through ``batch``, which is for training and scoring."""
    if isinstance(split, ArraySplit):
        return split.pixels(indices)
    if isinstance(split, MemorySplit):
        return split.images[indices].cpu()
    raise TypeError(f"{type(split).__name__} has no pixels in memory or in rows of a file")


def _label_bytes(labels: Tensor) -> tuple[bytes, bytes]:
    return str(tuple(labels.shape)).encode(), labels.cpu().contiguous().numpy().tobytes()


def _image_bytes(split: Split) -> int:
    return math.prod(split.image_shape) if len(split) else 0


def _sizes(split: FolderSplit) -> list[int]:
    return [_read(path, lambda path: path.stat().st_size) for path in split.files]


def _file_digest(path: Path) -> bytes:
    return _read(path, lambda path: hashlib.sha256(path.read_bytes()).digest())


def _read(path: Path, how: Callable[[Path], _T]) -> _T:
    try:
        return how(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore or delete it") from error


def _part_from_json(value: object, name: str) -> PartFacts:
    kinds = {"images": int, "labels": str, "pixels": str, "sampled": int}
    if not isinstance(value, Mapping) or set(value) != set(kinds):
        raise ValueError(f"`{name}` must have {', '.join(kinds)}")
    if any(type(value[key]) is not kind for key, kind in kinds.items()):
        raise ValueError(f"`{name}` has a value of another type")
    return PartFacts(**value)
