"""Where batches come from: the loop takes any source, and resumes it at the step where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import beside
import pytest
import torch

from qkd.data import Splits
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
