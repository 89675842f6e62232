"""How to feed a file: mean, std, sizes, resize rule and class names as a value, written into its metadata.

Keys of ``metadata_props`` (:data:`KEYS` says what each holds), every value JSON, so that readers need no toolkit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from export.checks import ExportError
from export.storage.metadata import properties_of, read_property

Place = Literal["outside", "inside"]
Layout = Literal["nchw", "nhwc"]
PLACES: tuple[Place, ...] = ("outside", "inside")
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")
COLORS = {1: "gray", 3: "rgb"}  # channels -> their order
FORMULA = "float32(pixel) * float32(1 / (255 * std)) - float32(mean / std), for each channel"
LARGEST_PIXEL = 255
LEVELS = LARGEST_PIXEL + 1
MOST_CLASSES = 1_000_000
MOST_SIDE = 1 << 16
KEYS = {
    "preprocess": "outside: the file takes normalized float32; inside: it takes uint8 pixels",
    "input_layout": "nchw or nhwc: the order of the input's axes",
    "input_channels": "gray, rgb, or the number of channels",
    "input_size": "[height, width] in pixels",
    "input_range": "[lowest, highest] value of a pixel before it is normalized",
    "input_mean": "mean of each channel, as a fraction of the full range",
    "input_std": "standard deviation of each channel, likewise",
    "input_formula": "how a pixel is normalized, to the bit",
    "resize": "how an image of another size was brought to input_size in training",
    "classes": "names; a logit's position is the position of its class",
}


@dataclass(frozen=True)
class Preprocessing:
    """How images become what a net was trained on.

    Args:
        mean: Per channel, fraction 0..1.
        std: Per channel, fraction, positive.
        image_size: Height and width in pixels.
        classes: Names; a logit's position is the position of its class.
        resize: Name of the rule by which images of other sizes were brought to ``image_size``.
        place: ``outside``: the file takes normalized float32 images; ``inside``: it takes uint8 pixels, and
            normalizes them itself.
        layout: Order of the input's axes; ``nhwc`` only where the place is ``inside``.

    Raises:
        ValueError: If a value is out of its range, or lengths do not fit each other.

    Example:
        >>> Preprocessing((0.5,), (0.25,), (8, 8)).normalize(np.full((1, 1, 8, 8), 255, np.uint8))[0, 0, 0, 0]
        np.float32(2.0)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    classes: tuple[str, ...] = ()
    resize: str = "none"
    place: Place = "outside"
    layout: Layout = "nchw"

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one value per channel, got {self.mean} and {self.std}")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(f"mean must be finite and std positive, got {self.mean} and {self.std}")
        if len(self.image_size) != 2 or not all(0 < side <= MOST_SIDE for side in self.image_size):
            raise ValueError(
                f"image_size must be a height and a width of 1 to {MOST_SIDE} pixels, got {self.image_size}"
            )
        if self.place not in PLACES or self.layout not in LAYOUTS:
            raise ValueError(
                f"preprocess must be {' or '.join(PLACES)} and the layout {' or '.join(LAYOUTS)}, got {self.place!r} "
                f"and {self.layout!r}"
            )
        if self.layout != "nchw" and not self.is_inside:
            raise ValueError("the layout 'nhwc' needs preprocessing inside the file: normalized images are nchw")

    @property
    def is_inside(self) -> bool:
        """Whether the file takes uint8 pixels."""
        return self.place == "inside"

    @property
    def channels(self) -> int:
        """How many channels an image has."""
        return len(self.mean)

    @property
    def factors(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """What pixels are multiplied by, and what is then subtracted: float32 ``[channels, 1, 1]`` each."""
        scale = np.array([1 / (LARGEST_PIXEL * one) for one in self.std], np.float32)
        shift = np.array([mean / one for mean, one in zip(self.mean, self.std, strict=True)], np.float32)
        return scale.reshape(-1, 1, 1), shift.reshape(-1, 1, 1)

    def normalize(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return what the net was trained on, to the bit.

        Args:
            pixels: uint8 ``[batch, channels, height, width]``.

        Returns:
            float32, same shape.

        Raises:
            ValueError: If they are not uint8, or have another number of channels.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != self.channels:
            raise ValueError(
                f"pixels must be uint8 [batch, {self.channels}, height, width], got {pixels.dtype} {pixels.shape}"
            )
        scale, shift = self.factors
        return np.asarray(pixels.astype(np.float32) * scale - shift, np.float32)

    def as_fed(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Return images ``[batch, channels, height, width]`` as the file takes them."""
        if not self.is_inside:
            return self.normalize(pixels)
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if self.layout == "nhwc" else pixels

    def input_shape(self, batch: int | str) -> list[int | str]:
        """Return the shape of the file's input."""
        height, width = self.image_size
        inner = [height, width, self.channels] if self.layout == "nhwc" else [self.channels, height, width]
        return [batch, *inner]

    def check_fits(self, shape: Sequence[int]) -> None:
        """Refuse images whose shape differs from the one given here.

        Args:
            shape: Of a batch of the net's images: ``[batch, channels, height, width]``.

        Raises:
            ExportError: If they differ; the message gives both.
        """
        wanted = (self.channels, *self.image_size)
        if tuple(shape[1:]) != wanted:
            raise ExportError(
                f"preprocessing is for images {list(wanted)} (channels, height, width), but the net takes "
                f"{list(shape[1:])}"
            )

    def properties(self) -> dict[str, str]:
        """Return the entries of a file's metadata."""
        values = {
            "preprocess": self.place,
            "input_layout": self.layout,
            "input_channels": COLORS.get(self.channels, self.channels),
            "input_size": list(self.image_size),
            "input_range": [0, LARGEST_PIXEL],
            "input_mean": list(self.mean),
            "input_std": list(self.std),
            "input_formula": FORMULA,
            "resize": self.resize,
            "classes": list(self.classes),
        }
        return {key: json.dumps(value) for key, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def read_preprocessing(model: onnx.ModelProto) -> Preprocessing | None:
    """Return what a file says about the images that it takes; None if it says nothing.

    Args:
        model: Any ONNX model; its metadata is not trusted.

    Returns:
        The value, checked.

    Raises:
        ValueError: If an entry is missing or not what ``export_onnx`` writes.
    """
    if "input_mean" not in properties_of(model):
        return None
    try:
        mean, std = (tuple(map(_number, read_property(model, f"input_{key}", []))) for key in ("mean", "std"))
        height, width = map(_whole, read_property(model, "input_size", []))
        classes = tuple(map(_name, read_property(model, "classes", [])))[:MOST_CLASSES]
        texts = [read_property(model, key, "") for key in ("resize", "preprocess", "input_layout")]
        return Preprocessing(mean, std, (height, width), classes, texts[0], texts[1], texts[2])
    except (ValueError, TypeError) as error:
        raise ValueError(f"its description of its input is damaged ({error}); export it again") from error


def prepared_text(preprocessing: Preprocessing) -> str:
    """Return how images are resized and normalized, as text that is equal where that is.

    Args:
        preprocessing: Of a file, or of a run.
    """
    mean, std = (", ".join(f"{value:.9g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    height, width = preprocessing.image_size
    return f"{height}x{width}, resized by {preprocessing.resize or 'none'}, mean {mean}, std {std}"


def require_prepared_alike(prepared: str, models: Mapping[str, onnx.ModelProto]) -> None:
    """Raise if prepared images are not what a model takes, as far as they and the models' files say.

    A wrong normalization has the right shape, and gives a wrong accuracy.

    Args:
        prepared: The :func:`prepared_text` of the images; empty if it is unknown.
        models: Name -> model.

    Raises:
        ValueError: If they were prepared for another model, or two models take images that are prepared differently.
    """
    whose, first = "the sample", prepared
    for name, model in models.items():
        said = read_preprocessing(model)
        if said is None:
            continue
        wanted = prepared_text(said)
        if first and wanted != first:
            raise ValueError(
                f"images prepared for {whose} do not fit {name}, so its accuracy would be wrong: {first} there, "
                f"{wanted} here; measure it without the others, with its own sample"
            )
        whose, first = (whose, first) if first else (name, wanted)


def write_properties(model: onnx.ModelProto, entries: dict[str, str]) -> None:
    """Write entries into a file's metadata, in place of those of the same names."""
    left = dict(entries)
    for entry in model.metadata_props:
        entry.value = left.pop(entry.key, entry.value)
    for key, value in left.items():
        model.metadata_props.add(key=key, value=value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"must be a number, found {value!r}")
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, found {value!r}")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a class's name, found {value!r}")
    return value
