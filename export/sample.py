"""Images with expected logits that travel with a model, so that a device can be checked on the spot."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.runtime import open_session
from export.writing import checked_target, write_whole

Array = npt.NDArray[np.float32]
LONGEST_PREPARED = 2000  # characters; it is shown in errors
PREPARED = "prepared"  # entry that says how the images were resized and normalized
HASH = "sha256."  # prefix of an entry of the hash of a model's file; the model's name follows
LOGITS = "logits."  # prefix of an entry of expected logits; the model's name follows
SAMPLE_BYTES = 16 << 20  # of images; a board's link transfers this in seconds
SHA256 = re.compile("[0-9a-f]{64}")
CHUNK = 16  # images per run


@dataclass(frozen=True)
class Sample:
    """Images, their labels, and the logits that models should give.

    Args:
        images: Normalized, float32 ``[images, channels, height, width]``.
        labels: int64 ``[images]``, or None.
        logits: Name of a model -> expected logits, float32 ``[images, classes]``.
        prepared: How the images were resized and normalized, as
            :func:`export.storage.preprocessing.prepared_text` writes it; empty if unknown.
        files: Name of a model -> SHA-256 of the file whose logits these are; models of which it is unknown are left
            out.

    Raises:
        ValueError: If shapes do not fit, there are no images, a value is not finite, ``prepared`` is no line, or one of
            ``files`` is no SHA-256.
    """

    images: Array
    labels: npt.NDArray[np.int64] | None = None
    logits: Mapping[str, Array] = field(default_factory=dict)
    prepared: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images.ndim < 2 or not len(self.images) or self.images.dtype != np.float32:
            raise ValueError(f"images must be float32 [images, ...], got {self.images.dtype} {self.images.shape}")
        if not np.isfinite(self.images).all():
            raise ValueError("an image holds a value that is not finite")
        if self.labels is not None and (
            self.labels.shape != self.images.shape[:1] or self.labels.dtype.kind not in "iu"
        ):
            raise ValueError(f"labels must be {len(self.images)} integers, got {self.labels.dtype} {self.labels.shape}")
        if len(self.prepared) > LONGEST_PREPARED or not self.prepared.isprintable():
            raise ValueError(f"prepared must be a line of at most {LONGEST_PREPARED:,} characters")
        for name, sha256 in self.files.items():
            if not SHA256.fullmatch(sha256):
                raise ValueError(f"files: {name} must be a SHA-256 in hexadecimal digits")
        for name, values in self.logits.items():
            if values.ndim != 2 or len(values) != len(self.images) or values.dtype.kind != "f":
                raise ValueError(f"logits of {name} must be float [{len(self.images)}, classes], got {values.shape}")


def sample_size(image_shape: tuple[int, ...], wanted: int = 256) -> int:
    """Return how many images of a shape fit into a sample: as many as wanted, within ``SAMPLE_BYTES``.

    Args:
        image_shape: Shape of one image: ``(channels, height, width)``.
        wanted: Number of images, at least 1.

    Returns:
        Number of images, from 1 to ``wanted``.
    """
    return max(1, min(wanted, SAMPLE_BYTES // (4 * int(np.prod(image_shape)))))


def read_sample(path: str | PathLike[str]) -> Sample:
    """Read a sample from an npz file: ``images`` and, if present, ``labels``, ``logits.NAME`` and ``sha256.NAME``.

    Args:
        path: An npz file that ``write_sample`` or ``np.savez`` wrote.

    Returns:
        The images, and the labels and logits if the file has them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an npz file, holds pickled objects, or its arrays do not fit each other.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no sample file at {path}")
    try:
        # opened here: numpy leaves its own handle open when the file is damaged
        with Path(path).open("rb") as stream:
            content = np.load(stream, allow_pickle=False)
            if not hasattr(content, "files"):
                raise ValueError("it is a single array")
            arrays = {key: content[key] for key in content.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an npz file of plain arrays ({error}); np.savez writes one") from error
    if "images" not in arrays:
        raise ValueError(f"{path}: it has no array `images`, only {', '.join(arrays) or 'nothing'}")
    logits = {key.removeprefix(LOGITS): value for key, value in arrays.items() if key.startswith(LOGITS)}
    hashes = {key.removeprefix(HASH): str(value) for key, value in arrays.items() if key.startswith(HASH)}
    try:
        return Sample(arrays["images"], arrays.get("labels"), logits, str(arrays.get(PREPARED, "")), hashes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_sample(path: str | PathLike[str], sample: Sample) -> Path:
    """Write a sample as an npz file, whole or not at all.

    Args:
        path: The file; replaced if it exists. Its folder must exist.
        sample: What to write.

    Returns:
        The path.

    Raises:
        ExportError: If the path is a folder, its folder does not exist, or the file cannot be written.
    """
    target = checked_target(path)
    write_whole(target, sample_bytes(sample))
    return target


def sample_bytes(sample: Sample) -> bytes:
    """Return a sample as the bytes of an npz file; equal samples give equal bytes."""
    arrays: dict[str, Any] = {
        "images": sample.images,
        **{LOGITS + name: values for name, values in sample.logits.items()},
        **{HASH + name: np.array(sha256) for name, sha256 in sample.files.items()},
    }
    if sample.labels is not None:
        arrays["labels"] = sample.labels.astype(np.int64)
    if sample.prepared:
        arrays[PREPARED] = np.array(sample.prepared)
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def expect(sample: Sample, paths: Mapping[str, str | PathLike[str]]) -> Sample:
    """Return the sample with missing logits filled in, as this machine computes them from the files.

    Optimizations are off: float arithmetic between quantizers, as the file specifies.

    Args:
        sample: The images.
        paths: Name of a model -> its file, with one input.

    Returns:
        The same images and labels, with logits, float32 ``[images, classes]``, for the models in ``paths`` only.

    Raises:
        ValueError: If a file cannot be loaded or does not take these images.
        ImportError: If onnxruntime is missing.
        FileNotFoundError: If a file does not exist.
    """
    missing = {name: path for name, path in paths.items() if name not in sample.logits}
    found = {name: _compute(Path(path), sample.images) for name, path in missing.items()}
    kept = {name: values for name, values in sample.logits.items() if name in paths}
    return replace(sample, logits={**kept, **found})


def _compute(path: Path, images: Array) -> Array:
    session = open_session(path, optimize=False)
    first, *others = session.get_inputs()
    fixed = first.shape[0]
    if others or list(first.shape[1:]) != list(images.shape[1:]):
        raise ValueError(f"{path}: it takes {first.shape}, but the sample's images are {images.shape}")
    size = fixed if isinstance(fixed, int) else CHUNK
    padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % size, 0)])
    name = session.get_outputs()[0].name
    parts = [session.run([name], {first.name: padded[at : at + size]})[0] for at in range(0, len(images), size)]
    return np.concatenate(parts)[: len(images)].astype(np.float32)
