"""Images in more than one part: counted in a note, whatever the set is stored in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qkd.config import DataConfig
from qkd.data import Splits, load_splits
from qkd.data.loading import overlap
from qkd.data.loading.facts import file_digest
from qkd.data.sets import list_folder

IMAGES = np.random.default_rng(3).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


def folder_of(root: Path, **parts: range) -> Path:
    for part, rows in parts.items():
        for row in rows:
            path = root / part / f"class{row % 2}" / f"{part}{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(IMAGES[row]).save(path)
    return root


def archives_of(root: Path, **parts: range) -> Path:
    for part, rows in parts.items():
        np.savez(root / f"{part}.npz", images=IMAGES[list(rows)], labels=np.asarray(list(rows)) % 2)
    return root


def load(name: str, path: Path, **settings: Any) -> Splits:
    return load_splits(DataConfig(name=name, path=path, **settings), seed=0)


def repeated(splits: Splits) -> list[str]:
    return [note for note in splits.notes if "are also training images" in note]


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_test_images_that_are_trained_on_are_counted(tmp_path: Path, name: str) -> None:
    write = {"folder": folder_of, "npz": archives_of}[name]
    found = repeated(load(name, write(tmp_path, train=range(20), test=range(17, 30))))
    assert len(found) == 1 and found[0].startswith("3 of 13 test images are also training images")


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_parts_without_common_images_have_no_note(tmp_path: Path, name: str) -> None:
    write = {"folder": folder_of, "npz": archives_of}[name]
    assert repeated(load(name, write(tmp_path, train=range(20), test=range(20, 30)))) == []


def test_a_validation_part_is_compared_with_what_is_trained_on(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, train=range(20), val=range(18, 24), test=range(24, 30))
    found = repeated(load("folder", folder))
    assert len(found) == 1 and found[0].startswith("2 of 6 validation images are also training images")


def test_a_copy_in_a_set_that_is_split_here_is_found_where_it_lands_in_both_parts(tmp_path: Path) -> None:
    for row in range(20):
        for copy in "ab":
            path = tmp_path / f"class{row % 2}" / f"{row}{copy}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(IMAGES[row]).save(path)
    splits = load("folder", tmp_path, val_fraction=0)
    train, test = ([path.name[:-5] for path in part.files] for part in (splits.train, splits.test))  # type: ignore[attr-defined]
    both = sum(name in train for name in test)
    assert both and repeated(splits)[0].startswith(f"{both} of {len(test)} ")


def test_files_of_differing_sizes_are_not_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, train=range(6), test=range(6, 10))
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.write_bytes(path.read_bytes() + bytes(number))
    shutil.copy(folder / "train" / "class0" / "train0.png", folder / "test" / "class0" / "test6.png")
    read: list[str] = []

    def digest(path: Path) -> bytes:
        read.append(path.name)
        return file_digest(path)

    assert overlap.overlap_notes(list_folder(folder), digest)[0].startswith("1 of 4 test images")
    assert sorted(read) == ["test6.png", "train0.png"]


def test_a_file_is_hashed_once_per_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, train=range(6), test=range(4, 10))
    read: list[str] = []
    monkeypatch.setattr(
        "qkd.data.loading.load.file_digest", lambda path: (read.append(path.name), file_digest(path))[1]
    )
    assert repeated(load("folder", folder)) and len(read) == len(set(read)) == 12


def test_too_much_to_read_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = archives_of(tmp_path, train=range(20), test=range(10, 20))
    assert repeated(load("npz", folder))
    monkeypatch.setattr(overlap, "WHOLE_BYTES", 30 * 8 * 8 * 3 - 1)
    assert repeated(load("npz", folder)) == []


def test_too_much_to_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence would read as: there are none."""
    folder = archives_of(tmp_path, train=range(20), test=range(10, 20))
    monkeypatch.setattr(overlap, "WHOLE_BYTES", 30 * 8 * 8 * 3 - 1)
    (note,) = load("npz", folder).notes
    assert note.startswith("copies were not looked for (test among training images), because 0 MiB would have to be ")
    monkeypatch.setattr(overlap, "MOST_IMAGES", 29)
    assert "because there are more than 29 images" in load("npz", folder).notes[0]


def test_of_a_large_folder_it_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, train=range(20), test=range(10, 20))
    total = sum(path.stat().st_size for path in (folder / "train").rglob("*.png"))
    monkeypatch.setattr(overlap, "WHOLE_BYTES", total)
    assert repeated(load("folder", folder)), "all files of either part have been read for the record"
    monkeypatch.setattr(overlap, "WHOLE_BYTES", 100)
    (note,) = load("folder", folder).notes
    assert "(test among training images, validation among training images)" in note


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_copies_in_a_drawn_validation_part_are_counted(tmp_path: Path, name: str) -> None:
    if name == "folder":
        folder = folder_of(tmp_path, train=range(20), test=range(20, 30))
        for path in list((folder / "train").rglob("*.png")):
            shutil.copy(path, path.with_name(f"{path.stem} (1).png"))
    else:
        folder = archives_of(tmp_path, test=range(20, 30))
        np.savez(tmp_path / "train.npz", images=np.concatenate([IMAGES[:20]] * 2), labels=np.arange(40) % 2)
    splits = load(name, folder)
    train, val = (part.batch(torch.arange(len(part)), "cpu")[0].numpy() for part in (splits.train, splits.val))
    seen = {image.tobytes() for image in train}
    count = sum(image.tobytes() in seen for image in val)
    (note,) = repeated(splits)
    assert count and note.startswith(f"{count} of {len(val)} validation images") and "the set holds copies" in note
    assert repeated(load(name, folder, val_fraction=0)) == []


def test_a_validation_part_that_is_a_copy_of_the_test_is_noted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, train=range(20), test=range(20, 30))
    shutil.copytree(folder / "test", folder / "val")
    (note,) = load("folder", folder).notes
    assert note.startswith("10 of 10 test images are also validation images, so that the test is of images that the ")
