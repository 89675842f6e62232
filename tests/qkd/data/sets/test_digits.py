"""The digits, as they come and enlarged: the same pixels on every machine, equal to bilinear interpolation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qkd.config import DataConfig
from qkd.data.errors import DataError
from qkd.data.loading.load import load_splits
from qkd.data.sets.digits import enlarged, load_digits_splits


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (24, 24), (32, 32), (9, 13)])
def test_enlarged_images_are_those_of_bilinear_interpolation(size: tuple[int, int]) -> None:
    small, large = load_digits_splits().test, load_digits_splits(size).test
    rows = torch.arange(20)
    (before, labels), (after, same) = small.batch(rows, "cpu"), large.batch(rows, "cpu")
    expected = functional.interpolate(before.float(), size, mode="bilinear", align_corners=False)
    assert after.dtype == torch.uint8 and after.shape == (20, 1, *size)
    # columns are rounded before rows are taken: half a level of the first rounding, half of the second
    assert (after.float() - expected).abs().max() <= 1.0 and torch.equal(labels, same)


def test_a_worked_row() -> None:
    row = torch.tensor([[0, 100]])
    assert enlarged(row, 4).tolist() == [[0, 25, 75, 100]]
    assert enlarged(row, 2) is row
    assert enlarged(torch.tensor([[0, 1]]), 4).tolist() == [[0, 0, 1, 1]]


def test_a_config_enlarges_the_digits_and_facts_tell_the_sizes_apart() -> None:
    small, large = (load_splits(DataConfig(name="digits", image_size=side), 0) for side in (None, 24))
    assert (small.image_size, large.image_size) == (8, 24) and large.resize == "none"
    assert len(small.test) == len(large.test) and small.fingerprint != large.fingerprint


@pytest.mark.parametrize("size", [7, (8, 4)])
def test_smaller_digits_are_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(
        DataError, match=r"data\.image_size: digits are 8x8 pixels and can be enlarged, but not reduced to"
    ):
        load_digits_splits(size)
