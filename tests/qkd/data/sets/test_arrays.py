"""NumPy archives: what is read, and a clear refusal of everything that could spoil a training."""

from __future__ import annotations

import io
import json
import os
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qkd.config import DataConfig
from qkd.data import DataError, MemorySplit, Splits, load_splits, read_facts
from qkd.data.sets import archive
from qkd.data.sets.rows import ArraySplit, HeldRows, StoredRows

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3


def write(folder: Path, part: str = "train", **arrays: npt.ArrayLike) -> None:
    np.savez(folder / f"{part}.npz", **arrays)  # type: ignore[arg-type]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write(tmp_path, "train", images=IMAGES, labels=LABELS)
    write(tmp_path, "test", images=255 - IMAGES[:9], labels=LABELS[:9])
    return tmp_path


def load(folder: Path, **settings: Any) -> Splits:
    return load_splits(DataConfig(name="npz", path=folder, **settings), seed=0)


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_color_images_are_read_channels_first(good: Path) -> None:
    splits = load(good, val_fraction=0.0)
    assert isinstance(splits.train, MemorySplit) and isinstance(splits.test, MemorySplit)
    assert (splits.channels, splits.image_size, splits.classes) == (3, 6, ("0", "1", "2"))
    assert np.array_equal(splits.train.images.permute(0, 2, 3, 1).numpy(), IMAGES)
    assert np.array_equal(splits.test.labels.numpy(), LABELS[:9])
    assert splits.mean == pytest.approx(tuple(IMAGES.mean((0, 1, 2)) / 255))
    assert splits.std == pytest.approx(tuple(IMAGES.std((0, 1, 2)) / 255))


@pytest.mark.parametrize("shape", [(30, 6, 6), (30, 6, 6, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_gray_images_and_any_integers_are_read(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, images=IMAGES[..., 0].reshape(shape), labels=LABELS.astype(dtype))
    splits = load(tmp_path)
    assert splits.channels == 1
    assert splits.train.labels.dtype == torch.int64
    assert splits.train.batch(torch.tensor([0]), "cpu")[0].shape == (1, 1, 6, 6)


def test_images_that_are_not_square_stay_so(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, images=IMAGES[:, :5], labels=LABELS)
    splits = load(tmp_path)
    assert splits.image_size == (5, 6)
    assert splits.train.batch(torch.tensor([0]), "cpu")[0].shape == (1, 3, 5, 6)


def test_class_names_come_from_the_json_file(good: Path) -> None:
    (good / "classes.json").write_text(json.dumps(["cat", "dog", "eel", "fox"]))
    assert load(good).classes == ("cat", "dog", "eel", "fox")


def test_a_channel_that_never_changes_does_not_divide_by_zero(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, images=np.full_like(IMAGES, 7), labels=LABELS)
    assert load(tmp_path).std == (1 / 255,) * 3


def test_the_fingerprint_changes_with_a_pixel_a_label_and_a_name(good: Path) -> None:
    before = load(good).fingerprint
    assert load(good).fingerprint == before
    changed = IMAGES.copy()
    changed[4, 3, 2, 1] ^= 1
    write(good, "train", images=changed, labels=LABELS)
    pixel = load(good).fingerprint
    write(good, "train", images=IMAGES, labels=LABELS[::-1])
    label = load(good).fingerprint
    write(good, "train", images=IMAGES, labels=LABELS)
    (good / "classes.json").write_text(json.dumps(["cat", "dog", "eel"]))
    assert len({before, pixel, label, load(good).fingerprint}) == 4


BROKEN_IMAGES = IMAGES / 255
BROKEN_IMAGES[0, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "missing array images, found ['labels']"),
        ({"images": IMAGES, "y": LABELS}, "missing array labels"),
        ({"images": IMAGES / 255, "labels": LABELS}, "must be uint8 (0..255), found float64"),
        ({"images": BROKEN_IMAGES, "labels": LABELS}, "1 of its values are NaN or infinite"),
        ({"images": IMAGES.astype(np.int64), "labels": LABELS}, "must be uint8 (0..255), found int64"),
        ({"images": IMAGES[:, None], "labels": LABELS}, "must be [n, height, width] or"),
        ({"images": IMAGES[:, 0, 0], "labels": LABELS}, "must be [n, height, width]"),
        ({"images": np.moveaxis(IMAGES, 3, 1), "labels": LABELS}, "(channels last), found [30, 3, 6, 6]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "`images` is empty"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "`labels` must be integers, found float64"),
        ({"images": IMAGES, "labels": LABELS > 0}, "`labels` must be integers, found bool"),
        ({"images": IMAGES, "labels": LABELS[:29]}, "label per image, found [29] for 30 images"),
        ({"images": IMAGES, "labels": LABELS.reshape(30, 1)}, "label per image, found [30, 1] for 30 images"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels must be 0..1 (2 classes), found -1..1"),
        ({"images": IMAGES, "labels": np.array([{"a": 1}] * 30)}, "holds pickled objects"),
        ({"images": np.array([None] * 30), "labels": LABELS}, "holds pickled objects"),
    ],
)
def test_broken_arrays_are_refused(good: Path, arrays: dict[str, npt.NDArray[Any]], message: str) -> None:
    write(good, "train", **arrays)
    text = refusal(good)
    assert message in text
    assert "train.npz" in text


def test_labels_beyond_the_names_are_refused(good: Path) -> None:
    (good / "classes.json").write_text(json.dumps(["cat", "dog"]))
    assert "labels must be 0..1 (2 classes), found 0..2" in refusal(good)


def test_labels_of_the_test_part_beyond_training_are_refused(good: Path) -> None:
    write(good, "test", images=IMAGES[:9], labels=np.full(9, 3))
    assert "test.npz: labels must be 0..2" in refusal(good)


def test_a_class_that_is_tested_but_never_trained_is_refused(good: Path) -> None:
    (good / "classes.json").write_text(json.dumps(["cat", "dog", "eel", "fox"]))
    write(good, "test", images=IMAGES[:9], labels=np.full(9, 3))
    assert "classes [3] are in test.npz but not in train.npz" in refusal(good)


def test_parts_of_different_size_are_refused(good: Path) -> None:
    write(good, "test", images=IMAGES[:9, :4, :4], labels=LABELS[:9])
    assert "images of train.npz are 6x6x3, but those of test.npz are 4x4x3" in refusal(good)


@pytest.mark.parametrize("text", ["{", '{"0": "cat"}', "[]", "[1, 2, 3]", '["a", "a", "b"]'])
def test_broken_class_names_are_refused(good: Path, text: str) -> None:
    (good / "classes.json").write_text(text)
    assert "classes.json" in refusal(good)


def test_a_missing_file_is_named(good: Path) -> None:
    (good / "test.npz").unlink()
    assert "test.npz: no such file; needs train.npz and test.npz" in refusal(good)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.999])
def test_a_truncated_archive_is_named(good: Path, keep: float) -> None:
    path = good / "train.npz"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    assert "train.npz: damaged or not a NumPy archive" in refusal(good)


def test_an_altered_archive_is_named(good: Path) -> None:
    data = bytearray((good / "train.npz").read_bytes())
    data[1000] ^= 255  # inside the pixels: the archive's own check sum tells
    (good / "train.npz").write_bytes(data)
    assert "train.npz: damaged or not a NumPy archive" in refusal(good)


def test_a_plain_pickle_is_refused(good: Path) -> None:
    np.save(good / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (good / "train.npz").write_bytes((good / "x.npy").read_bytes())
    assert "train.npz: damaged or not a NumPy archive" in refusal(good)
    (good / "train.npz").write_bytes(b"\x80\x04N.")
    assert "train.npz: is a pickle, which is never opened" in refusal(good)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no array be small enough for memory."""
    for module in ("qkd.data.sets.archive", "qkd.data.sets.arrays"):
        monkeypatch.setattr(f"{module}.IN_MEMORY_BYTES", 0)


def pixels(splits: Splits, part: str) -> npt.NDArray[np.uint8]:
    split = getattr(splits, part)
    return split.batch(torch.arange(len(split)), "cpu")[0].numpy()


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("form", ["stored", "compressed", "fortran"])
def test_large_sets_are_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, form: str
) -> None:
    images = IMAGES[..., 0] if channels == 0 else IMAGES[..., :channels]
    images = np.asfortranarray(images) if form == "fortran" else np.ascontiguousarray(images)
    save = np.savez_compressed if form == "compressed" else np.savez
    for part in ("train", "test"):
        save(tmp_path / part, images=images, labels=LABELS)
    small = load(tmp_path, val_fraction=0.2, train_limit=15)
    for module in ("qkd.data.sets.archive", "qkd.data.sets.arrays"):
        monkeypatch.setattr(f"{module}.IN_MEMORY_BYTES", 0)
    large = load(tmp_path, val_fraction=0.2, train_limit=15)
    assert isinstance(small.train, MemorySplit) and isinstance(large.train, ArraySplit)
    assert isinstance(large.train.source, StoredRows if form == "stored" else HeldRows)
    assert (large.mean, large.std, large.fingerprint, large.facts) == (
        small.mean,
        small.std,
        small.fingerprint,
        small.facts,
    )
    for part in ("train", "val", "test"):
        assert np.array_equal(pixels(large, part), pixels(small, part))
        assert torch.equal(getattr(large, part).labels, getattr(small, part).labels)
    one, labels = large.train.batch(torch.tensor([7, 2, 2]), "cpu")
    assert torch.equal(one, small.train.batch(torch.tensor([7, 2, 2]), "cpu")[0]) and labels.shape == (3,)


def test_a_large_set_moves_to_a_device_as_a_whole(good: Path, in_place: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkd.data.sets.rows._MOVED_AT_ONCE", 300)
    part = load(good).train
    assert isinstance(part, ArraySplit) and part.to("cpu") is part
    held = part.gathered(torch.device("cpu"))
    assert torch.equal(held.images, part.batch(torch.arange(len(part)), "cpu")[0])
    assert torch.equal(held.labels, part.labels)


def test_large_sets_stay_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a third of the images' bytes is ever in memory at once."""
    monkeypatch.setattr("qkd.data.sets.archive.IN_MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr("qkd.data.sets.arrays.IN_MEMORY_BYTES", 1 << 20)
    images = np.random.default_rng(0).integers(0, 256, (160, 224, 224, 3), dtype=np.uint8)  # 24 MB
    write(tmp_path, "train", images=images, labels=np.arange(160) % 3)
    write(tmp_path, "test", images=images[:30], labels=np.arange(30) % 3)
    size, some = images.nbytes, images[[3, 100, 159]]
    del images
    load_splits(DataConfig(name="digits"), seed=0)  # imports
    tracemalloc.start()
    try:
        splits = load(tmp_path, val_fraction=0.0)
        batch, _ = splits.train.batch(torch.tensor([3, 100, 159]), "cpu")
        assert tracemalloc.get_traced_memory()[1] < size / 3
    finally:
        tracemalloc.stop()
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), some)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stored", "compressed"])
def test_peak_memory_is_that_of_reading_the_array_once(tmp_path: Path, form: str) -> None:
    """Peak of a whole process, against one that loads the array with NumPy alone: 1.2 times at most."""
    import subprocess
    import sys

    images = np.random.default_rng(0).integers(0, 256, (2000, 224, 224, 3), dtype=np.uint8)  # 301 MB
    save = np.savez_compressed if form == "compressed" else np.savez
    save(tmp_path / "train", images=images, labels=np.arange(2000) % 3)
    save(tmp_path / "test", images=images[:30], labels=np.arange(30) % 3)
    del images
    peaks = {}
    for name, body in {
        "numpy": "array = np.load(folder / 'train.npz')['images']; array.sum()",
        "ours": "load_splits(DataConfig(name='npz', path=folder), 0).train.batch(torch.arange(64), 'cpu')",
    }.items():
        program = (
            "import sys, torch, numpy as np\nfrom pathlib import Path\nfrom qkd.config import DataConfig\n"
            f"from qkd.data import load_splits\nfolder = Path(sys.argv[1])\n{body}\n"
            # not ru_maxrss, which a forked process has from its parent
            "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
        )
        peaks[name] = int(done.stdout)
    assert peaks["ours"] <= (0.8 if form == "stored" else 1.2) * peaks["numpy"], peaks


def test_a_file_that_is_written_to_while_it_is_in_use_is_noticed(good: Path, in_place: None) -> None:
    splits = load(good)
    with open(good / "train.npz", "r+b") as file:
        file.truncate(200)
    with pytest.raises(DataError, match=r"train\.npz: was modified while it was in use"):
        splits.train.batch(torch.arange(3), "cpu")


@pytest.mark.parametrize("position", [0.2, 0.9])
def test_an_altered_large_archive_is_named(good: Path, in_place: None, position: float) -> None:
    data = bytearray((good / "train.npz").read_bytes())
    data[int(300 + position * IMAGES.nbytes)] ^= 1
    (good / "train.npz").write_bytes(data)
    assert "train.npz: damaged or not a NumPy archive" in refusal(good)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 1, "labels are 1..3, but 1 of the 4 classes (0) have no image among 30; subtract 1 from"),
        (LABELS + 100, "labels are 100..102, but 100 of the 103 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"),
        (LABELS * 2, "labels are 0..4, but 2 of the 5 classes (1, 3) have no image among 30; number the classes"),
        (np.where(np.arange(30) == 4, 300_000_000, LABELS), "299,999,997 of the 300,000,001 classes (3, 4, 5"),
        (np.where(np.arange(30) == 4, 3_000_000, LABELS), "2,999,997 of the 3,000,001 classes (3, 4, 5"),
        (np.where(np.arange(30) == 4, 2**62, LABELS), "classes (3, 4, 5"),
        (np.where(np.arange(30) == 4, 2**64 - 1, LABELS.astype(np.uint64)), "found 18446744073709551615"),
        (np.eye(3, dtype=np.int64)[LABELS], "convert one-hot rows with labels.argmax(1)"),
        (LABELS.astype(np.float32), 'convert class numbers with .astype("int64")'),
        (np.where(LABELS == 0, np.nan, LABELS), "must be integers, found float64"),
        (np.array(["cat"] * 30), "must be integers, found <U3"),
    ],
)
def test_labels_that_leave_classes_empty_are_refused_at_once(
    good: Path, labels: npt.NDArray[Any], message: str
) -> None:
    write(good, "train", images=IMAGES, labels=labels)
    started = time.monotonic()
    assert message in refusal(good)
    assert time.monotonic() - started < 1


def test_named_classes_may_lack_images_and_it_is_noted(good: Path) -> None:
    (good / "classes.json").write_text(json.dumps(["cat", "dog", "eel", "fox"]))
    write(good, "test", images=255 - IMAGES[:2], labels=LABELS[:2])
    assert load(good).notes == (
        "1 of 4 classes has no training image (fox): its output is never trained",
        "2 of 4 classes have no test image (eel, fox): the test accuracy does not cover them",
    )


def test_a_class_that_is_never_tested_is_noted(good: Path) -> None:
    assert load(good).notes == ()
    write(good, "test", images=255 - IMAGES[:2], labels=LABELS[:2])
    assert load(good).notes == ("1 of 3 classes has no test image (2): the test accuracy does not cover it",)


def test_names_of_far_more_classes_than_images_are_refused(good: Path) -> None:
    (good / "classes.json").write_text(json.dumps(list(map(str, range(100_001)))))
    assert "100,001 classes for 30 training images" in refusal(good)


@pytest.mark.parametrize(
    "text",
    [json.dumps(["a", "b\n", "c"]), json.dumps(["a", "\ud800", "c"]), "[" * 100_000, json.dumps(["\x1b[31m", "b"])],
)
def test_class_names_that_cannot_be_printed_are_refused(good: Path, text: str) -> None:
    (good / "classes.json").write_text(text)
    assert "classes.json: " in refusal(good)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(good: Path) -> None:
    os.mkfifo(good / "classes.json")
    assert "classes.json: class names must be in a regular file" in refusal(good)
    (good / "classes.json").unlink()
    (good / "train.npz").unlink()
    os.mkfifo(good / "train.npz")
    assert "train.npz: no such file" in refusal(good)


def zipped(header: str, body: bytes = b"", flags: int = 0, name: str = "images.npy") -> bytes:
    text = header.ljust(117) + "\n"
    member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin-1") + body
    out = io.BytesIO()
    labels = io.BytesIO()
    np.save(labels, LABELS)
    with zipfile.ZipFile(out, "w") as made:
        made.writestr(name, member)
        made.writestr("labels.npy", labels.getvalue())
    data = bytearray(out.getvalue())
    if flags:
        at = data.index(b"PK\x01\x02")
        data[at + 8] |= flags
        data[6] |= flags
    return bytes(data)


SHAPE = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(SHAPE % "30, 6, 6, 3", IMAGES.tobytes(), flags=1), "`images` is encrypted"),
        (zipped(SHAPE % "1000000000, 224, 224, 3"), "`images` should have 150,528,000,000,000 bytes, found 0"),
        (zipped(SHAPE % "-30, -6, 6, 3", IMAGES.tobytes()), "should have"),
        (zipped(SHAPE % ", ".join(["2"] * 200)), "damaged or not a NumPy archive"),
        (zipped("{'descr': '|O', 'fortran_order': False, 'shape': (30,), }"), "`images` holds pickled objects"),
        (zipped("{'descr': '|u1'"), "damaged or not a NumPy archive"),
        (zipped("(" * 100), "damaged or not a NumPy archive"),
        (zipped("{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': ()}"), "damaged"),
        (zipped(SHAPE % "30, 6, 6, 3", IMAGES.tobytes(), name="pictures.npy"), "missing array images"),
    ],
)
def test_hostile_archives_are_refused(good: Path, content: bytes, message: str) -> None:
    (good / "train.npz").write_bytes(content)
    text = refusal(good)
    assert message in text and "train.npz" in text


def test_more_than_this_machine_holds_is_refused_before_it_is_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(good / "train", images=IMAGES, labels=LABELS)
    monkeypatch.setattr(archive.os, "sysconf", lambda name: 30)
    assert "save it uncompressed with numpy.savez" in refusal(good)


def test_every_mutation_is_worded(good: Path) -> None:
    """Bytes of the archive altered, cut out and doubled: read as before or refused by name, never anything else."""
    whole = (good / "train.npz").read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            at = int(
                rng.choice(
                    [int(rng.integers(len(data))), int(rng.integers(200)), len(data) - 1 - int(rng.integers(200))]
                )
            )
            match int(rng.integers(3)):
                case 0:
                    data[at] = int(rng.integers(256))
                case 1:
                    del data[at : at + int(rng.integers(1, 9))]
                case 2:
                    data[at:at] = data[max(0, at - 9) : at]
        (good / "train.npz").write_bytes(data)
        try:
            read_facts(DataConfig(name="npz", path=good))
        except DataError as error:
            assert str(good) in str(error)


def test_other_archives_of_the_folder_are_named(good: Path) -> None:
    write(good, "val", images=IMAGES[:9], labels=LABELS[:9])
    assert load(good).notes == ("['val.npz'] beside train.npz and test.npz not read",)
