"""Orientations: which row is which, what a label becomes, and what joint probabilities say of the class."""

from __future__ import annotations

import pytest
import torch

from qkd.losses.turns import class_log_probabilities, joint_labels, turn_images, upright


def test_rows_of_an_image_stand_side_by_side_and_turn_counter_clockwise() -> None:
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    turned = turn_images(images)
    assert turned.shape == (8, 3, 4, 4) and turned.dtype == images.dtype
    for image in range(2):
        for turn in range(4):
            assert torch.equal(turned[4 * image + turn], torch.rot90(images[image], turn, (1, 2)))
    # the upper right corner comes to the upper left after a quarter turn
    assert turned[1, 0, 0, 0] == images[0, 0, 0, 3]


def test_upright_rows_are_the_images() -> None:
    images = torch.randn(5, 1, 3, 3)
    assert torch.equal(upright(turn_images(images)), images)


def test_labels_of_class_and_orientation() -> None:
    assert joint_labels(torch.tensor([3, 0])).tolist() == [12, 13, 14, 15, 0, 1, 2, 3]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(layout: torch.memory_format) -> None:
    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=layout)
    turned = turn_images(images)
    assert turned.is_contiguous(memory_format=layout)
    assert torch.equal(turned, turn_images(images.contiguous()))


def test_joint_probabilities_summed_over_orientations_are_a_distribution() -> None:
    joint = torch.randn(6, 12, dtype=torch.float64)
    log = class_log_probabilities(joint)
    assert log.shape == (6, 3)
    assert torch.allclose(log.exp().sum(1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(log.exp(), torch.softmax(joint, 1).reshape(6, 3, 4).sum(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("joint", [torch.zeros(1, 8), torch.full((1, 8), 1e4), 1e4 * torch.eye(8)[:1]])
def test_class_probabilities_of_extreme_logits_are_finite_enough(joint: torch.Tensor) -> None:
    joint = joint.requires_grad_()
    class_log_probabilities(joint).sum().backward()
    assert joint.grad is not None and bool(joint.grad.isfinite().all())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: turn_images(torch.zeros(2, 1, 4, 5)), r"only square images.*got \(2, 1, 4, 5\); crop or resize"),
        (lambda: turn_images(torch.zeros(1, 4, 4)), "only square images"),
        (lambda: joint_labels(torch.zeros(2, 2, dtype=torch.int64)), r"need labels \[batch\], got \(2, 2\)"),
        (lambda: upright(torch.zeros(6, 2)), r"four rows per image, got shape \(6, 2\)"),
        (lambda: upright(torch.tensor(1.0)), "four rows per image"),
        (lambda: class_log_probabilities(torch.zeros(2, 6)), r"joint logits .*got \(2, 6\)"),
        (lambda: class_log_probabilities(torch.zeros(8)), "joint logits"),
    ],
)
def test_refusals(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()  # type: ignore[operator]
