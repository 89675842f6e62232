"""The weighted sum: its value, its parts, and every fault of a list of terms."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from qkd.config import DEFAULT_TERMS, TermConfig
from qkd.losses import cross_entropy_loss, soft_target_loss
from qkd.losses.stable import device_type
from qkd.terms import LOSSES, Outputs, build_terms, check_terms

Z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
V = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0])


def outputs(**changes: Any) -> Outputs:
    return Outputs(**{"student_logits": Z, "labels": LABELS, "teacher_logits": V, **changes})


def term(loss: str, weight: float = 1.0, **changes: Any) -> TermConfig:
    return TermConfig(loss=loss, weight=weight, **changes)


@pytest.mark.parametrize("name", LOSSES)
def test_every_entry_fits_its_function(name: str) -> None:
    entry = LOSSES[name]
    parameters = inspect.signature(entry.function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert positional == list(entry.inputs)
    shaping = set(entry.module.options) if entry.module else set()
    assert shaping <= set(entry.options)
    assert set(entry.options) - shaping | ({"module"} if entry.module else set()) == set(keywords)
    needed = {key for key, default in keywords.items() if default is inspect.Parameter.empty}
    assert needed <= {key for key, option in entry.options.items() if option.default is not None}
    assert entry.summary and entry.source and "\n" not in entry.summary


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"graph_attention", "multi_head_graph"}))  # need modules
def test_reduced_precision_does_not_reach_a_loss(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    labels, clusters = torch.arange(16) % 4, torch.randn(4, 8, 4, 4, generator=generator).relu()

    def maps() -> torch.Tensor:  # images of a class nearly alike: products of bfloat16 could not tell them apart
        return (clusters[labels] + 0.03 * torch.randn(16, 8, 4, 4, generator=generator)).relu()

    student, teacher = ({"a": maps(), "b": maps()} for _ in range(2))
    logits = torch.randn(2, 16, 4, generator=generator)
    weights = torch.randn(4, 8, generator=generator)
    given = Outputs(logits[0], labels, logits[1], student, teacher, class_weights=weights)
    taps = (("a", "a"), ("b", "b")) if LOSSES[name].needs_taps else ()
    built = build_terms([term(name, taps=taps)])
    expected = built(given)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = built(given)[0]
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"graph_attention", "multi_head_graph"}))
def test_nor_does_it_reach_the_function_itself(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn(16, 8, 4, 4, generator=generator).relu().bfloat16() for _ in range(4)]
    logits = torch.randn(2, 16, 4, generator=generator).bfloat16()
    given: dict[str, Any] = {
        "student_logits": logits[0], "teacher_logits": logits[1], "labels": torch.arange(16) % 4,
        "other_labels": None, "other_share": None, "class_weights": torch.randn(4, 8, generator=generator),
        "student_feature": maps[0], "teacher_feature": maps[1],
        "student_stages": maps[:2], "teacher_stages": maps[2:],
    }  # fmt: skip

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(one) for one in value]
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    entry = LOSSES[name]
    options = {key: option.default for key, option in entry.options.items() if option.default is not None}
    shaping = entry.module.options if entry.module else ()
    options = {key: value for key, value in options.items() if key not in shaping}
    expected = entry.function(*(wide(given[key]) for key in entry.inputs), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = entry.function(*(given[key] for key in entry.inputs), **options)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_the_device_of_tensors_in_lists_is_found() -> None:
    there = torch.empty(1, device="meta")
    assert device_type([[there], [Z]]) == device_type([None, 3, [], (there,)]) == "meta"
    assert device_type([2.0, "x", []]) == "cpu"


def test_a_term_may_read_what_comes_before_the_grid() -> None:
    features = {"a": Z, "a@pre_quant": 2 * Z}
    for tap, expected in (("quantized", Z), ("pre_quant", 2 * Z)):
        built = build_terms([term("hint", taps=(("a", "b"),), tap=tap)])
        assert built.student_taps == ("a" if tap == "quantized" else "a@pre_quant",) and built.teacher_taps == ("b",)
        found = built(outputs(student_features=features, teacher_features={"b": V}))[0]
        assert torch.equal(found, (expected - V).square().mean())
    both = tuple((path, path) for path in ("a", "b"))
    built = build_terms([term("singular_vector", taps=both, tap="pre_quant")])
    assert built.student_taps == ("a@pre_quant", "b@pre_quant")
    assert check_terms([term("soft_target", tap="pre_quant")])[0].endswith(
        "soft_target does not read features; remove `tap`"
    )


def test_a_fault_of_a_batch_names_the_term_and_its_taps() -> None:
    rows = {"student_features": {"flatten": Z}, "teacher_features": {"flatten": V}}
    built = build_terms([term("attention_transfer", taps=(("flatten", "flatten"),))])
    with pytest.raises(ValueError, match=r"attention_transfer \(taps flatten and flatten\): need features \[batch"):
        built(outputs(**rows))
    with pytest.raises(ValueError, match=r"top_classes: classes must be 1 to 3"):
        build_terms([term("top_classes", options={"classes": 99})])(outputs())


@pytest.mark.parametrize("kind", [torch.int32, torch.float32, torch.bool])
def test_labels_are_int64(kind: torch.dtype) -> None:
    for name in ("cross_entropy", "decoupled", "teacher_confidence"):
        with pytest.raises(ValueError, match="labels must be int64"):
            build_terms([term(name)])(outputs(labels=LABELS.to(kind)))


@pytest.mark.parametrize("share", [-5.0, 2.0, float("nan")])
def test_shares_of_labels_are_shares(share: float) -> None:
    with pytest.raises(ValueError, match=r"other_share must be in \[0, 1\]"):
        cross_entropy_loss(Z, LABELS, LABELS, torch.full((4,), share))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, -1, 0], [0, 1, -100, 0]])
def test_labels_are_classes(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="labels must be 0 to 2 for 3 classes, got"):
        build_terms([term("cross_entropy")])(outputs(labels=torch.tensor(labels)))


def test_an_empty_batch_is_refused() -> None:
    empty = {"student_logits": Z[:0], "teacher_logits": V[:0], "labels": LABELS[:0]}
    for name in ("cross_entropy", "soft_target", "decoupled", "teacher_confidence"):
        with pytest.raises(ValueError, match="the batch is empty"):
            build_terms([term(name)])(outputs(**empty))


def test_what_tells_of_the_teacher_is_no_task() -> None:
    built = build_terms([term("cross_entropy"), term("class_relation"), term("soft_target")])
    found = built.weigh(outputs(class_weights=torch.eye(3)))
    assert found.task is not None and torch.equal(found.task, found.parts["cross_entropy"])


def test_there_are_losses() -> None:
    assert {"cross_entropy", "soft_target", "similarity_preserving"} <= set(LOSSES)


def test_the_default_terms_are_half_and_half() -> None:
    total, parts = build_terms(DEFAULT_TERMS)(outputs())
    hard, soft = cross_entropy_loss(Z, LABELS), soft_target_loss(Z, V, temperature=4.0)
    assert torch.equal(total, 0.5 * hard + 0.5 * soft)
    assert list(parts) == ["cross_entropy", "soft_target"]
    assert torch.equal(parts["cross_entropy"], hard) and torch.equal(parts["soft_target"], soft)


def test_options_reach_the_loss() -> None:
    built = build_terms([term("soft_target", options={"temperature": 2, "scale": 1, "reduction": "mean"})])
    expected = soft_target_loss(Z, V, temperature=2, scale=1, reduction="mean")
    assert torch.equal(built(outputs())[0], expected)


def test_label_smoothing_is_the_trainings_unless_the_term_has_its_own() -> None:
    total, _ = build_terms([term("cross_entropy")], label_smoothing=0.2)(outputs())
    assert torch.equal(total, cross_entropy_loss(Z, LABELS, label_smoothing=0.2))
    total, _ = build_terms([term("cross_entropy", options={"label_smoothing": 0})], label_smoothing=0.2)(outputs())
    assert torch.equal(total, cross_entropy_loss(Z, LABELS))


def test_weight_zero_leaves_the_term_out_and_needs_no_teacher() -> None:
    plain = build_terms([term("cross_entropy")])
    built = build_terms([term("cross_entropy"), term("soft_target", 0.0)])
    assert not built.needs_teacher and built.names == ("cross_entropy",)
    assert torch.equal(built(outputs(teacher_logits=None))[0], plain(outputs())[0])


def test_labels_may_be_left_out_of_the_loss() -> None:
    built = build_terms([term("soft_target")])
    total, parts = built(outputs(labels=LABELS.flip(0)))
    assert torch.equal(total, soft_target_loss(Z, V, temperature=4.0)) and list(parts) == ["soft_target"]


def test_a_loss_may_occur_twice() -> None:
    built = build_terms([term("soft_target", 0.5), term("soft_target", 0.25, options={"temperature": 1})])
    total, parts = built(outputs())
    assert list(parts) == ["soft_target", "soft_target_2"]
    assert torch.equal(total, parts["soft_target"] * 0.5 + parts["soft_target_2"] * 0.25)


def test_features_are_summed_over_the_pairs_of_taps() -> None:
    built = build_terms([term("similarity_preserving", taps=(("a", "A"), ("b", "B"), ("a", "B")))])
    assert built.student_taps == ("a", "b") and built.teacher_taps == ("A", "B") and built.needs_teacher
    features = {name: torch.randn(4, 5) for name in "abAB"}
    total, _ = built(outputs(student_features=features, teacher_features=features))
    loss = LOSSES["similarity_preserving"].function
    expected = sum(loss(features[s], features[t]) for s, t in ("aA", "bB", "aB"))
    torch.testing.assert_close(total, expected)


def test_half_precision_is_widened() -> None:
    built = build_terms(DEFAULT_TERMS)
    total, _ = built(outputs(student_logits=Z.bfloat16(), teacher_logits=V.bfloat16()))
    assert total.dtype == torch.float32
    wide = outputs(student_logits=Z.bfloat16().float(), teacher_logits=V.bfloat16().float())
    assert torch.equal(total, built(wide)[0])


@pytest.mark.parametrize(
    ("terms", "fault"),
    [
        ([term("soft_targt")], "terms[0].loss: unknown loss 'soft_targt'; did you mean `soft_target`?"),
        ([term("zzz")], "known: angle_relation, "),
        (
            [term("cross_entropy"), term("soft_target", options={"temperatur": 4})],
            "terms[1].options.temperatur: unknown option; did you mean `temperature`?",
        ),
        ([term("soft_target", options={"temperature": "hot"})], "options.temperature: must be a number, got 'hot'"),
        ([term("soft_target", options={"temperature": True})], "options.temperature: must be a number, got True"),
        (
            [term("soft_target", options={"temperature": -4.0})],
            "options.temperature: must be positive, from 1e-06 to 1e+06, got -4.0",
        ),
        ([term("soft_target", options={"reduction": "sum"})], "must be batchmean or mean, got 'sum'"),
        ([term("cross_entropy", options={"label_smoothing": 1.5})], "must be in [0, 1), got 1.5"),
        ([term("similarity_preserving")], "terms[0].taps: similarity_preserving reads features"),
        (
            [term("similarity_preserving", taps=(("a", "b"),), options={"x": 1})],
            "unknown option; it has no options",
        ),
        ([term("soft_target", taps=(("a", "b"),))], "does not read features"),
        ([term("soft_target", 0.0)], "no term has a positive weight"),
        ([], "no term has a positive weight"),
    ],
)
def test_faults_are_told(terms: list[TermConfig], fault: str) -> None:
    assert any(fault in line for line in check_terms(terms)), check_terms(terms)
    with pytest.raises(ValueError, match="cannot be built"):
        build_terms(terms)


def test_all_faults_come_at_once() -> None:
    faults = check_terms([term("soft_target", options={"scale": -1, "x": 1}), term("nothing")], "student.terms")
    assert len(faults) == 3 and all(fault.startswith("student.terms[") for fault in faults)
    assert check_terms(DEFAULT_TERMS) == ()
