"""Decode image files of a few formats; anything else is rejected with an error that names the file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.sets import jpeg, resampling
from qkd.data.sets.fitting import Fit
from qkd.image_size import ImageSize, height_width
from qkd.units import counted

# suffix -> Pillow's name of the format; no other decoder is used (the EPS decoder, for example, starts Ghostscript)
FORMATS = {
    ".bmp": "BMP", ".gif": "GIF", ".jpeg": "JPEG", ".jpg": "JPEG", ".pgm": "PPM", ".png": "PNG", ".ppm": "PPM",
    ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
IMAGE_SUFFIXES = tuple(FORMATS)
MOST_PIXELS = 89_478_485  # in a file and after resizing: where Pillow starts to warn of decompression bombs
CROP = Fit()
DIVISORS = (1, 2, 4, 8)  # of the sides; JPEG decoders have fast transforms for them
Piece = Callable[[tuple[int, int]], tuple[int, int, int, int]]  # width, height -> left, top, width, height
_EXPLAINED = 5  # of the files of a set that cannot be read
_NAMED = 20
_ENDS = {jpeg.START: b"\xff\xd9", b"\x89PNG": b"\0\0\0\0IEND\xaeB`\x82", b"GIF8": b"\0;"}  # first bytes -> last
_END = 12  # bytes of the longest of them
_GRAY_MODES = frozenset({"1", "L", "LA"})
_COLOR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


@dataclass(frozen=True)
class Header:
    """The header of an image file, read without decoding the image."""

    width: int
    height: int
    is_gray: bool


def read_header(path: Path) -> Header:
    """Read the header of an image file.

    Raises:
        DataError: If it is not an image in a supported format, is too large, or does not have 8 bits per channel.
    """
    with _opened(path) as file:
        mode, (width, height) = file.mode, file.size
    if mode not in _GRAY_MODES | _COLOR_MODES:
        raise DataError(
            f"{path}: its pixels have mode {mode!r}, not 8 bits per channel; convert it to 8-bit gray or RGB"
        )
    return Header(width, height, mode in _GRAY_MODES)


def is_image(path: Path) -> bool:
    """Return whether the content of a file begins like an image in a supported format, whatever its suffix."""
    try:
        if not path.is_file():  # opening a pipe would wait
            return False
        with _opened(path):
            return True
    except (DataError, OSError):
        return False


def require_whole(path: Path) -> None:
    """Raise if an image file is cut off.

    The end of the file tells, in JPEG, PNG, GIF and WebP. Only where it does not, and in formats that have no end, is
    the image decoded. Damage in the middle of a file is not looked for.

    Args:
        path: The file.

    Raises:
        DataError: If it cannot be decoded.
    """
    try:
        with path.open("rb") as file:
            start, size = file.read(_END), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END))
            if _is_ended(start, file.read(), size):
                return
            if start.startswith(jpeg.START):  # phones write more behind the image: a second one, a film
                file.seek(0)
                if jpeg.has_end(file.read()):
                    return
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore or delete it") from error
    with _opened(path) as image:
        image.load()


def _is_ended(start: bytes, end: bytes, size: int) -> bool:
    if start[:4] == b"RIFF":
        return 8 + int.from_bytes(start[4:8], "little") <= size
    return any(start.startswith(first) and end.endswith(last) for first, last in _ENDS.items())


def read_headers(paths: Iterable[Path]) -> list[Header]:
    """Read the headers of all image files of a set, and look at their ends (:func:`require_whole`).

    Raises:
        DataError: If any of them cannot be read: why, for the first ones, and the names of others.
    """
    headers: list[Header] = []
    bad: list[str] = []
    others: list[str] = []
    for path in paths:
        try:
            headers.append(read_header(path))
            require_whole(path)
        except DataError as error:
            if len(bad) < _EXPLAINED:
                bad.append(str(error))
            else:
                others.append(ascii(str(path)))
    if others:
        more = f", and {len(others) - _NAMED:,} more" if len(others) > _NAMED else ""
        bad.append(f"{counted(len(others), 'more file')} cannot be read: {', '.join(others[:_NAMED])}{more}")
    if bad:
        raise DataError("\n".join(bad))
    return headers


def decode(path: Path, *, channels: int, image_size: ImageSize, fit: Fit = CROP) -> Tensor:
    """Decode an image file to uint8 ``[channels, height, width]``.

    Args:
        path: The file.
        channels: 1 (gray) or 3 (red, green, blue).
        image_size: Target size in pixels.
        fit: How the image is resized to it.

    Raises:
        DataError: If the file cannot be decoded.
    """
    made = torch.empty((channels, *height_width(image_size)), dtype=torch.uint8)
    decode_into(made, path, fit)
    return made


def decode_into(
    out: Tensor, path: Path, fit: Fit = CROP, piece: Piece | None = None, *, is_reduced: bool = False
) -> None:
    """Decode an image file into planes.

    Args:
        out: uint8, contiguous, shape ``[channels, height, width]``; 1 (gray) or 3 channels (red, green, blue).
        path: The file.
        fit: How the image is resized to the size of ``out``.
        piece: Maps an image size to the crop (left, top, width, height) that is stretched to the target size, instead
            of the rule of ``fit``.
        is_reduced: Whether a JPEG file is decoded at a half, a quarter or an eighth of its sides if that is at least
            the target size. This is faster, but gives different pixels.

    Raises:
        DataError: If the file cannot be decoded.
    """
    data = _jpeg_data(path)
    frame = None if data is None else jpeg.frame_of(data)
    pixels, divisor = None, 1
    if data is not None and frame is not None:
        refuse_sizes(path, (frame.width, frame.height), (out.shape[2], out.shape[1]), fit)
        divisor = _divisor((frame.width, frame.height), out, fit, piece) if is_reduced else 1
        is_same_form = frame.channels == 1 or len(out) == 3  # gray as Pillow converts it, not JPEG's luma
        pixels = jpeg.pixels_of(data, frame) if divisor == 1 and is_same_form else None
    if pixels is None:
        pixels = _pillow_pixels(path, out, fit, divisor)
    if piece is not None:
        left, top, width, height = _scaled(piece, (pixels.shape[1], pixels.shape[0]), divisor, frame)
        pixels, fit = pixels[top : top + height, left : left + width], Fit("stretch", None, fit.interpolation)
    fit_into(out, pixels, fit)


def _jpeg_data(path: Path) -> bytearray | None:
    """Return the content of a JPEG file; None if it is not one, or cannot be read, which opening it will report."""
    try:
        with path.open("rb") as file:
            start = file.read(len(jpeg.START))
            return bytearray(start + file.read()) if start == jpeg.START else None
    except OSError:
        return None


def _pillow_pixels(path: Path, out: Tensor, fit: Fit, divisor: int) -> npt.NDArray[np.uint8]:
    with _opened(path) as file:
        refuse_sizes(path, file.size, (out.shape[2], out.shape[1]), fit)
        if divisor > 1:
            file.draft(None, (file.width // divisor, file.height // divisor))
        return np.asarray(file.convert("L" if len(out) == 1 else "RGB"))


def _divisor(size: tuple[int, int], out: Tensor, fit: Fit, piece: Piece | None) -> int:
    """Return the largest divisor at which a file can be decoded without enlarging anything afterward."""
    wanted = out.shape[2], out.shape[1]
    found, needed = (piece(size)[2:], wanted) if piece else (size, fit.placed(size, wanted)[0])
    room = min(found[0] // needed[0], found[1] // needed[1])
    return max(divisor for divisor in DIVISORS if divisor <= max(1, room))


def _scaled(piece: Piece, size: tuple[int, int], divisor: int, frame: jpeg.Frame | None) -> tuple[int, int, int, int]:
    """Return a crop in the coordinates of an image that was decoded at a divisor, rounded to whole pixels."""
    if divisor == 1 or frame is None:
        return piece(size)
    left, top, width, height = piece((frame.width, frame.height))
    edges = [round(edge / divisor) for edge in (left, top, left + width, top + height)]
    left, top = min(edges[0], size[0] - 1), min(edges[1], size[1] - 1)
    return left, top, max(1, min(edges[2], size[0]) - left), max(1, min(edges[3], size[1]) - top)


def fit_into(out: Tensor, pixels: npt.NDArray[np.uint8], fit: Fit) -> None:
    """Resize an image and write it to planes.

    Args:
        out: uint8, contiguous, shape ``[channels, height, width]``.
        pixels: C-contiguous within a row, shape ``[height, width]`` or ``[height, width, channels]``; one channel fills
            all planes, otherwise there are as many as planes.
        fit: How the image is resized to the size of ``out``.
    """
    resize = resampling.load()
    wanted = out.shape[2], out.shape[1]
    is_gray = pixels.ndim == 2 or pixels.shape[2] == 1
    if resize is None:
        flat = pixels.reshape(pixels.shape[:2]) if is_gray else pixels
        made = np.array(fit(Image.fromarray(flat), wanted), dtype=np.uint8)
        out.copy_(torch.from_numpy(made.reshape(*made.shape[:2], -1)).permute(2, 0, 1))
        return
    size, corner = fit.placed((pixels.shape[1], pixels.shape[0]), wanted)
    target = out[:1] if is_gray else out
    resampling.resize_window(resize, pixels, size, corner, fit.interpolation, target)
    if is_gray:
        out[1:] = target


def refuse_sizes(path: Path, size: tuple[int, int], wanted: tuple[int, int], fit: Fit) -> None:
    """Reject decompression bombs: too many pixels in the file, after resizing, or when only columns are resized.

    Args:
        path: The file.
        size: Its width and height.
        wanted: Width and height that it is resized to.
        fit: How.

    Raises:
        DataError: If there are too many.
    """
    for one in (size, *sizes_between(size, wanted, fit)):
        _refuse_bomb(path, one)


def sizes_between(size: tuple[int, int], wanted: tuple[int, int], fit: Fit) -> tuple[tuple[int, int], ...]:
    """Return the sizes ``(width, height)`` that an image has while it is resized: all rows first, then all columns."""
    made = fit.placed(size, wanted)[0]
    return (made[0], size[1]), made


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tags and palettes; real problems raise errors
            with Image.open(path, formats=sorted(set(FORMATS.values()))) as file:
                _refuse_bomb(path, file.size)
                yield file
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: cannot be read as an image: its content is not {', '.join(sorted(set(FORMATS.values())))}, "
            "whatever its name says; replace or delete it"
        ) from error
    except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace or delete it") from error


def _refuse_bomb(path: Path, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise DataError(
            f"{path}: cannot be read as an image: {size[0]:,}x{size[1]:,} pixels to decode or resize exceed the limit "
            f"of {MOST_PIXELS:,}; scale it down, or replace or delete it"
        )
