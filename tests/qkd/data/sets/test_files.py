"""Files of a folder that are cut off or not read, and names in two spellings: told before anything is trained."""

from __future__ import annotations

import io
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qkd.config import DataConfig
from qkd.data import DataError, Splits, load_splits
from qkd.data.sets import images, jpeg
from qkd.data.sets.images import decode, is_image, require_whole
from qkd.predicting import predict as program

NOISE = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "\u00c4rger") for form in ("NFC", "NFD"))


def encoded(kind: str, seed: int = 0, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.roll(NOISE, seed, 0)).save(file, kind, **options)
    return file.getvalue()


def fill(folder: Path, *names: str, count: int = 4, first: int = 0) -> Path:
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(first, first + count):
            (folder / name / f"{index}.jpg").write_bytes(encoded("JPEG", seed=2 * index + label))
    return folder


def load(folder: Path, **settings: Any) -> Splits:
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3} | settings  # so that nothing is decoded
    return load_splits(DataConfig(name="folder", path=folder, **settings), seed=0)


KINDS = {
    "baseline.jpg": encoded("JPEG"), "progressive.jpg": encoded("JPEG", progressive=True), "x.png": encoded("PNG"),
    "x.gif": encoded("GIF"), "x.webp": encoded("WEBP"), "x.bmp": encoded("BMP"), "x.ppm": encoded("PPM"),
    "x.tif": encoded("TIFF"), "lzw.tif": encoded("TIFF", compression="tiff_lzw"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("keep", [0.4, 0.75, 0.97])
def test_an_image_that_is_cut_off_is_refused_when_the_set_is_loaded(tmp_path: Path, name: str, keep: float) -> None:
    """Otherwise, a test image shows to be damaged once the teacher has been trained."""
    fill(tmp_path / "train", "a", "b")
    fill(tmp_path / "test", "a", "b", first=7)
    whole = KINDS[name]
    path = tmp_path / "test" / "b" / name
    path.write_bytes(whole)
    assert len(load(tmp_path).test) == 9
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=f"{name}: cannot be read as an image.*; replace or delete it"):
        load(tmp_path)


def test_all_files_that_are_cut_off_are_named_at_once(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    for name in ("a/1.jpg", "b/3.jpg"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-300])
    with pytest.raises(DataError, match=r"1\.jpg: cannot be read as an image .*\n.*3\.jpg: cannot be read as an image"):
        load(tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_most_images_are_not_decoded_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Neither are photographs with another image, or a film, behind the first."""
    path = tmp_path / name
    decoded: list[str] = []
    opened = images._opened
    monkeypatch.setattr(images, "_opened", lambda path: (decoded.append(path.name), opened(path))[1])
    behind = [b"", encoded("JPEG", seed=3), b"film" * 9] if name.endswith(".jpg") else [b""]
    for more in behind:
        path.write_bytes(KINDS[name] + more)
        require_whole(path)
    assert bool(decoded) == (path.suffix in (".bmp", ".ppm", ".tif"))


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_image() -> None:
    thumbnail, whole = encoded("JPEG"), encoded("JPEG", seed=1)
    header = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = whole[:2] + header + whole[2:]
    assert jpeg.has_end(data) and jpeg.has_end(data + b"more")
    assert not jpeg.has_end(data[:-2]) and not jpeg.has_end(data[: len(header) + 50]) and not jpeg.has_end(b"")


def test_an_image_that_would_be_too_large_after_resizing_is_refused_at_once(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    Image.fromarray(np.zeros((20_000, 1, 3), np.uint8)).save(tmp_path / "a" / "strip.png")
    with pytest.raises(DataError, match=r"strip\.png: .* pixels to decode or resize exceed the limit"):
        load(tmp_path, image_size=224)


def test_files_in_class_folders_that_are_not_read_are_listed(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    assert load(tmp_path).notes == ()
    for name, content in {
        "one": encoded("JPEG", seed=90), "two.jpg_large": encoded("JPEG", seed=91), "three.PNM": encoded("PPM"),
        "four": b"", "five.npy": b"x", "labels.csv": b"x", "README.md": b"x", "x.xml": b"", "x.JSON": b"",
        "x.txt": b"", "Thumbs.db": b"x",
    }.items():  # fmt: skip
        (tmp_path / "a" / name).write_bytes(content)
    os.mkfifo(tmp_path / "b" / "pipe.x")
    (tmp_path / "b" / "link.x").symlink_to("nowhere")
    assert load(tmp_path).notes == (
        "1 hidden file or folder skipped ('Thumbs.db')",
        "7 other files in class folders not read (2 without a suffix, 2 .x, 1 .jpg_large, 1 .npy, 1 .pnm); 3 of them "
        "are images: rename to .jpg, .png, ...",
    )
    assert not is_image(tmp_path / "b" / "pipe.x")


def test_one_class_may_have_two_spellings_of_its_name(tmp_path: Path) -> None:
    """As after copying one part from a Mac."""
    fill(tmp_path / "train", COMPOSED, "b")
    fill(tmp_path / "test", DECOMPOSED, "b", first=9)
    splits = load(tmp_path)
    assert splits.classes == ("b", COMPOSED) and torch.bincount(splits.test.labels).tolist() == [4, 4]


def test_two_folders_of_one_class_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", COMPOSED, "b")
    fill(tmp_path / "test", COMPOSED, DECOMPOSED, first=9)
    with pytest.raises(DataError, match=r"test: class folders 'A\\u0308rger' and '\\xc4rger' have one name, in two"):
        load(tmp_path)
    fill(tmp_path / "train", DECOMPOSED)
    with pytest.raises(DataError, match="train: class folders .* move their images into one folder"):
        load(tmp_path)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["tif", "jpg", "png"])
def test_of_the_stated_formats_only_tiff_is_turned(tmp_path: Path, kind: str, orientation: int) -> None:
    """Pillow turns TIFF files as it decodes them. Training and predictor agree, as the guide says."""
    path, exif = tmp_path / f"x.{kind}", Image.Exif()
    exif[0x0112] = orientation
    stored = {"compression": None, "tiffinfo": {0x0112: orientation}} if kind == "tif" else {"exif": exif}
    Image.fromarray(NOISE).save(path, **stored)
    turned = {1: NOISE, 3: np.rot90(NOISE, 2), 6: np.rot90(NOISE, -1)}[orientation if kind == "tif" else 1]
    size = turned.shape[0], turned.shape[1]
    facts = {"input_mean": [0.5] * 3, "input_size": list(size), "resize": "crop"}
    found = decode(path, channels=3, image_size=size).permute(1, 2, 0).numpy()
    assert np.array_equal(found, program.read_image(str(path), facts)[0])
    assert kind == "jpg" or np.array_equal(found, turned)
