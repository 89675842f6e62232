"""What a teacher tells: worked numbers, teachers that tell nothing, the known failures, and the claim on geometry."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qkd.analysis.diagnosis import (
    FLAT_STD,
    REFERENCE_TEMPERATURE,
    SMOOTHED_RELATION,
    SMOOTHED_SHARE,
    SURE_DOUBT,
    SURE_STD,
    Knowledge,
    class_relations,
    find_failures,
    geometry_agreement,
    relation_contrast,
    teacher_knowledge,
)
from qkd.losses.stable import unit_rows


def logits(images: int = 40, classes: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_worked_by_hand() -> None:
    p = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)
    told = teacher_knowledge(p.log(), torch.tensor([0, 0, 1]))
    assert told.confidence_mean == pytest.approx((0.6 + 0.8 + 0.5) / 3)
    assert told.confidence_std == pytest.approx(
        math.sqrt((0.1 / 3) ** 2 + (0.5 / 3) ** 2 + (0.4 / 3) ** 2) / math.sqrt(2)
    )
    entropies = [sum(-x * math.log(x) for x in row) for row in p.tolist()]
    assert told.entropy == pytest.approx(sum(entropies) / 3)
    # class 0 has the mean distribution 0.7, 0.2, 0.1; class 1 has one image, which is its own mean
    first = 0.6 * math.log(0.6 / 0.7) + 0.3 * math.log(0.3 / 0.2)
    second = 0.8 * math.log(0.8 / 0.7) + 0.1 * math.log(0.1 / 0.2)
    assert told.instance_information == pytest.approx((first + second) / 3)
    # the wrong classes of class 0 share 2 : 1, those of class 1 share 0.2 : 0.3
    halves = [2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3), 0.4 * math.log(0.8) + 0.6 * math.log(1.2)]
    assert told.relation_information == pytest.approx(sum(halves) / 2)
    assert told.uniform_share == pytest.approx(3 * 0.1)  # median of 0.3, 0.3, 0.6
    assert told.equivalent_smoothing == pytest.approx(3 * (1 - 1.9 / 3) / 2)
    # columns (0.6, 0.8, 0.2) and (0.3, 0.1, 0.5), from their means (1/15, 4/15, -1/3) and (0, -0.2, 0.2)
    r01 = (-0.2 * 4 / 15 - 0.2 / 3) / math.sqrt((1 / 15**2 + (4 / 15) ** 2 + 1 / 9) * 0.08)
    assert class_relations(p.log())[0, 1].item() == pytest.approx(r01)
    assert told.contrast is None


def test_relations_are_pearson_correlations() -> None:
    v = logits()
    for temperature in (1.0, 4.0):
        expected = torch.corrcoef((v / temperature).softmax(1).T)
        assert torch.allclose(class_relations(v, temperature=temperature), expected, atol=1e-12)


def test_a_temperature_is_a_division() -> None:
    v, labels = logits(), torch.arange(40) % 5
    warm = teacher_knowledge(v, labels, temperature=3.0)
    assert dataclasses.replace(warm, temperature=1.0) == teacher_knowledge(v / 3, labels)


def test_a_table_of_classes_has_no_instance_information() -> None:
    labels = torch.arange(40) % 5
    same = logits(5)[labels]
    told = teacher_knowledge(same, labels)
    assert told.instance_information == pytest.approx(0, abs=1e-14)
    assert teacher_knowledge(logits(), labels).instance_information > 0.1


def test_label_smoothing_is_seen_for_what_it_is() -> None:
    labels = torch.arange(40) % 5
    smoothed = 0.7 * functional.one_hot(labels, 5).double() + 0.3 / 5
    told = teacher_knowledge(smoothed.log(), labels)
    assert told.uniform_share == pytest.approx(0.3)  # exactly the smoothing that is in it
    assert told.equivalent_smoothing == pytest.approx(0.3)
    assert told.relation_information == pytest.approx(0, abs=1e-14)
    assert told.relation_spread == pytest.approx(0, abs=1e-12)
    assert told.confidence_std == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("kind", ["zeros", "constant", "huge", "one-hot", "huge negative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_teachers_give_finite_measures(kind: str, dtype: torch.dtype) -> None:
    labels = torch.arange(12) % 4
    hot = functional.one_hot(labels, 4).to(dtype)
    v = {"zeros": 0 * hot, "constant": 0 * hot + 7, "huge": 1e4 * hot, "one-hot": hot, "huge negative": -1e4 * hot}[
        kind
    ]
    for temperature in (1.0, 4.0):
        told = teacher_knowledge(v, labels, temperature=temperature, superclasses=[0, 0, 1, 1])
        assert all(math.isfinite(value) for value in told.to_json().values() if value is not None)
        assert told.instance_information == pytest.approx(0, abs=1e-6)
    if kind in ("zeros", "constant"):
        assert bool((class_relations(v) == 0).all())  # no column varies
        assert told.uniform_share == pytest.approx(1)


def test_contrast_by_hand_and_with_temperature() -> None:
    relations = torch.tensor([[1, 0.5, 0.1, -0.1], [0.5, 1, 0.2, 0], [0.1, 0.2, 1, 0.3], [-0.1, 0, 0.3, 1]])
    within, between = relation_contrast(relations, [7, 7, 2, 2])
    assert within == pytest.approx(0.4) and between == pytest.approx(0.05)
    # a teacher that gives a class's sibling the larger rest: seen when softened
    labels = torch.arange(400) % 4
    v = 0.3 * logits(400, 4) + 9 * functional.one_hot(labels, 4) + 4 * functional.one_hot(labels ^ 1, 4)
    soft = teacher_knowledge(v, labels, temperature=4.0, superclasses=[0, 0, 1, 1])
    hard = teacher_knowledge(v, labels, temperature=1.0, superclasses=[0, 0, 1, 1])
    assert soft.contrast is not None and hard.contrast is not None
    assert soft.contrast > hard.contrast + 0.3 and soft.to_json()["contrast"] == soft.contrast
    assert abs(hard.contrast) < 0.05


# --- geometry


def test_geometry_holds_with_rows_of_one_norm_and_no_bias() -> None:
    h, w = logits(50, 8), unit_rows(logits(6, 8, seed=1))
    labels = torch.arange(50) % 6
    assert geometry_agreement(h, w, h @ w.T, labels) == 1.0
    assert geometry_agreement(h, w, -(h @ w.T), labels) == 0.0
    uneven = w * torch.tensor([0.1, 0.3, 1, 2, 4, 8], dtype=torch.float64).unsqueeze(1)
    assert 0.2 < geometry_agreement(h, uneven, h @ uneven.T, labels) < 0.95


def test_geometry_by_hand() -> None:
    h = torch.tensor([[0.0], [0.0]])
    w = torch.tensor([[9.0], [1.0], [2.0], [-3.0]])
    # true class 0; nearness of the others: 1, 2, 3. Orders 1 > 2 and 1 > 3 agree in the first row, 2 > 3 is a tie
    v = torch.tensor([[0.0, 3.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    assert geometry_agreement(h, w, v, torch.tensor([0, 0])) == pytest.approx((2.5 + 0) / 6)


def test_geometry_of_many_classes_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, v = logits(30, 8), logits(6, 8, seed=1), logits(30, 6, seed=2)
    labels = torch.arange(30) % 6
    whole = geometry_agreement(h, w, v, labels)
    monkeypatch.setattr("qkd.analysis.diagnosis.PAIR_VALUES", 40)  # two images at a time
    assert geometry_agreement(h, w, v, labels) == pytest.approx(whole, abs=1e-15)
    naive = [
        float(((h[i] - w[a]).norm() < (h[i] - w[b]).norm()) == (v[i, a] > v[i, b]))
        for i in range(30) for a in range(6) for b in range(a) if labels[i] not in (a, b)
    ]  # fmt: skip
    assert whole == pytest.approx(sum(naive) / len(naive))


# --- known failures, with the measured teachers of the module's table


def told(temperature: float, **values: float) -> Knowledge:
    usual = dict.fromkeys((field.name for field in dataclasses.fields(Knowledge)), 0.5)
    return Knowledge(
        **{**usual, "temperature": temperature, "within_contrast": None, "between_contrast": None, **values}
    )


TEACHERS = {  # p_t, its std, K min p at temperature 1; its std and relation information at temperature 4
    "plain 0": (0.9993, 0.005149, 6.4e-9, 0.09264, 0.2175, ()),
    "plain 1": (0.9995, 0.002801, 1.7e-8, 0.1025, 0.2042, ()),
    "smoothed 0.05": (0.9557, 0.01664, 0.02536, 0.01591, 6.6e-4, ("label_smoothed", "no_instance_knowledge")),
    "smoothed 0.1": (0.9095, 0.02211, 0.06089, 0.01046, 3.5e-4, ("label_smoothed", "no_instance_knowledge")),
    "smoothed 0.2": (0.8201, 0.02631, 0.1452, 0.006638, 1.1e-4, ("label_smoothed", "no_instance_knowledge")),
    "over-trained 0": (0.99997, 8.9e-5, 3.2e-9, 0.07053, 0.1612, ("over_confident",)),
    "over-trained 1": (0.99996, 1.0e-4, 3.4e-9, 0.07076, 0.1425, ("over_confident",)),
    "Fashion-MNIST, plain": (0.7681, 0.2812, 3.6e-5, 0.1475, 0.2145, ()),
    "Fashion-MNIST, smoothed 0.1": (0.7007, 0.2618, 0.02917, 0.05697, 0.02446, ("label_smoothed",)),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_measured_teachers_are_told_apart(name: str) -> None:
    mean, std, share, soft_std, relation, expected = TEACHERS[name]
    plain = told(1.0, confidence_mean=mean, confidence_std=std, uniform_share=share)
    soft = told(REFERENCE_TEMPERATURE, confidence_std=soft_std, relation_information=relation)
    assert tuple(finding.name for finding in find_failures(plain, soft, soft)) == expected


@pytest.mark.parametrize(
    ("name", "plain", "soft"),
    [
        ("over_confident", {"confidence_mean": 1 - SURE_DOUBT / 2, "confidence_std": SURE_STD / 2}, {}),
        ("label_smoothed", {"uniform_share": 2 * SMOOTHED_SHARE}, {"relation_information": SMOOTHED_RELATION / 2}),
        ("no_instance_knowledge", {}, {"confidence_std": FLAT_STD / 2}),
    ],
)
def test_each_condition_is_needed(name: str, plain: dict[str, float], soft: dict[str, float]) -> None:
    def names(one: dict[str, float], other: dict[str, float]) -> list[str]:
        softened = told(4.0, **other)
        return [
            finding.name
            for finding in find_failures(
                told(1.0, uniform_share=0.0) if not one else told(1.0, **one), softened, softened
            )
        ]

    found = find_failures(told(1.0, **plain), told(4.0, **soft), told(4.0, **soft))
    assert [finding.name for finding in found] == [name] and found[0].to_json()["sentence"] == found[0].sentence
    for key in plain:
        assert name not in names({other: value for other, value in plain.items() if other != key}, soft)
    for key in soft:
        assert name not in names(plain, {other: value for other, value in soft.items() if other != key})


def test_a_teacher_without_label_smoothing_is_not_called_smoothed() -> None:
    """One that has learned little has the same rows."""
    torch.manual_seed(0)
    noise, labels = torch.randn(400, 6, dtype=torch.float64) * 0.3, torch.arange(400) % 6
    plain, soft = (teacher_knowledge(noise, labels, temperature=value) for value in (1.0, REFERENCE_TEMPERATURE))
    names = {
        smoothing: [one.name for one in find_failures(plain, soft, soft, label_smoothing=smoothing)]
        for smoothing in (None, 0.0, 0.1)
    }
    assert names[0.0][0] == "wrong_classes_alike" and "label_smoothed" not in names[0.0]
    assert names[None][0] == names[0.1][0] == "label_smoothed"
    unknown, known = (
        find_failures(plain, soft, soft, label_smoothing=smoothing)[0].sentence for smoothing in (None, 0.1)
    )
    assert "one that has not learned much looks the same" in unknown and "learned" not in known


def test_two_classes_have_no_relations_to_erase() -> None:
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    two = torch.nn.functional.one_hot(labels, 2) * 4 + torch.randn(400, 2, dtype=torch.float64)
    plain, soft = (teacher_knowledge(two, labels, temperature=value) for value in (1.0, REFERENCE_TEMPERATURE))
    assert plain.classes == 2 and plain.uniform_share > SMOOTHED_SHARE and soft.relation_information == 0
    assert "label_smoothed" not in [one.name for one in find_failures(plain, soft, soft)]


def test_a_median_of_an_even_number_of_images_is_between_the_two() -> None:
    pair = torch.tensor([[8.0, 0.0, 0.0], [0.0, 0.0, 0.1]], dtype=torch.float64)
    smallest = torch.softmax(pair, 1).amin(1)
    found = teacher_knowledge(pair, torch.tensor([0, 2]))
    assert found.uniform_share == pytest.approx(3 * float(smallest.mean()))


def test_what_is_refused() -> None:
    v, labels = logits(), torch.arange(40) % 5
    cases = [
        (lambda: teacher_knowledge(v[0], labels), r"\[batch, classes\]"),
        (lambda: teacher_knowledge(v[:, :1], labels), "at least 2 classes"),
        (lambda: teacher_knowledge(v[:1], labels[:1]), "at least 2 images"),
        (lambda: teacher_knowledge(v, labels[:-1]), "labels"),
        (lambda: teacher_knowledge(v, labels, temperature=0.0), "temperature"),
        (lambda: teacher_knowledge(v * math.nan, labels), "not all finite"),
        (lambda: class_relations(v[:1]), "at least 2 images"),
        (lambda: relation_contrast(torch.eye(3), [0, 1]), "one superclass per class, got 2"),
        (lambda: relation_contrast(torch.eye(3), [0, 1, 2]), "at least two classes must share one"),
        (lambda: relation_contrast(torch.eye(3), [1, 1, 1]), "at least two classes must share one"),
        (lambda: geometry_agreement(v, v[:4], v, labels), "class weights"),
        (lambda: geometry_agreement(v[:, :2], v[:2, :2], v[:, :2], labels % 2), "at least 3 classes"),
        (lambda: find_failures(told(2.0), told(4.0), told(4.0)), "plain must be at temperature 1, got 2"),
        (lambda: find_failures(told(1.0), told(2.0), told(4.0)), "reference must be at temperature 4, got 2"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
