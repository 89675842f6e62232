"""Folders of images: decoding in process and by workers, sizes, and a refusal that names the file."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qkd.config import DataConfig
from qkd.data import DataError, Splits, changes, iterate, load_splits, normalize, read_facts, sampling_note
from qkd.data.sets.images import IMAGE_SUFFIXES, decode, read_header

COLORS = {"ant": (200, 10, 10), "bee": (10, 200, 10)}


def paint(path: Path, size: tuple[int, int] = (12, 12), color: tuple[int, int, int] = (9, 9, 9), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 40, (size[1], size[0], 3))
    Image.fromarray((noise + np.array(color)).astype(np.uint8)).save(path)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    for part, count in (("train", 10), ("test", 3)):
        for name, color in COLORS.items():
            for index in range(count):
                paint(tmp_path / part / name / f"{index}.png", color=color, seed=index + 100 * (part == "test"))
    return tmp_path


def load(folder: Path, **settings: Any) -> Splits:
    return load_splits(DataConfig(name="folder", path=folder, **settings), seed=0)


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, **settings)
    return str(caught.value)


def test_images_and_classes_are_those_of_the_files(good: Path) -> None:
    splits = load(good, val_fraction=0.2)
    assert (splits.classes, splits.channels, splits.image_size) == (("ant", "bee"), 3, 12)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 4, 6)
    assert torch.bincount(splits.val.labels).tolist() == [2, 2]
    images, labels = splits.test.batch(torch.arange(6), "cpu")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    for index in range(6):
        path = good / "test" / ("ant", "bee")[index // 3] / f"{index % 3}.png"
        assert np.array_equal(images[index].permute(1, 2, 0).numpy(), np.array(Image.open(path)))


def test_mean_and_std_are_those_of_the_training_images(good: Path) -> None:
    splits = load(good)
    pixels = splits.train.batch(torch.arange(len(splits.train)), "cpu")[0].double() / 255
    assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert splits.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())
    out = normalize((pixels * 255).round().to(torch.uint8), splits.mean, splits.std)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_batches_of_one_process_in_the_same_order(good: Path, workers: int) -> None:
    train = load(good).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(5))
    before = torch.get_rng_state()
    alone = list(iterate(train, order, 4, "cpu", drop_last=False))
    together = list(iterate(train, order, 4, "cpu", drop_last=False, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(alone) == len(together) == 5
    for (images, labels), (other_images, other_labels) in zip(alone, together, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_gray_images_stay_gray_unless_one_is_in_color(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in "ab":
            for index in range(3):
                paint(tmp_path / part / name / f"{index}.png", seed=index)
                path = tmp_path / part / name / f"{index}.png"
                Image.open(path).convert("L").save(path)
    assert load(tmp_path).channels == 1
    assert load(tmp_path).train.batch(torch.tensor([0]), "cpu")[0].shape == (1, 1, 12, 12)
    paint(tmp_path / "test" / "a" / "0.png")
    assert load(tmp_path).channels == 3


def test_images_are_resized_and_cropped_to_the_size_asked_for(good: Path) -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 255  # the middle square, which the crop keeps
    Image.fromarray(wide).save(good / "train" / "ant" / "0.png")
    splits = load(good, image_size=10, val_fraction=0.0)
    assert splits.image_size == 10
    image = splits.train.batch(torch.tensor([0]), "cpu")[0][0]
    assert image.shape == (3, 10, 10)
    assert int(image[:, :, 1:-1].min()) == 255


def test_the_fingerprint_is_of_content_and_order(good: Path) -> None:
    before = load(good).fingerprint
    assert load(good).fingerprint == before
    first, last = good / "train" / "ant" / "0.png", good / "train" / "ant" / "x.png"
    first.rename(last)  # another place in the order: another set
    assert load(good).fingerprint != before
    last.rename(first)
    assert load(good).fingerprint == before
    data = bytearray(first.read_bytes())
    data[-20] ^= 1  # same name, same size
    times = first.stat()
    first.write_bytes(data)
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    config = DataConfig(name="folder", path=good)
    assert read_facts(config).fingerprint != before
    first.write_bytes(bytes(data[:-20]) + bytes([data[-20] ^ 1]) + bytes(data[-19:]))
    assert read_facts(config).fingerprint == before


def test_of_a_large_folder_a_sample_is_looked_at_and_all_sizes(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkd.data.loading.facts.WHOLE_BYTES", 100)
    monkeypatch.setattr("qkd.data.loading.facts._SAMPLE_IMAGES", 4)
    config = DataConfig(name="folder", path=good)
    before = read_facts(config)
    assert (before.train.sampled, before.test.sampled) == (4, 4)
    note = sampling_note(before)
    assert note.endswith("in a sample: 4 of 20 images of train and 4 of 6 images of test")
    paint(good / "train" / "ant" / "0.png", seed=77)  # the first is in every sample
    assert changes(before, read_facts(config)) == ["pixels of train (of 4 sampled images)"]
    paint(good / "train" / "ant" / "0.png", color=COLORS["ant"], seed=0)
    assert changes(before, read_facts(config)) == []
    with open(good / "train" / "ant" / "1.png", "ab") as file:  # not in the sample, but of another size
        file.write(b"more")
    assert changes(before, read_facts(config)) == ["pixels of train (of 4 sampled images)"]


def test_facts_of_a_folder_do_not_decode(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be opened as an image")

    before = load(good).facts
    monkeypatch.setattr(Image, "open", refuse)
    assert read_facts(DataConfig(name="folder", path=good)) == before


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/0-checkpoint.png",
        "._0.png",
        ".hidden.jpg",
        "__MACOSX/ant/._0.png",
        "__MACOSX/0.png",
        "a/.b/c.png",
        "@eaDir/0.png/thumb.jpg",
        "sub/@eaDir/1.jpg",
        "Thumbs.db",
        ".DS_Store",
        "$RECYCLE.BIN/1.png",
    ],
)
def test_hidden_files_and_folders_are_skipped_at_every_depth_and_counted(good: Path, name: str) -> None:
    before = load(good)
    for place in (good / "train" / "ant", good / "test" / "bee"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"no image")
    after = load(good)
    assert after.facts == before.facts and before.notes == ()
    assert len(after.notes) == 1 and after.notes[0].startswith("2 hidden files and folders skipped (")


def test_images_of_kinds_that_are_not_read_are_counted_in_one_line(good: Path) -> None:
    before = load(good)
    for name in ("a.heic", "b.AVIF", "deep/c.jxl", "notes.txt"):
        (good / "train" / "ant" / name).parent.mkdir(exist_ok=True)
        (good / "train" / "ant" / name).write_bytes(b"another kind")
    after = load(good)
    assert after.facts == before.facts and len(after.notes) == 1
    assert after.notes[0].startswith("3 images in unsupported formats not read (supported: ")
    assert "'a.heic'" in after.notes[0]


def test_hidden_class_folders_are_skipped_and_counted(good: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
        paint(good / "train" / name / "0.png")
    assert load(good).classes == ("ant", "bee")
    assert load(good).notes == ("3 hidden files and folders skipped ('.git', '.ipynb_checkpoints', '__MACOSX')",)


def test_images_in_folders_of_a_class_folder_are_read(good: Path) -> None:
    paint(good / "test" / "ant" / "more" / "deep" / "9.PNG")
    assert len(load(good).test) == 7


def test_a_class_without_a_test_image_is_noted(good: Path) -> None:
    paint(good / "train" / "cow" / "0.png")
    assert load(good).notes == ("1 of 3 classes has no test image (cow): the test accuracy does not cover it",)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_only_stated_formats_are_decoded_whatever_the_name(
    good: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("no program is to be started")

    monkeypatch.setattr("subprocess.Popen.__init__", refuse)
    (good / "train" / "ant" / f"zz{suffix}").write_bytes(EPS)
    text = refusal(good)
    assert f"zz{suffix}: cannot be read as an image: its content is not BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP" in text


def test_all_files_that_cannot_be_read_are_named_at_once(good: Path) -> None:
    for part, name in (("train/ant", "za.png"), ("test/ant", "zb.jpg")):
        (good / part / name).write_bytes(b"no image")
    text = refusal(good)
    assert "za.png: cannot be read" in text and "zb.jpg: cannot be read" in text
    for position in range(40):
        (good / "train" / "ant" / f"zz{position:02}.png").write_bytes(b"no image")
    text = refusal(good)
    assert text.count("replace or delete it") == 5 and "zz02.png" in text
    assert "37 more files cannot be read: " in text and ", and 17 more" in text


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_stated_format_is_read(good: Path, suffix: str) -> None:
    path = good / "test" / "ant" / f"zz{suffix}"
    gray = Image.fromarray(np.full((12, 12), 77, np.uint8))
    (gray if suffix == ".pgm" else gray.convert("RGB")).save(path)
    image, _ = load(good).test.batch(torch.tensor([3]), "cpu")
    assert abs(int(image.float().mean()) - 77) <= 2


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 3_000), (20_000, 20_000), (2_000_000_000, 2_000_000_000)])
def test_bombs_are_refused_before_they_are_decoded(good: Path, size: tuple[int, int]) -> None:
    (good / "train" / "ant" / "zz.png").write_bytes(png_of_size(*size))
    text = refusal(good, image_size=12)
    assert "zz.png: cannot be read as an image" in text and "pixels" in text.lower()


def test_a_strip_that_resizing_would_blow_up_is_refused(good: Path) -> None:
    Image.fromarray(np.zeros((20_000, 1, 3), np.uint8)).save(good / "train" / "ant" / "zz.png")
    splits = load(good, image_size=12)
    assert splits.image_size == 12
    with pytest.raises(DataError, match=r"zz\.png: .* pixels to decode or resize exceed the limit"):
        decode(good / "train" / "ant" / "zz.png", channels=3, image_size=224)


def test_a_class_name_that_cannot_be_printed_is_refused(good: Path) -> None:
    paint(good / "train" / "a\nb" / "0.png")
    assert "class names must be printable text, found ['a\\nb']" in refusal(good)


def test_altered_images_are_worded_whatever_the_decoder_raises(good: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in (".png", ".jpg", ".tif", ".gif", ".webp", ".bmp", ".ppm"):
        source = good / f"x{suffix}"
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(source)
        whole = source.read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(int(rng.integers(1, 4))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            source.write_bytes(data[: len(data) - int(rng.integers(0, 20))])
            try:
                read_header(source)
                decode(source, channels=3, image_size=12)
            except DataError as error:
                assert str(source) in str(error)


def test_statistics_of_large_images_take_little_memory(tmp_path: Path) -> None:
    """Peak of a process that loads 224x224 images and reads a batch, over one that only imports: 61 MB were seen."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 2)):
        for name in "ab":
            for index in range(count):
                path = tmp_path / part / name / f"{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((224, 224)).save(path)
    program = (
        "import sys, torch\nfrom pathlib import Path\nfrom qkd.config import DataConfig\n"
        "from qkd.data import load_splits\nimport PIL.JpegImagePlugin\n"
        "from qkd.data.sets import jpeg, resampling\njpeg.decoder(), resampling.load()\n"
        "def peak():\n"  # not ru_maxrss, which a forked process has from its parent
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "torch.set_num_threads(1)\n"
        "before = peak()\nsplits = load_splits(DataConfig(name='folder', path=Path(sys.argv[1])), 0)\n"
        "splits.train.batch(torch.arange(64), 'cpu')\nprint(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 70 * 1024  # KiB; the pixels of all images as int64, as it once was, are 300 MB


def test_mixed_sizes_need_a_size(good: Path) -> None:
    paint(good / "train" / "bee" / "9.png", size=(13, 12))
    text = refusal(good)
    assert "9.png: is 13x12, but" in text and "set data.image_size" in text
    assert load(good, image_size=12).image_size == 12


def test_images_that_are_not_square_stay_so(tmp_path: Path) -> None:
    """Height first, as everywhere; a size of one number makes them square."""
    for part in ("train", "test"):
        for name in "ab":
            for index in range(2):
                paint(tmp_path / part / name / f"{index}.png", size=(14, 12))
    splits = load(tmp_path)
    assert splits.image_size == (12, 14) and splits.image_shape == (3, 12, 14)
    assert splits.test.batch(torch.arange(2), "cpu")[0].shape == (2, 3, 12, 14)
    assert load(tmp_path, image_size=10).image_shape == (3, 10, 10)
    assert load(tmp_path, image_size=(6, 7)).image_shape == (3, 6, 7)


@pytest.mark.parametrize("image_size", [None, 8])
def test_a_file_that_is_no_image_is_named_at_once(good: Path, image_size: int | None) -> None:
    (good / "train" / "bee" / "4.png").write_text("not an image")
    assert "4.png: cannot be read as an image" in refusal(good, image_size=image_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_when_it_is_decoded(good: Path, workers: int) -> None:
    splits = load(good)
    broken = good / "test" / "bee" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    batches = iterate(splits.test, torch.arange(6), 2, "cpu", drop_last=False, workers=workers)
    with pytest.raises(DataError, match=r"2\.png: cannot be read as an image .*replace or delete it"):
        list(batches)


def test_images_of_sixteen_bits_are_refused(good: Path) -> None:
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(good / "train" / "ant" / "1.png")
    assert "not 8 bits per channel" in refusal(good)


def test_an_empty_class_folder_is_named(good: Path) -> None:
    (good / "train" / "cat").mkdir()
    (good / "train" / "cat" / "notes.txt").write_text("none yet")
    assert "cat: class folder without images" in refusal(good)


def test_a_class_that_is_tested_but_never_trained_is_named(good: Path) -> None:
    paint(good / "test" / "cow" / "0.png")
    assert "classes ['cow'] are not in" in refusal(good)


def test_missing_parts_are_named(good: Path) -> None:
    (good / "train").rename(good / "learn")
    (good / "learn").rename(good.parent / "learn")
    assert "train: no such folder; needs" in refusal(good)
    (good.parent / "learn").rename(good / "train")
    (good / "test").rename(good / "other")
    (good / "test").mkdir()
    assert "test: has no class folders" in refusal(good)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("train/ant/x.png", lambda path: path.symlink_to("gone.png"), "is not a file, or is a broken link"),
        ("test/ant/x.png", lambda path: path.symlink_to("x.png"), "is not a file, or is a broken link"),
        ("train/ant/x.JPG", _pipe, "is not a file, or is a broken link"),
        ("train/ant/x.png", lambda path: path.symlink_to("/dev/zero"), "is not a file, or is a broken link"),
        ("train/ant/more", lambda path: path.symlink_to(".."), "is a link to a folder"),
        ("train/cat", lambda path: path.symlink_to("gone"), "is a broken link"),
    ],
)
def test_images_do_not_vanish_behind_links_and_pipes(
    good: Path, name: str, make: Callable[[Path], None], message: str
) -> None:
    make(good / name)
    assert str(good / name) in refusal(good) and message in refusal(good)


def test_links_to_images_and_to_class_folders_are_read(good: Path) -> None:
    (good / "train" / "ant" / "x.png").symlink_to("0.png")
    (good / "train" / "bee").rename(good / "bees")
    (good / "train" / "bee").symlink_to(good / "bees")
    assert load(good, val_fraction=0.0).train.labels.tolist() == [0] * 11 + [1] * 10


def test_images_and_folders_outside_the_parts_are_named(good: Path) -> None:
    assert load(good).notes == ()
    paint(good / "cover.png")
    paint(good / "train" / "stray.png")
    paint(good / "test" / "stray.heic.png")
    (good / "README.txt").write_text("not an image", encoding="utf-8")
    paint(good / "more" / "0.png")
    assert load(good).notes == (
        "3 images outside class folders not read ('cover.png', 'stray.heic.png', 'stray.png')",
        "1 folder beside the parts of the set not read ('more')",
    )
