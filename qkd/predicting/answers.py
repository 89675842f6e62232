"""The output of `qkd predict`: the likeliest classes of each image, as text or plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkd.foreign.shown import shown_line
from qkd.predicting.predict import InputError, Model, classify


@dataclass(frozen=True)
class Answers:
    """Images with their likeliest classes.

    Args:
        model: The file.
        images: For each image ``image`` and ``predictions`` (``class``, ``label``, ``probability``), likeliest first.
        unread: What is wrong with each image that could not be read.
    """

    model: str
    images: Sequence[Mapping[str, Any]]
    unread: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return them as plain data; probabilities are fractions."""
        return {"model": self.model, "images": list(self.images), "unread": list(self.unread)}

    def to_text(self) -> str:
        """Return a block of lines for each image."""
        lines = []
        for entry in self.images:
            lines.append(shown_line(entry["image"]))
            for one in entry["predictions"]:
                lines.append(f"  {100 * one['probability']:6.2f} %  {shown_line(one['class'])}")
        return "\n".join([*lines, *(f"not read: {shown_line(text, 400)}" for text in self.unread)])


def answer(path: Path, images: Sequence[str], *, top: int) -> Answers:
    """Classify images with an exported file.

    Args:
        path: The file; its metadata says how to preprocess images.
        images: Image files, folders of them, or .npy files of uint8 pixels.
        top: Classes per image.

    Raises:
        qkd.predicting.predict.InputError: If the file cannot be used, or no image can be read.
    """
    unread: list[str] = []
    found = classify(Model(str(path)), images, top, unread)
    if not found and unread:
        raise InputError(unread[0])
    return Answers(str(path), found, unread)
