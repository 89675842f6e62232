"""Layers matched by what they tell about the class: the estimate, the pairs, what is refused."""

from __future__ import annotations

import pytest
import torch

from qkd.analysis.matching import LayerMatch, class_information, flow_divergence, match_layers


def test_the_nearest_mean_of_the_other_half() -> None:
    # class 0 at 0, 2 | 10 and class 1 at 8, 6 | 6: halves (places 0, 2 and 1, 3 of each class) have means
    # 0: (0 + 10) / 2 = 5 and 2; 1: (8 + 6) / 2 = 7 and 6.
    features = torch.tensor([0.0, 2.0, 10.0, 8.0, 6.0, 6.0]).unsqueeze(1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    # second half with the first's means 5 and 7: 2 -> 0 right; class 1's 6 is between, the first mean is taken: wrong
    # first half with the second's means 2 and 6: 0 right, 10 wrong; 8 and 6 right
    assert class_information(features, labels) == pytest.approx(4 / 6)


def test_classes_apart_tell_all_and_noise_tells_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    noise = torch.randn(400, 3, 5, 5, generator=generator)
    assert class_information(noise + 10 * labels.reshape(-1, 1, 1, 1), labels) == 1
    # many dimensions do not help: the means come from other images
    assert class_information(noise, labels) == pytest.approx(0.25, abs=0.08)


def test_scale_and_shift_tell_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 4, generator=generator, dtype=torch.float64) + labels.unsqueeze(1)
    assert class_information(features, labels) == class_information(1e4 * features + 7, labels)
    assert class_information(torch.zeros(60, 4), labels) == pytest.approx(1 / 3)  # all ties: one class is right


def test_a_class_with_one_image_is_left_out() -> None:
    features = torch.tensor([[0.0], [0.1], [5.0], [5.1], [99.0]])
    assert class_information(features, torch.tensor([0, 0, 1, 1, 2])) == 1


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), "a row for each of 4 labels"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long), "a row for each of 4 labels"),
        (torch.zeros(3, 2), torch.arange(3), "one class must have two images"),
    ],
)
def test_what_cannot_be_scored(features: torch.Tensor, labels: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        class_information(features, labels)


def test_layers_follow_the_nearest_and_the_last_the_last() -> None:
    matches = match_layers({"a": 0.4, "b": 0.54, "c": 0.6}, {"x": 0.5, "y": 0.6, "z": 0.9})
    assert matches == (LayerMatch("a", 0.4, "x", 0.5), LayerMatch("b", 0.54, "x", 0.5), LayerMatch("c", 0.6, "z", 0.9))
    assert flow_divergence(matches) == pytest.approx(0.1**2 + 0.04**2 + 0.3**2)


def test_the_same_flow_matches_one_to_one() -> None:
    flow = {"one": 0.3, "two": 0.5, "three": 0.8}
    matches = match_layers(flow, flow)
    assert [(one.student, one.teacher) for one in matches] == [(name, name) for name in flow]
    assert flow_divergence(matches) == 0


def test_no_layers() -> None:
    with pytest.raises(ValueError, match="layers to match are missing"):
        match_layers({}, {"x": 0.5})


def test_distances_far_from_the_origin_keep_their_digits() -> None:
    torch.manual_seed(0)
    labels = torch.arange(600) % 10
    features = torch.randn(10, 64)[labels] + 0.1 * torch.randn(600, 64)
    for offset in (0.0, 1e3, 1e4):
        assert class_information(features + offset, labels) == 1.0


def test_features_that_are_not_finite_say_nothing() -> None:
    features = torch.randn(20, 3)
    features[3, 1] = float("nan")
    with pytest.raises(ValueError, match="not all finite"):
        class_information(features, torch.arange(20) % 2)
