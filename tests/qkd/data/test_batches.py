"""Order and batches: seeded, complete, and able to start in mid-epoch."""

from __future__ import annotations

import pytest
import torch

from qkd.data import MemorySplit, epoch_order, iterate, normalize


def split(n: int = 23) -> MemorySplit:
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 2, 4, 4)
    return MemorySplit(images, torch.arange(n))


def test_an_epoch_visits_every_image_once_in_a_seeded_order() -> None:
    first, again, other = (epoch_order(50, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert sorted(first.tolist()) == list(range(50))
    assert torch.equal(first, again) and not torch.equal(first, other)
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(epoch_order(50, generator), epoch_order(50, generator))
    with pytest.raises(ValueError, match="n=-1"):
        epoch_order(-1, generator)


@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_keep_the_order_and_images_their_labels(drop_last: bool) -> None:
    order = epoch_order(23, torch.Generator().manual_seed(0))
    batches = list(iterate(split(), order, 5, "cpu", drop_last=drop_last))
    assert [len(labels) for _, labels in batches] == [5] * 4 + ([] if drop_last else [3])
    labels = torch.cat([labels for _, labels in batches])
    assert torch.equal(labels, order[: len(labels)])
    for images, labels in batches:
        assert images.dtype == torch.uint8 and images.shape[1:] == (2, 4, 4)
        assert torch.equal(images[:, 1, 2, 3].long(), labels)


def test_an_epoch_can_be_resumed_at_any_step() -> None:
    order = epoch_order(23, torch.Generator().manual_seed(0))
    whole = list(iterate(split(), order, 5, "cpu", drop_last=True))
    for step in range(5):
        rest = list(iterate(split(), order[step * 5 :], 5, "cpu", drop_last=True))
        assert len(rest) == len(whole) - step
        for (images, labels), (other_images, other_labels) in zip(rest, whole[step:], strict=True):
            assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_fewer_images_than_a_batch() -> None:
    indices = torch.arange(3)
    assert list(iterate(split(), indices, 5, "cpu", drop_last=True)) == []
    assert len(next(iter(iterate(split(), indices, 5, "cpu", drop_last=False)))[1]) == 3
    assert list(iterate(split(), indices[:0], 5, "cpu", drop_last=False)) == []


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (4, -1)])
def test_wrong_numbers_are_refused(batch_size: int, workers: int) -> None:
    with pytest.raises(ValueError, match="batch_size must be positive"):
        iterate(split(), torch.arange(3), batch_size, "cpu", drop_last=False, workers=workers)


def test_normalizing_gives_zero_mean_and_unit_spread() -> None:
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fractions = images.double() / 255
    mean, std = fractions.mean((0, 2, 3)), fractions.std((0, 2, 3), correction=0)
    out = normalize(images, mean.tolist(), std.tolist())
    assert out.dtype == torch.float32
    expected = (fractions - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert images.dtype == torch.uint8


def test_normalizing_refuses_what_does_not_fit() -> None:
    images = torch.zeros((1, 3, 4, 4), dtype=torch.uint8)
    with pytest.raises(TypeError, match="uint8"):
        normalize(images.float(), (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="3 channels, but mean has 1"):
        normalize(images, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="std must be positive"):
        normalize(images, (0, 0, 0), (1, 0, 1))


def test_a_split_checks_its_tensors() -> None:
    with pytest.raises(TypeError, match="images must be uint8 and labels int64"):
        MemorySplit(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels"):
        MemorySplit(torch.zeros((2, 1, 4, 4), dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("drop_last", [True, False])
def test_what_follows_a_batch_comes_with_it_and_begins_the_next(drop_last: bool) -> None:
    order = torch.randperm(23)
    around = torch.cat([order, order[:1]])
    found = [labels for _, labels in iterate(split(), around, 5, "cpu", drop_last=drop_last, following=1)]
    starts = range(0, 20 if drop_last else 23, 5)
    assert [labels.tolist() for labels in found] == [around[start : start + 6].tolist() for start in starts]
    assert list(iterate(split(), order[:1], 5, "cpu", drop_last=drop_last, following=1)) == []
    with pytest.raises(ValueError, match="following=-1"):
        iterate(split(), order, 5, "cpu", drop_last=drop_last, following=-1)
