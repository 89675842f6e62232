"""JPEG files decoded without Pillow: the same pixels, the same refusals."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qkd.data.errors import DataError
from qkd.data.sets import jpeg
from qkd.data.sets.images import decode
from qkd.data.sets.jpeg import Frame, decoder, frame_of, pixels_of


@pytest.fixture(autouse=True)
def _asks_again() -> Iterator[None]:
    yield
    decoder.cache_clear()


def picture(height: int = 45, width: int = 61) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **settings: object) -> bytearray:
    file = io.BytesIO()
    image.save(file, "JPEG", **settings)
    return bytearray(file.getvalue())


def without(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    """Leave only the decoders that are not named."""
    monkeypatch.setattr(jpeg, "DECODERS", {name: find for name, find in jpeg.DECODERS.items() if name not in names})
    decoder.cache_clear()


@pytest.mark.parametrize("name", jpeg.DECODERS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("settings", [
    {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"quality": 20},
    {"keep_rgb": True}, {"comment": b"\xff\xc0" * 9, "icc_profile": b"x" * 70000},
], ids=str)  # fmt: skip
def test_pixels_are_those_of_pillow(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: str, settings: dict[str, object]
) -> None:
    without(monkeypatch, tuple(set(jpeg.DECODERS) - {name}))
    if decoder() is None:
        pytest.skip(f"{name} is not installed")
    data = encoded(picture().convert(mode), **settings)
    frame = frame_of(data)
    assert frame == Frame(61, 45, len(mode) if mode == "RGB" else 1)
    found = pixels_of(data, frame)
    assert found is not None
    assert np.array_equal(found.squeeze(), np.array(Image.open(io.BytesIO(data))))


def test_whatever_is_not_plain_is_left_to_pillow() -> None:
    whole = encoded(picture())
    start = whole.index(b"\xff\xc0")
    twelve_bits, no_height, arithmetic = (bytearray(whole) for _ in range(3))
    twelve_bits[start + 4], arithmetic[start + 1] = 12, 0xC9
    no_height[start + 5 : start + 7] = b"\0\0"
    png = io.BytesIO()
    picture().save(png, "PNG")
    others = [encoded(picture().convert("CMYK")), twelve_bits, no_height, arithmetic, png.getvalue(), b"", whole[:30]]
    assert [frame_of(data) for data in others] == [None] * len(others)
    padded = whole[:2] + b"\xff\xff" + whole[2:]
    assert frame_of(padded) == frame_of(whole)


def test_a_decoder_with_other_pixels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def almost() -> jpeg.Decoder:
        def decode(data: bytearray, channels: int) -> np.ndarray:
            made = np.array(Image.open(io.BytesIO(data)))
            made.flat[5] ^= 1
            return made.reshape(*made.shape[:2], channels)

        return decode

    monkeypatch.setattr(jpeg, "DECODERS", {"almost": almost})
    decoder.cache_clear()
    assert decoder() is None


def test_a_torchvision_that_lost_its_decoder_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> jpeg.Decoder:
        raise AttributeError("'_OpNamespace' 'image' object has no attribute 'decode_jpeg'")

    monkeypatch.setattr(jpeg, "DECODERS", {"torchvision": gone})
    decoder.cache_clear()
    assert decoder() is None and pixels_of(bytearray(encoded(picture())), Frame(61, 45, 3)) is None


def test_damaged_files_give_what_they_give_in_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = encoded(picture()), tmp_path / "a.jpg"
    rng = np.random.default_rng(1)
    damaged = [whole[:end] for end in range(0, len(whole), len(whole) // 23)]
    for _ in range(12):
        altered = bytearray(whole)
        altered[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        damaged.append(altered)

    def outcome() -> torch.Tensor | str:
        try:
            return decode(path, channels=3, image_size=24)
        except DataError as error:
            return str(error)

    for number, data in enumerate(damaged):
        path.write_bytes(data)
        ours = outcome()
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "decoder", lambda: None)
            theirs = outcome()
        if isinstance(ours, str) or isinstance(theirs, str):
            assert ours == theirs, number
        else:
            assert torch.equal(ours, theirs), number
    assert outcome() is not None


def test_a_color_file_is_read_as_gray_as_pillow_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(picture(24, 24)))
    gray = torch.from_numpy(np.array(Image.open(path).convert("L"))).unsqueeze(0)
    assert torch.equal(decode(path, channels=1, image_size=24), gray)


def test_a_gray_file_is_read_as_color_in_three_equal_planes(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(picture(24, 24).convert("L")))
    planes = torch.from_numpy(np.array(Image.open(path))).expand(3, -1, -1)
    assert torch.equal(decode(path, channels=3, image_size=24), planes)
