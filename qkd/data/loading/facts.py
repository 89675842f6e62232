"""The identity of a data set: a few hashes that a run keeps in order to notice changed images or labels."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.sets import ArraySplit, FolderSplit
from qkd.data.splits import MemorySplit, Parts, Split

WHOLE_BYTES = 1 << 29  # parts of up to 512 MiB are hashed whole, which takes a third of a second
_SAMPLE_BYTES = 1 << 28  # larger parts: total bytes of evenly spaced images
_SAMPLE_IMAGES = 4096  # and at most this many, because each is a disk seek
_BLOCK = 1 << 20
_T = TypeVar("_T")
Digest: TypeAlias = Callable[[Path], bytes]
_NAMED = 5  # classes to name in a message


@dataclass(frozen=True)
class PartFacts:
    """One part of a data set.

    Args:
        images: Number of images.
        labels: SHA-256 of its labels in order.
        pixels: SHA-256 of its images in order: their pixels, or the bytes of the files plus the sizes of all files.
        sampled: Number of evenly spaced images that ``pixels`` covers; 0 if it covers all of them.
    """

    images: int
    labels: str
    pixels: str
    sampled: int


@dataclass(frozen=True)
class DataFacts:
    """A data set before it is split; equal if nothing that was hashed has changed.

    Args:
        classes: Names.
        train: Its training images.
        test: Its test images.
        fingerprint: One SHA-256 of all that, for use as a single value.
        validation: Number of training images that are the set's own validation part, at the end of ``train``; None in
            records of before this was noted, which are not compared.
    """

    classes: tuple[str, ...]
    train: PartFacts
    test: PartFacts
    fingerprint: str
    validation: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> DataFacts:
        """Read the result of :meth:`to_json`.

        Raises:
            ValueError: If ``value`` does not have that form.
        """
        names = {"classes", "train", "test", "fingerprint"}
        if not isinstance(value, Mapping) or {*value} - {"validation"} != names:
            raise ValueError("must have classes, train, test and fingerprint")
        classes, validation = value["classes"], value.get("validation")
        if validation is not None and (type(validation) is not int or validation < 0):
            raise ValueError("`validation` must be a number of images")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("`classes` must be a list of names")
        parts = {name: _part_from_json(value[name], name) for name in ("train", "test")}
        return cls(tuple(classes), parts["train"], parts["test"], str(value["fingerprint"]), validation)


def facts_of(parts: Parts, hash_file: Digest | None = None) -> DataFacts:
    """Return the facts of a data set.

    Parts of up to 512 MiB are hashed whole. A larger part is sampled: evenly spaced images, 256 MiB in total and at
    most 4,096 of them, plus the sizes of all files if it is a folder. Changes elsewhere go unnoticed.

    Args:
        parts: The set before a validation part is held out. The files of a folder are read but not decoded.
        hash_file: Returns the hash of a file, if the caller keeps hashes; default: :func:`file_digest`.

    Raises:
        DataError: If a file cannot be read.
    """
    whole = hashlib.sha256("\n".join(parts.classes).encode())
    is_whole = True
    found = {}
    for name, split in (("train", parts.train), ("test", parts.test)):
        pixels = hashlib.sha256()
        chosen = _chosen(split)
        for block in _content(split, chosen, hash_file or file_digest):
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
    validation = 0 if parts.val_rows is None else len(parts.val_rows)
    return DataFacts(tuple(parts.classes), found["train"], found["test"], whole.hexdigest(), validation)


def changes(then: DataFacts, now: DataFacts) -> list[str]:
    """Describe what has changed, in words.

    If the number of images or the classes changed, the changes that follow from that are not listed.

    Args:
        then: The earlier facts.
        now: The current facts.

    Returns:
        One line per change; empty if the facts are equal.
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
    if None not in (then.validation, now.validation) and then.validation != now.validation:
        lines.append(f"number of validation images ({then.validation:,} then, {now.validation:,} now)")
    return lines


def sampling_note(facts: DataFacts) -> str:
    """Describe which images of a set are not hashed.

    Args:
        facts: The facts of the set.

    Returns:
        A sentence; empty if everything is hashed.
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
    """Return the positions of the images that are hashed."""
    count = len(split)
    size = sum(file_sizes(split)) if isinstance(split, FolderSplit) else count * _image_bytes(split)
    if size <= WHOLE_BYTES:
        return torch.arange(count)
    most = max(1, min(_SAMPLE_IMAGES, _SAMPLE_BYTES * count // size))
    return torch.arange(most) * count // most if most < count else torch.arange(count)


def _content(split: Split, chosen: Tensor, hash_file: Digest) -> Iterator[bytes]:
    if isinstance(split, FolderSplit):
        yield "\n".join(map(str, file_sizes(split))).encode()
        for index in chosen.tolist():
            yield hash_file(split.files[index])
        return
    step = max(1, _BLOCK // max(1, _image_bytes(split)))
    yield str((len(split), *split.image_shape)).encode()
    for chunk in torch.split(chosen, step):
        yield pixels_of(split, chunk).contiguous().numpy().tobytes()


def pixels_of(split: Split, indices: Tensor) -> Tensor:
    """Return images for comparing their content, without ``batch``, which is for training and scoring.

    Args:
        split: A part in memory or in rows of a file; a folder's images are files.
        indices: Positions, int64, shape ``[n]``.
    """
    if isinstance(split, ArraySplit):
        return split.pixels(indices)
    return cast("MemorySplit", split).images[indices].cpu()


def _label_bytes(labels: Tensor) -> tuple[bytes, bytes]:
    return str(tuple(labels.shape)).encode(), labels.cpu().contiguous().numpy().tobytes()


def _image_bytes(split: Split) -> int:
    return math.prod(split.image_shape) if len(split) else 0


def file_sizes(split: FolderSplit) -> list[int]:
    """Return the size of each file in bytes."""
    return [_read(path, lambda path: path.stat().st_size) for path in split.files]


def file_digest(path: Path) -> bytes:
    """Return the SHA-256 of a file's bytes."""
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
