"""Decode JPEG files in two thirds of Pillow's time with simplejpeg or torchvision, if the pixels are the same.

All three wrap libjpeg-turbo, whose transform and upsampling are bit-exact. Builds with another library are detected by
decoding a few pictures both ways once. Anything unusual (four components, 12 bits, arithmetic coding, damaged files) is
left to Pillow, which also reports what is wrong with a file.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Decoder = Callable[[bytearray, int], Pixels]  # file content, channels -> [height, width, channels]
START = b"\xff\xd8\xff"  # of every JPEG file
_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman-coded: baseline, extended, progressive
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # table markers in the range of the frame markers
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """The frame header of a JPEG file."""

    width: int
    height: int
    channels: int


def frame_of(data: bytes | bytearray) -> Frame | None:
    """Return the frame header of a file; None if it is not a JPEG file, or an unusual one.

    Args:
        data: The file, or its beginning.
    """
    at = 2
    while data.startswith(START) and at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _FRAMES:
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            is_plain = data[at + 4] == 8 and data[at + 9] in (1, 3) and height > 0 and width > 0
            return Frame(width, height, data[at + 9]) if is_plain else None
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES or marker in (0x00, 0x01, *range(0xD0, 0xDB)):
            return None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def has_end(data: bytes) -> bool:
    """Return whether a JPEG file holds the end of its image, whatever follows it.

    Args:
        data: The whole file. The end of a thumbnail in its header does not count.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the first scan
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[at : at + 2] == b"\xff\xda" and data.find(b"\xff\xd9", at) >= 0  # within a scan, 0 follows each 0xff


def pixels_of(data: bytearray, frame: Frame) -> Pixels | None:
    """Return the pixels of a JPEG file, ``[height, width, channels]``; None if Pillow should decode it.

    Args:
        data: The file.
        frame: The result of `frame_of`.
    """
    decode = decoder()
    if decode is None:
        return None
    try:
        image = decode(data, frame.channels)
    except (RuntimeError, ValueError):  # damaged; Pillow reports how
        return None
    return image if image.shape == (frame.height, frame.width, frame.channels) else None


@functools.lru_cache(maxsize=1)
def decoder() -> Decoder | None:
    """Return the first installed decoder that gives Pillow's pixels; None if there is none."""
    for name, find in DECODERS.items():
        try:
            decode = find()
            if all(_agrees(decode, channels, how) for channels, how in ((3, 2), (3, 0), (1, 0))):
                return decode
            _log.info("%s is not used to decode JPEG files: its pixels differ from Pillow's", name)
        except (ImportError, OSError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            _log.debug("%s is not used to decode JPEG files: %s", name, error)
    _log.info("JPEG files are decoded by Pillow, which takes 1.5 times as long as simplejpeg (extra `jpeg`)")
    return None


def _simplejpeg() -> Decoder:
    import simplejpeg

    def decode(data: bytearray, channels: int) -> Pixels:
        made: Pixels = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
        return made

    return decode


def _torchvision() -> Decoder:
    import torchvision.io  # noqa: F401 - registers the operation

    # the Python function of the same name has a deprecation warning since torchvision 0.29
    operation, unchanged = torch.ops.image.decode_jpeg, 0

    def decode(data: bytearray, channels: int) -> Pixels:  # noqa: ARG001 - one signature for all
        made = operation(torch.frombuffer(data, dtype=torch.uint8), unchanged, False)  # noqa: FBT003 - an operator's
        return np.ascontiguousarray(made.permute(1, 2, 0).numpy())

    return decode


DECODERS: dict[str, Callable[[], Decoder]] = {"simplejpeg": _simplejpeg, "torchvision": _torchvision}


def _agrees(decode: Decoder, channels: int, subsampling: int) -> bool:
    """Return whether a picture of waves and edges, with odd sides, gets the same pixels as from Pillow."""
    x, y = np.arange(53), np.arange(37)[:, None]
    waves = np.stack([x * 5 + y * 3, x * y, 255 * ((x // 7 + y // 5) % 2)], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(waves if channels == 3 else waves[..., 1])
    picture.save(file, "JPEG", quality=85, subsampling=subsampling)
    theirs = np.array(Image.open(io.BytesIO(file.getvalue()))).reshape(37, 53, channels)
    return np.array_equal(decode(bytearray(file.getvalue()), channels), theirs)
