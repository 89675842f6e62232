"""Classify images with an exported ONNX file, using only the metadata in the file.

It needs only the standard library, numpy and onnxruntime (and Pillow to read JPEG, PNG and other image files, but not
arrays in .npy files), runs on Python 3.8 and later, and imports nothing from the
toolkit, which uses it, too.

    python predict.py photo.jpg another.png --model student.onnx --top 3
    python predict.py pixels.npy --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names; what the toolkit trains on
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of Pillow: at most 8 bits per channel
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # in a folder
MOST_PIXELS = 89478485  # per image, before and after resizing
GRAY, COLOR = "L", "RGB"
TOP = 5
BATCH = 32  # images per run
FACTS = ("preprocess", "input_layout", "input_size", "input_mean", "input_std", "resize", "classes")
RULES = ("crop", "stretch", "pad")
OUTPUTS = ("logits", "probabilities", "log_probabilities")


class InputError(ValueError):
    """A file or an image that cannot be used; the message says why."""


class Model:
    """An exported file, ready to classify.

    Args:
        path: The ONNX file.
        threads: onnxruntime's threads.

    Raises:
        InputError: If there is no such file, onnxruntime cannot load it, or its metadata does not describe its input.
    """

    def __init__(self, path: str, threads: int = 1) -> None:
        import onnxruntime

        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise InputError(
                f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({str(error)[:200]}); if that version "
                "is too old, `qkd export RUN --for onnxruntime==VERSION` writes a file that it can load"
            ) from error
        self.path = path
        self.facts = read_facts(dict(self.session.get_modelmeta().custom_metadata_map), path)
        self.input, self.output = self.session.get_inputs()[0], self.session.get_outputs()[0].name

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty if the file does not include them."""
        return list(self.facts["classes"])

    def scores(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the file's output for images: float32 ``[images, classes]``.

        Args:
            pixels: uint8 ``[images, height, width, channels]``.
        """
        given, fixed = as_fed(pixels, self.facts), self.input.shape[0]
        size = fixed if isinstance(fixed, int) else BATCH
        missing = -len(given) % size if isinstance(fixed, int) else 0
        padded = np.concatenate([given, np.repeat(given[-1:], missing, 0)])
        parts = [self.session.run([self.output], {self.input.name: padded[at : at + size]})[0]
                 for at in range(0, len(given), size)]  # fmt: skip
        return np.asarray(np.concatenate(parts)[: len(given)], np.float32)

    def probabilities(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the probability of each class: float64 ``[images, classes]``; each row sums to 1."""
        scores = self.scores(pixels).astype(np.float64)
        if self.facts["output"] == "probabilities":
            return np.asarray(scores)
        powers = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))

    def name(self, label: int) -> str:
        """Return the name of a class, or its number if the file does not name it."""
        return self.classes[label] if label < len(self.classes) else str(label)


def read_facts(said: dict[str, str], path: str) -> dict[str, Any]:
    """Return what a file's metadata says about its input, checked, since the file may come from anyone.

    Args:
        said: Its metadata.
        path: Shown in error messages.

    Raises:
        InputError: If it says nothing, or something that the toolkit does not write.
    """
    if "input_mean" not in said:
        raise InputError(
            f"{path}: it does not say how images become its input (metadata input_mean, input_std, ...); export it "
            "again with a version of the toolkit that writes this metadata"
        )
    try:
        facts = {key: json.loads(said[key]) for key in FACTS}
        facts["output"] = json.loads(said.get("output", '"logits"'))
        mean, std, size = facts["input_mean"], facts["input_std"], facts["input_size"]
        right = (
            len(mean) == len(std) in (1, 3)
            and all(isinstance(one, (int, float)) and abs(one) < 1e30 for one in mean + std)
            and min(std) > 0
            and len(size) == 2
            and all(isinstance(side, int) and side > 0 and side * side <= MOST_PIXELS for side in size)
            and all(isinstance(name, str) for name in facts["classes"])
            and facts["preprocess"] in ("outside", "inside")
            and facts["input_layout"] in ("nchw", "nhwc")
            and facts["output"] in OUTPUTS
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: the metadata about its input is damaged ({error!r}); export it again") from error
    if not right:
        raise InputError(f"{path}: the metadata about its input is not what the toolkit writes; export it again")
    return facts


def as_fed(pixels: np.ndarray[Any, Any], facts: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return images as the file takes them: uint8 if it normalizes them itself, otherwise float32.

    Args:
        pixels: uint8 ``[images, height, width, channels]``.
        facts: From :func:`read_facts`.
    """
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    if facts["preprocess"] == "inside":
        return np.asarray(pixels if facts["input_layout"] == "nhwc" else planes)
    scale = np.array([1 / (255 * std) for std in facts["input_std"]], np.float32).reshape(-1, 1, 1)
    pairs = zip(facts["input_mean"], facts["input_std"])  # noqa: B905 - Python 3.8 has no `strict`
    shift = np.array([mean / std for mean, std in pairs], np.float32)
    return np.asarray(planes.astype(np.float32) * scale - shift.reshape(-1, 1, 1), np.float32)


def read_image(path: str, facts: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the image or images in a file as uint8 ``[images, height, width, channels]`` of the model's input size.

    Args:
        path: An image file (needs Pillow), or a .npy file of uint8 pixels: ``[height, width]``,
            ``[height, width, channels]``, or a batch of either, or ``[images, channels, height, width]``.
        facts: From :func:`read_facts`.

    Raises:
        InputError: If it cannot be read, or is not an image.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    if path.lower().endswith(".npy"):
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{path}: not a NumPy array ({error})") from error
        return from_array(array, facts, path)
    image = open_image(path)
    return fit_image(image, facts, path)[None]


def from_array(array: Any, facts: dict[str, Any], path: str = "the array") -> np.ndarray[Any, Any]:
    """Return an array's images as :func:`read_image` does.

    Raises:
        InputError: If it does not hold uint8 images of the model's size and channels.
    """
    channels, (height, width) = len(facts["input_mean"]), facts["input_size"]
    kind, shape = getattr(array, "dtype", type(array).__name__), getattr(array, "shape", "")
    found = f"{kind} {shape}"
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or not 2 <= array.ndim <= 4 or not array.size:
        raise InputError(f"{path}: needs uint8 pixels [height, width], with channels, or a batch; found {found}")
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    elif array.ndim == 2:
        array = array[None, :, :, None]
    elif array.ndim == 3 and (array.shape[2] in (2, 4) or (array.shape[0] == 3 and array.shape[2] not in (1, 3))):
        raise InputError(
            f"{path}: {found} may be one image or several gray ones; give four axes: [images, height, width, channels] "
            "or [images, channels, height, width], with 1 or 3 channels"
        )
    elif array.ndim == 3:
        array = array[None] if array.shape[2] in (1, 3) and array.shape[1] != 3 else array[..., None]
    if array.shape[3] == 1 and channels == 3:
        array = np.repeat(array, 3, axis=3)
    elif array.shape[3] == 3 and channels == 1:
        array = _gray(array)
    if array.shape[3] != channels:
        raise InputError(f"{path}: the model takes {channels} channel{'' if channels == 1 else 's'}, found {found}")
    if array.shape[1:3] == (height, width):
        return np.ascontiguousarray(array)
    from PIL import Image  # sizes differ: resized like image files

    planes = [Image.fromarray(one[..., 0] if channels == 1 else one) for one in np.ascontiguousarray(array)]
    return np.stack([fit_image(plane, facts, path) for plane in planes])


def _gray(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the gray values of color images, ``[..., 1]``, with the weights and rounding of Pillow (ITU-R 601-2)."""
    red, green, blue = (pixels[..., place].astype(np.uint32) for place in range(3))
    return np.asarray((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16, np.uint8)[..., None]


def open_image(path: str) -> Any:
    """Return an image file, opened by Pillow.

    Raises:
        InputError: If Pillow is missing, or the file is not an image in one of ``FORMATS``, is too large, or has more
            than 8 bits per channel.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(f"{path}: image files need Pillow (pip install pillow); .npy files do not") from error
    try:
        image = Image.open(path, formats=FORMATS)
        if image.size[0] * image.size[1] > MOST_PIXELS:
            raise InputError(f"{path}: {image.size[0]}x{image.size[1]} is more than {MOST_PIXELS} pixels")
        if image.mode not in MODES:  # Pillow would clip 16 bits to white
            image.close()
            raise InputError(
                f"{path}: its pixels have mode {image.mode!r}, not 8 bits per channel; convert it to 8-bit gray or RGB"
            )
        image.load()
    except InputError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read as an image ({reason})") from error
    return image


def fit_image(image: Any, facts: dict[str, Any], path: str) -> np.ndarray[Any, Any]:
    """Return an opened image as uint8 ``[height, width, channels]``, resized by the model's rule.

    Raises:
        InputError: If the rule is unknown, or the resized image would be too large.
    """
    image = image.convert(GRAY if len(facts["input_mean"]) == 1 else COLOR)
    height, width = facts["input_size"]
    if image.size != (width, height) or _rule_of(facts["resize"], path)[1]:  # crop:256 is for images of any size
        image = _fitted(image, (width, height), facts["resize"], path)
    pixels = np.asarray(image, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _fitted(image: Any, wanted: tuple[int, int], name: str, path: str) -> Any:
    """Resize by a rule such as ``crop``, ``crop:256``, ``stretch:bicubic`` or ``pad``; sizes are width and height."""
    from PIL import Image

    rule, shorter, how = _rule_of(name, path)
    factors = [whole / part for whole, part in zip(wanted, image.size)]  # noqa: B905 - Python 3.8 has no `strict`
    factor = min(factors) if rule == "pad" else max(factors)
    if rule == "crop" and shorter:
        factor *= max(1.0, shorter / min(wanted))
    size = tuple(max(1, round(side * factor)) for side in image.size)
    if rule == "stretch":
        size = wanted
    elif shorter and wanted[0] == wanted[1]:  # as torchvision's Resize rounds
        size = tuple(int(max(shorter, wanted[0]) * side / min(image.size)) for side in image.size)
    else:  # rounding must not leave a pixel uncovered, or one too many
        bound = min if rule == "pad" else max
        size = bound(wanted[0], size[0]), bound(wanted[1], size[1])
    if size[0] * size[1] > MOST_PIXELS:
        raise InputError(f"{path}: resizing to {size[0]}x{size[1]} makes more than {MOST_PIXELS} pixels")
    if size[0] * image.size[1] > MOST_PIXELS:
        raise InputError(f"{path}: resizing {image.size[0]}x{image.size[1]} to {size[0]} columns makes too many pixels")
    for step in ((size[0], image.size[1]), size):  # columns, then rows: Pillow versions differ in the order of one call
        image = image.resize(step, getattr(getattr(Image, "Resampling", Image), how.upper()))
    if rule == "pad":
        ground = Image.new(image.mode, wanted)
        ground.paste(image, ((wanted[0] - size[0]) // 2, (wanted[1] - size[1]) // 2))
        return ground
    halves = [(whole - kept) / 2 for whole, kept in zip(size, wanted)]  # noqa: B905
    left, top = (round(half) if shorter else int(half) for half in halves)  # to the even pixel, as CenterCrop does
    return image.crop((left, top, left + wanted[0], top + wanted[1]))


def _rule_of(name: str, path: str) -> tuple[str, int, str]:
    """Return rule, shorter side (0: the smallest that covers the size) and interpolation of a rule's name.

    ``none`` means that training saw only one size; other sizes are cropped as folders of images are by default.
    """
    rule, *rest = ["crop"] if name == "none" else str(name).split(":")
    shorter, how = 0, "bilinear"
    for part in rest:
        if part.isdigit() and len(part) < 6 and rule == "crop":
            shorter = int(part)
        elif part in ("bilinear", "bicubic"):
            how = part
        else:
            rule = ""
    if rule not in RULES:
        raise InputError(f"{path}: the model's resize rule {name!r} is unknown to this version")
    return rule, shorter, how


def files_of(path: str) -> list[str]:
    """Return the files that a path refers to: for a folder, the image files in it, sorted by name; otherwise, the path.

    Raises:
        InputError: If a folder contains no image files.
    """
    if not os.path.isdir(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if name.lower().endswith(ENDINGS) and not name.startswith("."))
    files = [file for file in (os.path.join(path, name) for name in names) if os.path.isfile(file)]
    if not files:
        raise InputError(f"{path}: the folder has no image files directly in it ({', '.join(ENDINGS)})")
    return files


def classify(
    model: Model, paths: Sequence[str], top: int = TOP, unread: list[str] | None = None
) -> list[dict[str, Any]]:
    """Return the most likely classes of each image with their probabilities.

    Args:
        model: The exported file.
        paths: Image files, folders of them, and .npy files of one or more images.
        top: How many classes per image.
        unread: Takes what is wrong with each image that cannot be read; the others are classified. If omitted, the
            first such image is an error.

    Raises:
        InputError: If an image cannot be read.
    """
    found = []
    for path in [file for one in paths for file in files_of(one)]:
        try:
            probabilities = model.probabilities(read_image(path, model.facts))
        except InputError as error:
            if unread is None:
                raise
            unread.append(str(error))
            continue
        for index, row in enumerate(probabilities):
            best = np.argsort(-row, kind="stable")[:top]
            name = path if len(probabilities) == 1 else f"{path}[{index}]"
            predictions = [{"class": model.name(int(one)), "label": int(one), "probability": float(row[one])}
                           for one in best]  # fmt: skip
            found.append({"image": name, "predictions": predictions})
    return found


def printable(text: str) -> str:
    """Return text with control characters, which a terminal would obey, escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Classify the images named by the arguments, and return the exit code."""
    parser = argparse.ArgumentParser(description="Classify images with an exported ONNX file.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders of them, .npy of uint8 pixels")
    default = os.path.join(os.path.dirname(os.path.abspath(__file__)), "student.onnx")
    parser.add_argument("--model", default=default, metavar="FILE", help="the ONNX file (student.onnx next to this)")
    parser.add_argument("--top", type=int, default=TOP, metavar="N", help=f"classes per image ({TOP})")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(arguments)
    unread: list[str] = []
    try:
        found = classify(Model(args.model), args.images, max(1, args.top), unread)
    except (InputError, ImportError) as error:
        print(f"predict: {printable(str(error))}", file=sys.stderr)
        return 2
    for text in unread:
        print(f"predict: {printable(text)}", file=sys.stderr)
    if args.json:
        print(json.dumps(found, indent=2))
        return 2 if unread else 0
    for entry in found:
        print(printable(entry["image"]))
        for one in entry["predictions"]:
            print(f"  {100 * one['probability']:6.2f} %  {printable(one['class'])}")
    return 2 if unread else 0


if __name__ == "__main__":
    sys.exit(main())
