"""Decode image files of a few stated formats; whatever else a file holds, it is refused by its name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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

# suffix -> Pillow's name of the format; no other decoder is asked (that of EPS, for one, starts Ghostscript)
FORMATS = {
    ".bmp": "BMP", ".gif": "GIF", ".jpeg": "JPEG", ".jpg": "JPEG", ".pgm": "PPM", ".png": "PNG", ".ppm": "PPM",
    ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
IMAGE_SUFFIXES = tuple(FORMATS)
MOST_PIXELS = 89_478_485  # of a file, and of what resizing makes of it: where Pillow begins to warn of bombs
CROP = Fit()
_GRAY_MODES = frozenset({"1", "L", "LA"})
_COLOR_MODES = frozenset({"P", "RGB", "RGBA", "CMYK", "YCbCr"})


@dataclass(frozen=True)
class Header:
    """What an image file says of itself before it is decoded."""

    width: int
    height: int
    is_gray: bool


def read_header(path: Path) -> Header:
    """Return what an image file says of itself.

    Raises:
        DataError: If it is no image of a stated format, is too large, or has other than 8 bits a channel.
    """
    with _opened(path) as file:
        mode, (width, height) = file.mode, file.size
    if mode not in _GRAY_MODES | _COLOR_MODES:
        raise DataError(
            f"{path}: its pixels are of mode {mode!r}, not 8 bit a channel; convert it to 8-bit gray or RGB"
        )
    return Header(width, height, mode in _GRAY_MODES)


def decode(path: Path, *, channels: int, image_size: ImageSize, fit: Fit = CROP) -> Tensor:
    """Return an image file as uint8 ``[channels, height, width]``.

    Args:
        path: The file.
        channels: 1 (gray) or 3 (red, green, blue).
        image_size: That it is brought to, in pixels.
        fit: How it is brought to that size.

    Raises:
        DataError: If the file cannot be decoded.
    """
    made = torch.empty((channels, *height_width(image_size)), dtype=torch.uint8)
    decode_into(made, path, fit)
    return made


def decode_into(out: Tensor, path: Path, fit: Fit = CROP) -> None:
    """Write an image file to planes.

    Args:
        out: uint8, contiguous, shape ``[channels, height, width]``; 1 (gray) or 3 channels (red, green, blue).
        path: The file.
        fit: How it is brought to that size.

    Raises:
        DataError: If the file cannot be decoded.
    """
    pixels = _jpeg_pixels(path, out, fit)
    if pixels is None:
        with _opened(path) as file:
            _refuse_sizes(path, file.size, out, fit)
            pixels = np.asarray(file.convert("L" if len(out) == 1 else "RGB"))
    resize = resampling.load()
    wanted = out.shape[2], out.shape[1]
    if resize is None:
        made = np.array(fit(Image.fromarray(pixels.squeeze()), wanted), dtype=np.uint8)
        out.copy_(torch.from_numpy(made.reshape(*made.shape[:2], -1)).permute(2, 0, 1))
        return
    is_gray = pixels.ndim == 2 or pixels.shape[2] == 1
    size, corner = fit.placed((pixels.shape[1], pixels.shape[0]), wanted)
    target = out[:1] if is_gray else out
    resampling.resize_window(resize, pixels, size, corner, fit.interpolation, target)
    if is_gray:
        out[1:] = target


def prepare_decoding() -> None:
    """Load and compile, now, what decoding needs: before worker processes would do it each."""
    resampling.load()
    jpeg.decoder()


def _jpeg_pixels(path: Path, out: Tensor, fit: Fit) -> npt.NDArray[np.uint8] | None:
    """Return the pixels of a plain JPEG file; None where Pillow is to decode it, or to say what is wrong."""
    try:
        data = bytearray(path.read_bytes())
    except OSError:
        return None
    frame = jpeg.frame_of(data)
    if frame is None or (frame.channels == 3 and len(out) == 1):  # to gray as Pillow converts, not as JPEG stores it
        return None
    _refuse_sizes(path, (frame.width, frame.height), out, fit)
    return jpeg.pixels_of(data, frame)


def _refuse_sizes(path: Path, size: tuple[int, int], out: Tensor, fit: Fit) -> None:
    """Refuse bombs: too many pixels in the file, resized, or on the way there, when only columns are done."""
    resized = fit.resized(size, (out.shape[2], out.shape[1]))
    for one in (size, resized, (resized[0], size[1])):
        _refuse_bomb(path, one)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on tags and palettes; what matters is an error
            with Image.open(path, formats=sorted(set(FORMATS.values()))) as file:
                _refuse_bomb(path, file.size)
                yield file
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: cannot be read as an image: it is none of {', '.join(sorted(set(FORMATS.values())))}, whatever "
            "its name says; replace or delete it"
        ) from error
    except Exception as error:  # damaged files make Pillow's decoders raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace or delete it") from error


def _refuse_bomb(path: Path, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise DataError(
            f"{path}: cannot be read as an image: {size[0]:,}x{size[1]:,} pixels to decode or resize are more than "
            f"{MOST_PIXELS:,}; scale it down, or replace or delete it"
        )
