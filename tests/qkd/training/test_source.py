"""Where batches come from: the loop takes any source, and resumes it at the step where it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import beside
import numpy as np
import pytest
import torch
from PIL import Image

from qkd.data import Splits
from qkd.data.sets import FolderSplit
from qkd.progress import Silent
from qkd.seeding import stream
from qkd.testing import synthetic_splits
from qkd.training import Batch, Job, fit
from qkd.training.source import ImageSource, source_of

IMAGES = 40


loop_tests = beside.load(Path(__file__).with_name("test_loop.py"))


class Dreamed:
    """Images that no data set holds, drawn again for every step."""

    def __init__(self, job: Job) -> None:
        self.job, self.asked = job, []  # type: ignore[var-annotated]

    @property
    def images(self) -> int:
        return IMAGES

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        self.asked.append((epoch, first, size))
        splits = self.job.splits
        for step in range(first, IMAGES // size):
            generator = stream(self.job.seed, "dreamed", epoch, step)
            shape = (size, splits.channels, splits.image_size, splits.image_size)
            raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            labels = torch.randint(0, len(splits.classes), (size,), generator=generator)
            yield Batch(raw / 255.0, labels, raw, epoch, step)


@pytest.fixture
def splits() -> Splits:
    return synthetic_splits()


def test_a_source_without_data_trains_and_resumes_bit_for_bit(splits: Splits, tmp_path: Path) -> None:
    whole = loop_tests.make_job(tmp_path / "whole", splits, source=Dreamed)
    result = fit(whole, Silent())
    steps = IMAGES // whole.data.batch_size
    assert result.images_per_second > 0 and [row["epoch"] for row in result.rows] == [1, 2, 3]

    loop_tests.interrupted(tmp_path / "cut", splits, (1, steps - 1), source=Dreamed)
    asked: list[tuple[int, int, int]] = []

    def watched(job: Job) -> Dreamed:
        dreamed = Dreamed(job)
        dreamed.asked = asked
        return dreamed

    cut = loop_tests.make_job(tmp_path / "cut", splits, source=watched)
    fit(cut, Silent())
    assert asked == [(1, steps - 1, whole.data.batch_size), (2, 0, whole.data.batch_size)]
    assert loop_tests.equal(loop_tests.state(whole), loop_tests.state(cut))


def test_images_are_the_source_where_a_job_brings_none(splits: Splits, tmp_path: Path) -> None:
    job = loop_tests.make_job(tmp_path, splits)
    source = source_of(job)
    assert isinstance(source, ImageSource) and source.images == len(splits.train)
    size = job.data.batch_size
    batches = list(source.batches(1, 0, size))
    assert [batch.step for batch in batches] == list(range(source.images // size))
    places = torch.cat([batch.samples for batch in batches if batch.samples is not None])
    assert len(places) == len(set(places.tolist())) == len(batches) * size  # each image at most once
    (late,) = islice(source.batches(1, 2, size), 1)
    assert torch.equal(late.images, batches[2].images) and torch.equal(late.raw, splits.train.batch(places, "cpu")[0][
        2 * size : 3 * size
    ])  # fmt: skip
    assert not torch.equal(batches[0].raw, next(iter(source.batches(0, 0, size))).raw)


@pytest.fixture
def files(tmp_path: Path) -> FolderSplit:
    """Return pictures in files; the last four of them large enough to be decoded at a reduced scale."""
    rng, paths = np.random.default_rng(0), []
    for index in range(12):
        side = 12 if index < 8 else 40
        paths.append(tmp_path / f"{index}.jpg")
        Image.fromarray(rng.integers(0, 256, (side, side + 2, 3), dtype=np.uint8)).save(paths[-1])
    return FolderSplit(paths, torch.arange(12) % 4, channels=3, image_size=8)


def raw_images(job: Job, epoch: int, size: int) -> torch.Tensor:
    """Return an epoch's images before augmentation, in the order of the data set."""
    batches = list(source_of(job).batches(epoch, 0, size))
    places = torch.cat([batch.samples for batch in batches if batch.samples is not None])
    return torch.cat([batch.raw for batch in batches])[torch.argsort(places)]


def test_pieces_of_files_are_drawn_by_epoch_and_place(splits: Splits, files: FolderSplit, tmp_path: Path) -> None:
    shown = dataclasses.replace(splits, train=files, mean=(0.5,) * 3, std=(0.25,) * 3)

    def job(**data: Any) -> Job:
        settings = loop_tests.DATA.model_copy(update={"name": "folder", "workers": 0, **data})
        return loop_tests.make_job(tmp_path / "job", shown, data=settings)

    whole = files.batch(torch.arange(12), "cpu")[0]
    assert torch.equal(raw_images(job(), 0, 4), whole)
    pieces = raw_images(job(train_crop="random"), 0, 4)
    assert torch.equal(raw_images(job(train_crop="random"), 0, 6), pieces)
    assert torch.equal(raw_images(job(train_crop="random", workers=2), 0, 3), pieces)
    others = (raw_images(job(train_crop="random"), 1, 4), raw_images(job(train_crop="random", crop_area=(1, 1)), 0, 4))
    assert all(not torch.equal(pieces, one) for one in (whole, *others))
    reduced = raw_images(job(train_decode="reduced"), 0, 4)
    assert torch.equal(reduced[:8], whole[:8]) and not torch.equal(reduced[8:], whole[8:])
