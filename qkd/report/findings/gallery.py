"""Pictures of a report, embedded in the page: the worst mistakes, and training images as augmented by each agent."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qkd.files import DamagedFileError
from qkd.report.findings.confusion import class_name
from qkd.units import percent

CELL = 72  # pixels that a small picture is enlarged to, by an integer factor
MOST_BYTES = 64 * 2**20  # of a file of pictures
ROLES = ("teacher", "student")


@dataclass(frozen=True)
class Shot:
    """A picture with its caption.

    Args:
        data: ``data:`` URL of a PNG.
        width, height: Size in pixels of the page.
        lines: The caption below it.
    """

    data: str
    width: int
    height: int
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Strip:
    """Training images in a row.

    Args:
        title: For example ``epoch 3``.
        shots: The pictures.
    """

    title: str
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Gallery:
    """The pictures of a page.

    Args:
        mistakes: The student's mistakes, most confident first.
        agents: Role -> rows of the same images: unchanged, and at some epochs.
    """

    mistakes: tuple[Shot, ...] = ()
    agents: Mapping[str, tuple[Strip, ...]] = field(default_factory=dict)


def read_gallery(path: Path, classes: Sequence[str]) -> Gallery:
    """Return the pictures that the export stage kept; empty if it kept none.

    Args:
        path: An npz file of uint8 images.
        classes: Class names.

    Raises:
        DamagedFileError: If it is not what the toolkit writes.
    """
    if not path.is_file():
        return Gallery()
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES:,} bytes")
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        return Gallery(
            tuple(_mistakes(arrays, classes)), {role: strips for role in ROLES if (strips := _agent(arrays, role))}
        )
    except (ValueError, OSError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path}: not the pictures of a run ({error}); delete it and export again") from error


def _mistakes(arrays: Mapping[str, npt.NDArray[Any]], classes: Sequence[str]) -> list[Shot]:
    if "mistakes" not in arrays:
        return []
    told = zip(*(arrays[f"mistakes.{key}"] for key in ("labels", "classes", "confidence")), strict=True)
    return [
        _shot(image, (f"{class_name(classes, found)}, {percent(float(share))}", f"shows {class_name(classes, label)}"))
        for image, (label, found, share) in zip(arrays["mistakes"], told, strict=True)
    ]


def _agent(arrays: Mapping[str, npt.NDArray[Any]], role: str) -> tuple[Strip, ...]:
    if f"agent.{role}" not in arrays:
        return ()
    epochs = arrays[f"agent.{role}.epochs"]
    rows = [("unchanged", arrays["samples"])]
    rows += [(f"epoch {int(epoch) + 1}", images) for epoch, images in zip(epochs, arrays[f"agent.{role}"], strict=True)]
    return tuple(Strip(title, tuple(_shot(image) for image in images)) for title, images in rows)


def _shot(image: npt.NDArray[Any], lines: tuple[str, ...] = ()) -> Shot:
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"a picture of {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    factor = max(1, CELL // max(height, width))
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Shot(f"data:image/png;base64,{data}", width * factor, height * factor, lines)
