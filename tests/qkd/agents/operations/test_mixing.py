"""CutMix: boxes and shares agree, draws belong to images, and the share is the label's."""

from __future__ import annotations

import pytest
import torch

from qkd.agents import build_agent
from qkd.config import AgentConfig

MEAN = (0.5,)


def batch(count: int = 64, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that are one gray each, so that a pasted pixel tells where it came from."""
    levels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, side, side * 2)
    return levels.contiguous(), torch.arange(count)


def cutmix(**settings: float) -> AgentConfig:
    return AgentConfig(policy="cutmix", crop_padding=0, flip=False, **settings)


def shown(config: AgentConfig, images: torch.Tensor, labels: torch.Tensor, samples: torch.Tensor | None = None):
    agent = build_agent(config, epochs=2, mean=MEAN)
    return agent.with_labels(images, labels, generator=torch.Generator().manual_seed(3), epoch=0, samples=samples)


def test_share_is_the_area_that_comes_from_the_next_image() -> None:
    images, labels = batch()
    seen, mixed = shown(cutmix(cutmix=1.0), images, labels)
    assert mixed is not None
    own = (seen == images).flatten(1).float().mean(1)
    other = (seen == images.roll(-1, 0)).flatten(1).float().mean(1)
    assert torch.equal(own + other, torch.ones(64))
    assert torch.allclose(mixed.share, other)
    assert torch.equal(mixed.labels, labels.roll(-1))
    assert 0.2 < float(mixed.share.mean()) < 0.5  # U(0, 1) boxes have area 1/2, less what the border clips


def test_pasted_pixels_form_one_box() -> None:
    images, labels = batch()
    seen, mixed = shown(cutmix(cutmix=1.0), images, labels)
    assert mixed is not None
    for is_pasted in (seen != images)[:, 0]:
        rows, columns = is_pasted.any(1), is_pasted.any(0)
        assert int(is_pasted.sum()) == int(rows.sum()) * int(columns.sum())


def test_half_of_the_images_are_mixed_by_default() -> None:
    images, labels = batch(250)
    _, mixed = shown(cutmix(), images, labels)
    assert mixed is not None
    assert 90 < int((mixed.share > 0).sum()) < 150


def test_whether_and_where_an_image_is_cut_does_not_depend_on_its_batch() -> None:
    images, labels = batch()
    places = torch.arange(64)
    _, whole = shown(cutmix(), images, labels, places)
    _, part = shown(cutmix(), images[10:30], labels[10:30], places[10:30])
    assert whole is not None
    assert part is not None
    assert torch.equal(whole.share[10:30], part.share)


def test_any_policy_can_be_followed_by_it_and_others_are_untouched_by_it() -> None:
    images, labels = batch()
    plain, mixed = shown(AgentConfig(policy="trivial"), images, labels)
    assert mixed is None
    both, mixed = shown(AgentConfig(policy="trivial", cutmix=1.0), images, labels)
    assert mixed is not None
    alone = mixed.share == 0
    assert torch.equal(both[alone], plain[alone])
    assert not torch.equal(both, plain)


def test_the_main_label_is_that_of_the_larger_part() -> None:
    images, labels = batch()
    _, mixed = shown(cutmix(cutmix=1.0), images, labels)
    assert mixed is not None
    assert torch.equal(mixed.main(labels) == labels, mixed.share <= 0.5)


def test_none_with_cutmix_is_refused() -> None:
    with pytest.raises(ValueError, match="agent.cutmix: policy `none`"):
        build_agent(AgentConfig(policy="none", cutmix=0.5), epochs=1, mean=MEAN)


def test_what_is_shown_does_not_depend_on_how_an_epoch_is_cut_into_batches() -> None:
    """With the image after a batch behind it, the box of its last image comes from that one, not from its first."""
    images, labels = batch()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    around = torch.cat([order, order[:1]])
    config = AgentConfig(policy="trivial", cutmix=1.0)
    assert build_agent(config, epochs=2, mean=MEAN).following == 1
    assert build_agent(AgentConfig(policy="trivial"), epochs=2, mean=MEAN).following == 0

    def epoch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = []
        for start in range(0, 64, size):
            places = around[start : start + size + 1]
            seen, mixed = shown(config, images[places], labels[places], places)
            assert mixed is not None
            mixed = mixed.first(len(places) - 1)
            parts.append((seen[:-1], mixed.labels, mixed.share))
        seen, second, share = (torch.cat(list(one)) for one in zip(*parts, strict=True))
        return seen, second, share

    whole = epoch(64)
    assert torch.equal(whole[1], labels[around[1:]])
    for size in (1, 7, 32):
        assert all(torch.equal(one, other) for one, other in zip(whole, epoch(size), strict=True))
