"""Random resized crops: within the image, of the stated area and proportions, the same in any batch and process."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qkd.agents.operations.counting import SampleDraws, Use
from qkd.data import iterate
from qkd.data.sets import Fit, FolderSplit, images
from qkd.data.sets.random_crop import ATTEMPTS, RandomCrop, TrainingFolder
from qkd.training.source import PieceNumbers

SIZES = ((500, 375), (375, 500), (40, 40), (7, 300))


def attempts(rng: random.Random) -> list[list[float]]:
    return [[rng.random() for _ in range(4)] for _ in range(ATTEMPTS)]


@pytest.fixture
def folder(tmp_path: Path) -> FolderSplit:
    rng = np.random.default_rng(0)
    files = []
    for index, suffix in enumerate(["png", "jpg"] * 6):
        height, width = rng.integers(20, 60, 2)
        files.append(tmp_path / f"{index}.{suffix}")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(files[-1])
    return FolderSplit(files, torch.arange(len(files)) % 3, channels=3, image_size=(16, 18))


@pytest.mark.parametrize("size", SIZES)
def test_pieces_have_the_area_and_the_proportions_that_are_asked_for(size: tuple[int, int]) -> None:
    crop, rng, areas = RandomCrop((0.2, 0.6), (0.5, 2.0)), random.Random(0), []
    for _ in range(300):
        left, top, width, height = crop.box(size, attempts(rng))
        assert left >= 0 and top >= 0 and left + width <= size[0] and top + height <= size[1]
        areas.append(width * height / (size[0] * size[1]))
        if size != SIZES[-1]:  # there no attempt fits
            assert 0.17 < areas[-1] < 0.65 and 0.45 < width / height < 2.2
    assert size == SIZES[-1] or max(areas) - min(areas) > 0.3


def test_numbers_mean_a_piece() -> None:
    """Half of 200x100 at proportions 1: a square of 100; left 0.5 of the 101 places that there are."""
    crop = RandomCrop((0.0, 1.0), (0.5, 2.0))
    assert crop.box((200, 100), [[0.5, 0.5, 0.5, 0.9]]) == (50, 0, 100, 100)
    side = round(math.sqrt(200 * 100 * 0.25))
    assert crop.box((200, 100), [[0.25, 0.5, 0.0, 0.999]]) == (0, 100 - side, side, side)


def test_where_no_attempt_fits_the_center_is_taken() -> None:
    """7x300 at width / height of 1/2 at least: the widest piece is 7x14."""
    assert RandomCrop((0.5, 1.0), (0.5, 2.0)).box((7, 300), [[0.0, 0.5, 0.3, 0.3]]) == (0, 143, 7, 14)
    assert RandomCrop((0.5, 1.0), (0.5, 2.0)).box((300, 7), [[0.0, 0.5, 0.3, 0.3]]) == (143, 0, 14, 7)


def all_of(split: FolderSplit | TrainingFolder, order: Tensor, size: int, workers: int) -> Tensor:
    """Return the images in the order of the data set."""
    found = torch.cat([shown for shown, _ in iterate(split, order, size, "cpu", drop_last=False, workers=workers)])
    return found[torch.argsort(order)]


def test_a_piece_depends_on_epoch_and_place_alone(folder: FolderSplit) -> None:
    cropped, straight = TrainingFolder(folder, RandomCrop(), PieceNumbers(5)), torch.arange(len(folder))
    first = all_of(cropped, straight, 12, 0)
    assert torch.equal(all_of(cropped, straight.flip(0), 5, 0), first)
    assert torch.equal(all_of(cropped, torch.randperm(12, generator=torch.Generator().manual_seed(1)), 4, 2), first)
    assert not torch.equal(all_of(TrainingFolder(folder, RandomCrop(), PieceNumbers(6)), straight, 12, 0), first)
    assert first.shape == (12, 3, 16, 18) and cropped.image_shape == (3, 16, 18) and len(cropped) == 12


def test_pixels_are_those_of_the_piece_brought_to_the_size(
    folder: FolderSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = torch.arange(len(folder))
    made = all_of(TrainingFolder(folder, RandomCrop(), PieceNumbers(5)), straight, 12, 0)
    numbers = SampleDraws(5, straight.numpy()).uniform(Use.PIECE, 4 * ATTEMPTS).reshape(-1, ATTEMPTS, 4)
    for row, file in enumerate(folder.files):
        with Image.open(file) as whole:
            left, top, width, height = RandomCrop().box(whole.size, numbers[row].tolist())
            piece = whole.convert("RGB").crop((left, top, left + width, top + height))
        wanted = torch.from_numpy(np.array(Fit("stretch")(piece, (18, 16)))).permute(2, 0, 1)
        assert torch.equal(made[row], wanted)
    monkeypatch.setattr(images.resampling, "load", lambda: None)
    assert torch.equal(all_of(TrainingFolder(folder, RandomCrop(), PieceNumbers(5)), straight, 12, 0), made)


def test_the_whole_image_is_what_it_was(folder: FolderSplit) -> None:
    before = folder.batch(torch.arange(3), "cpu")[0]
    cropped = TrainingFolder(folder, RandomCrop(), PieceNumbers(5))
    cropped.batch(torch.arange(3), "cpu")
    assert torch.equal(cropped.subset(torch.arange(3)).batch(torch.arange(3), "cpu")[0], before)
    assert cropped.to("cpu") is cropped


@pytest.mark.parametrize("crop", [None, RandomCrop((0.5, 1.0))], ids=["whole", "pieces"])
def test_a_reduced_scale_gives_nearly_the_pixels(tmp_path: Path, crop: RandomCrop | None) -> None:
    """Of smooth pictures four times as large as wanted: other pixels, by a few gray levels."""
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{index}.jpg" for index in range(4)]
    for file, size in zip(files, [(121, 83), (120, 96), (90, 133), (17, 19)], strict=True):
        small = Image.fromarray(rng.integers(60, 180, (3, 3, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(file, quality=95)
    folder = FolderSplit(files, torch.arange(4), channels=3, image_size=(18, 20))
    order = torch.arange(4)
    full, reduced = (
        TrainingFolder(folder, crop, PieceNumbers(2), is_reduced=is_reduced).batch(order, "cpu")[0].int()
        for is_reduced in (False, True)
    )
    assert not torch.equal(full[:3], reduced[:3]) and (full - reduced).abs().float().mean() < 4
    assert torch.equal(full[3], reduced[3]), "an image that is small already is decoded in full"


def test_a_gray_training_reads_reduced_files_as_gray(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    Image.new("RGB", (90, 90), (200, 30, 60)).save(file)
    folder = FolderSplit([file], torch.zeros(1, dtype=torch.int64), channels=1, image_size=20)
    made = TrainingFolder(folder, None, PieceNumbers(0), is_reduced=True).batch(
        torch.zeros(1, dtype=torch.int64), "cpu"
    )
    light = Image.new("RGB", (1, 1), (200, 30, 60)).convert("L").getpixel((0, 0))
    assert made[0].shape == (1, 1, 20, 20) and (made[0].int() - light).abs().max() <= 2
