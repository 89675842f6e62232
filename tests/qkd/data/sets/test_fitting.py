"""What `predict.py` may not import from the toolkit is the same in both: rules, formats and sizes of images."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qkd.config import DataConfig
from qkd.data.sets import Fit, images
from qkd.predicting import predict

SIDES = st.integers(1, 60)


def test_formats_rules_and_bounds_are_those_of_training() -> None:
    assert set(predict.FORMATS) == set(images.FORMATS.values())
    assert predict.MOST_PIXELS == images.MOST_PIXELS
    assert get_args(DataConfig.model_fields["resize"].annotation) == predict.RULES


@given(
    rule=st.sampled_from(predict.RULES), resize_size=st.none() | SIDES, how=st.sampled_from(["bilinear", "bicubic"]),
    found=st.tuples(SIDES, SIDES), wanted=st.tuples(SIDES, SIDES),
)  # fmt: skip
def test_an_image_of_any_size_has_the_pixels_of_training(
    rule: str, resize_size: int | None, how: str, found: tuple[int, int], wanted: tuple[int, int]
) -> None:
    fit = Fit(rule, resize_size if rule == "crop" else None, how)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, found[::-1], np.uint8))
    facts = {"input_mean": [0.5], "input_size": list(wanted[::-1]), "resize": fit.name}
    assert Fit.named(fit.name) == fit
    assert np.array_equal(predict.fit_image(image, facts, "it")[..., 0], np.asarray(fit(image, wanted)))


@pytest.mark.parametrize("name", ["zoom", "crop:", "pad:sinc", "crop:bicubic:7"])
def test_a_word_that_is_no_rule_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be crop, stretch or pad"):
        Fit.named(name)
