"""Domains: what is done to images, that each is in one domain, and that nobody sees labels of the unseen one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from qkd.config import DataConfig, DomainConfig
from qkd.data import DataError, MemorySplit, Splits, image_shape, iterate, load_splits, read_facts
from qkd.data.domains import DomainSplit, changed, divide_domains, domain_mark, turned
from qkd.data.splits import Parts

KINDS: dict[str, Any] = {"upright": {}, "turned": {"rotate": 30}, "inverted": {"invert": True}}
RED = {"color": [1, 0.5, 0]}


def digits(unseen: str = "turned", kinds: dict[str, Any] = KINDS, **settings: Any) -> Splits:
    return load_splits(DataConfig(name="digits", domains=kinds, unseen_domain=unseen, **settings), seed=0)


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("degrees", "quarters"), [(0, 0), (90, 1), (180, 2), (-90, 3), (-180, 2)])
def test_quarter_turns_are_exact(degrees: float, quarters: int) -> None:
    assert torch.equal(turned(images(3, 2, 5, 5), degrees), torch.rot90(images(3, 2, 5, 5), quarters, (2, 3)))


@pytest.mark.parametrize("shape", [(9, 9), (8, 6)])
@pytest.mark.parametrize("degrees", [30.0, -45.0, 90.0, 135.0])
def test_a_turn_is_bilinear_about_the_center(shape: tuple[int, int], degrees: float) -> None:
    """Each pixel is the mean of the four around the place that it comes from, on black: in plain numpy."""
    height, width = shape
    source = images(1, 1, height, width)[0, 0].double().numpy()
    expected = np.zeros(shape)
    angle = math.radians(degrees)
    for row in range(height):
        for column in range(width):
            x, y = column - (width - 1) / 2, (height - 1) / 2 - row  # y upward
            back = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
            at = (height - 1) / 2 - back[1], (width - 1) / 2 + back[0]
            low = math.floor(at[0]), math.floor(at[1])
            for i in (low[0], low[0] + 1):
                for j in (low[1], low[1] + 1):
                    if 0 <= i < height and 0 <= j < width:
                        expected[row, column] += source[i, j] * (1 - abs(at[0] - i)) * (1 - abs(at[1] - j))
    found = turned(images(1, 1, height, width), degrees)[0, 0].double().numpy()
    assert np.abs(found - expected).max() <= 0.5 + 1e-6


def test_inverted_and_colored() -> None:
    pixels = torch.tensor([[[[0, 100], [255, 3]]]], dtype=torch.uint8)
    made = changed(pixels, DomainConfig(invert=True, color=(1, 0.5, 0)), channels=3)
    assert made[0, 0].tolist() == [[255, 155], [0, 252]]
    assert made[0, 1].tolist() == [[128, 78], [0, 126]]  # halves to the even number
    assert not made[0, 2].any()
    assert torch.equal(changed(pixels, DomainConfig(), channels=3), pixels.expand(-1, 3, -1, -1))


def test_every_training_image_is_in_one_domain_and_the_test_in_the_unseen_one() -> None:
    splits, plain = digits(val_fraction=0.0), load_splits(DataConfig(name="digits", val_fraction=0.0), seed=0)
    assert splits.target is not None
    assert len(splits.train) + len(splits.target) == len(plain.train) == 1438
    assert len(splits.target) == pytest.approx(1438 / 3, abs=1)
    assert isinstance(splits.train, DomainSplit) and splits.train.numbers.unique().tolist() == [0, 2]
    tested, _ = splits.test.batch(torch.arange(20), "cpu")
    assert torch.equal(tested, turned(plain.test.batch(torch.arange(20), "cpu")[0], 30))
    seen = {bytes(one.numpy()) for one in splits.train.split.batch(torch.arange(len(splits.train)), "cpu")[0]}
    hidden = splits.target._split
    assert isinstance(hidden, DomainSplit)
    assert not seen & {bytes(one.numpy()) for one in hidden.split.batch(torch.arange(len(hidden)), "cpu")[0]}


def test_domains_are_the_same_for_every_seed_and_order_of_images_stays() -> None:
    config = DataConfig(name="digits", domains=KINDS, unseen_domain="turned", val_fraction=0.0)
    first, other = (load_splits(config, seed=seed).train for seed in (0, 1))
    places = torch.tensor([5, 900, 3])
    assert torch.equal(first.batch(places, "cpu")[0], other.batch(places, "cpu")[0])
    part = first.subset(places)
    assert torch.equal(part.batch(torch.arange(3), "cpu")[0], first.batch(places, "cpu")[0])
    assert torch.equal(part.labels, first.labels[places])


def test_labels_of_the_unseen_domain_are_not_to_be_had() -> None:
    target = digits().target
    assert target is not None
    with pytest.raises(DataError, match="not available in training"):
        _ = target.labels
    assert target.batch(torch.arange(3), "cpu")[1].tolist() == [-1, -1, -1]
    assert target.subset(torch.arange(3)).to("cpu").image_shape == (1, 8, 8)


def test_colors_make_gray_images_color_in_all_domains() -> None:
    config = DataConfig(name="digits", domains={"gray": {}, "red": RED}, unseen_domain="red")
    splits = load_splits(config, seed=0)
    assert splits.channels == image_shape(config).channels == 3 and splits.train.image_shape == (3, 8, 8)
    assert splits.mean[0] == splits.mean[1] == splits.mean[2], "the seen domain is gray"
    assert image_shape(DataConfig(name="digits", domains=KINDS, unseen_domain="turned")).channels == 1


def test_another_domain_is_another_fingerprint_of_the_same_set() -> None:
    plain = load_splits(DataConfig(name="digits"), seed=0)
    others = [digits("turned"), digits("upright"), digits(kinds={**KINDS, "turned": {"rotate": 31}})]
    assert len({one.fingerprint for one in (plain, *others)}) == 4
    config = DataConfig(name="digits", domains=KINDS, unseen_domain="turned")
    assert others[0].facts == plain.facts == read_facts(config)
    backward = DataConfig(name="digits", domains=dict(reversed(list(KINDS.items()))), unseen_domain="turned")
    assert domain_mark("x", config) != domain_mark("x", backward), "the order says which image is where"


def test_a_validation_part_of_the_set_stays_in_the_seen_domains() -> None:
    train = MemorySplit(images(12, 1, 4, 4), torch.arange(12) % 2)
    parts = Parts(train, train.subset(torch.arange(2)), ("a", "b"), val_rows=torch.arange(8, 12))
    config = DataConfig(name="digits", domains=KINDS, unseen_domain="turned")
    made, target = divide_domains(parts, config)
    assert made.val_rows is not None and len(made.train) == 8
    seen = made.train.batch(made.val_rows, "cpu")[1]
    assert len(made.val_rows) + len(target) + (len(made.train) - len(made.val_rows)) <= 12 and len(seen) <= 4
    assert "unseen domain turned" in made.test_words


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"domains": {"a": {}}, "unseen_domain": "a"}, "at least two"),
        ({"domains": KINDS}, "must name one of upright, turned, inverted, got nothing"),
        ({"domains": KINDS, "unseen_domain": "left"}, "got `left`"),
        ({"unseen_domain": "left"}, "at least two"),
        ({"domains": {**KINDS, "a": {"rotate": 181}}, "unseen_domain": "turned"}, "less than or equal to 180"),
        ({"domains": {**KINDS, "a": {"color": [1, 2, 0]}}, "unseen_domain": "turned"}, "less than or equal to 1"),
        ({"domains": {**KINDS, "a b": {}}, "unseen_domain": "turned"}, "pattern"),
        ({"domains": {**KINDS, "a": {"turn": 3}}, "unseen_domain": "turned"}, "Extra inputs"),
    ],
)
def test_what_a_config_may_not_say(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        DataConfig(name="digits", **settings)


def test_more_domains_than_images_are_refused() -> None:
    tiny = MemorySplit(images(2, 1, 4, 4), torch.arange(2))
    with pytest.raises(DataError, match="2 training images are not enough for 3 domains"):
        divide_domains(Parts(tiny, tiny, ("a", "b")), DataConfig(name="digits", domains=KINDS, unseen_domain="turned"))


def test_images_of_a_folder_are_changed_when_they_are_decoded(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for kind in ("a", "b"):
            (tmp_path / part / kind).mkdir(parents=True)
            for index in range(4):
                pixels = images(1, 1, 6, 6)[0, 0].numpy() // 2 + 10 * index
                Image.fromarray(pixels).save(tmp_path / part / kind / f"{index}.png")
    settings: dict[str, Any] = {"name": "folder", "path": tmp_path, "val_fraction": 0.0, "workers": 2}
    domains = {"upright": {}, "inverted": {"invert": True}}
    plain = load_splits(DataConfig(**settings), seed=0)
    splits = load_splits(DataConfig(**settings, domains=domains, unseen_domain="inverted"), seed=0)
    assert splits.target is not None and len(splits.train) == len(splits.target) == 4 and splits.train.decodes
    order = torch.arange(8)
    found = torch.cat([one for one, _ in iterate(splits.test, order, 3, "cpu", drop_last=False, workers=2)])
    expected = torch.cat([one for one, _ in iterate(plain.test, order, 3, "cpu", drop_last=False)])
    assert torch.equal(found, 255 - expected)
