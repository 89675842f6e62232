"""The recipe dial, and what only a low-bit training has: what is set, what stands, what does not go together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from qkd.config import LowBitConfig, RunConfig
from qkd.config.binding import bind, config_text, load_config
from qkd.config.conflicts import MOST_BITS
from qkd.config.explaining import explained
from qkd.config.recipes.table import RECIPES, settings_for
from qkd.config.training import DEFAULT_TERMS
from qkd.failures import ConfigError
from qkd.roles.stored import stored_config
from quantizers.recipes.codes import MOST_VALUES


def values(student: Mapping[str, Any], bits: int = 2) -> dict[str, Any]:
    quant = {"weight_bits": bits, "act_bits": bits, **student.get("quant", {})}
    return {
        "name": "one", "data": {"name": "digits"}, "teacher": {"net": "resnet8"},
        "student": {**student, "quant": quant},
    }  # fmt: skip


def bound(student: Mapping[str, Any], bits: int = 2) -> RunConfig:
    return bind(values(student, bits))


# the dial


def test_without_a_recipe_nothing_is_set_and_nothing_new_is_written() -> None:
    config = bound({})
    assert config.student.recipe == "none" and config.student.low_bit == LowBitConfig()
    assert config.student.terms == DEFAULT_TERMS
    written = config.model_dump(mode="json")["student"]
    assert not {"recipe", "low_bit", "widths", "self_distillation"} & set(written)  # hashes of older runs stay


@pytest.mark.parametrize(
    ("bits", "decay", "rate", "bound_to"),
    [(2, True, 0.005, 0.1), (3, True, 0.005, 0.1), (4, False, None, 0.1), (8, False, None, None)],
)
def test_the_bits_decide_the_rest(bits: int, decay: bool, rate: float | None, bound_to: float | None) -> None:  # noqa: FBT001
    student = bound({"recipe": "default"}, bits).student
    assert student.low_bit == LowBitConfig(
        decay_by_bits=decay, transition_rate=rate, step_size_bound=bound_to, reestimate_batches=50
    )
    assert [(term.loss, term.weight, dict(term.options)) for term in student.terms] == [
        ("soft_target", 1.0, {"temperature": 4.0})
    ]


def test_the_bits_of_a_preset_count() -> None:
    config = bind({**values({}), "student": {"recipe": "default", "quant": {"preset": "fast"}}})
    assert config.student.low_bit.decay_by_bits


def test_each_key_stands_above_the_recipe() -> None:
    terms = [{"loss": "cross_entropy"}]
    own = {"low_bit": {"transition_rate": None, "decay_by_bits": False}, "terms": terms}
    student = bound({"recipe": "default", **own}).student
    assert student.low_bit == LowBitConfig(step_size_bound=0.1, reestimate_batches=50)
    assert [term.loss for term in student.terms] == ["cross_entropy"]


def test_statistics_that_are_kept_are_not_estimated_again() -> None:
    frozen = bound({"recipe": "default", "bn": "frozen_teacher"}).student.low_bit
    assert frozen == LowBitConfig(decay_by_bits=True, step_size_bound=0.1), (
        "nor has a rate a say that the whole training does not follow"
    )
    assert bound({"recipe": "default", "bn": "train"}).student.low_bit.reestimate_batches == 50


def test_a_config_with_every_key_switched_off_stays_so_when_it_is_read_again(tmp_path: Path) -> None:
    off = {"transition_rate": None, "decay_by_bits": False, "step_size_bound": None, "reestimate_batches": 0}
    config = bound({"recipe": "default", "low_bit": off})
    assert config.student.low_bit == LowBitConfig()
    file = tmp_path / "one.yaml"
    file.write_text(config_text(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    "method", [{"peers": {"nets": [{}]}}, {"rotations": {"mode": "online"}}, {"auxiliary": {"train": {}}}]
)
def test_terms_of_a_method_are_left_alone(method: dict[str, Any]) -> None:
    assert bound({"recipe": "default", **method}).student.terms == DEFAULT_TERMS


def test_an_unknown_recipe_is_a_fault_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"config.student.recipe: .*'none' or 'default'.*"):
        bound({"recipe": "best"})


def test_explain_says_what_the_recipe_sets_and_why() -> None:
    (key,) = explained("student.recipe").keys
    for setting in RECIPES["default"]:
        assert f"student.{setting.path} = " in key.about and setting.why in key.about
    assert "2 to 3 bits: student.low_bit.transition_rate = 0.005" in key.about


def test_every_setting_is_a_key_of_the_schema_and_has_a_source() -> None:
    known = {key.path.replace("[]", "") for key in explained("student").keys}
    for bits in range(2, 9):
        for setting in settings_for("default", bits):
            assert f"student.{setting.path}" in known and any(digit.isdigit() for digit in setting.why)


# what goes together

FAULTS = {
    "a place for codes": (
        {"quant": {"weight_quantizer": "dorefa"}, "low_bit": {"dampening": 1e-3}}, "lsq or stats, got"
    ),
    "no low bits": ({"low_bit": {"dampening": 1e-3}, "quant": {"weight_bits": 8}}, "at most 4 bits, but the student"),
    "a step that follows": (
        {"quant": {"weight_quantizer": "stats"}, "low_bit": {"oscillation_thresholds": [0.04, 0.01]}},
        "`oscillation_thresholds` needs `quant.weight_quantizer: lsq`, got stats",
    ),
    "statistics that stay": ({"bn": "frozen_teacher", "low_bit": {"reestimate_batches": 5}}, "needs `bn: train`"),
    "a rate without a say": ({"bn": "frozen_teacher", "low_bit": {"transition_rate": 0.01}}, "at the schedule's rate"),
    "a rate while frozen": (
        {"phases": [{"epochs": 2, "freeze_batch_norm": True}], "low_bit": {"transition_rate": 0.01}},
        "all phases freeze it",
    ),
    "one oscillation": ({"low_bit": {"oscillation_thresholds": [0.04, 0.001]}}, "a single change of direction"),
    "widths and peers": (
        {"widths": [{"weight_bits": 4, "act_bits": 4, "epochs": 1}], "peers": {"nets": [{}]}}, "combined with `peers`"
    ),
    "widths and co-study": (
        {
            "widths": [{"weight_bits": 4, "act_bits": 4, "epochs": 1}],
            "phases": [{"epochs": 2, "teacher_terms": [{"loss": "cross_entropy"}]}],
        },
        "cannot be combined with `teacher_terms`",
    ),
    "two steps": ({"self_distillation": {}, "rotations": {"mode": "online"}}, "define another step"),
    "no coarser copy": ({"self_distillation": {}, "quant": {"act_bits": 8}}, "below 8"),
    "no phase for it": (
        {"self_distillation": {}, "phases": [{"epochs": 2, "combine": "clipped"}]},
        "needs a phase that trains the student on a sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_go_together_is_a_fault(name: str) -> None:
    student, said = FAULTS[name]
    with pytest.raises(ConfigError, match=said):
        bound(student)


def written(folder: Path, stored: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(stored)))
    (folder / "environment.json").write_text('{"packages": {}}')
    return folder / "config.yaml"


def test_a_run_of_before_a_key_of_its_recipe_is_opened_as_it_was_made(tmp_path: Path) -> None:
    """Its config has every key of its time; a recipe that sets one more today is not what the run followed."""
    stored = bound({"recipe": "default"}).model_dump(mode="json")
    assert stored["student"]["low_bit"].pop("step_size_bound") == 0.1
    low_bit = load_config(written(tmp_path / "run", stored)).student.low_bit
    assert low_bit.step_size_bound is None and low_bit.transition_rate == 0.005
    for content in (None, "{}", "[", '["packages"]'):  # a person's own file of that name is no run's
        (tmp_path / "run" / "environment.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "run" / "environment.json").write_text(content)
        assert load_config(tmp_path / "run" / "config.yaml").student.low_bit.step_size_bound == 0.1


def test_other_widths_and_recipes_beside_a_run_set_what_they_set(tmp_path: Path) -> None:
    """A run stores what its recipe has set; for another run of other widths, the recipe decides again."""
    path = written(
        tmp_path / "run", bound({"recipe": "default", "low_bit": {"dampening": 0.1}}).model_dump(mode="json")
    )
    four = load_config(path, ["name=other", "student.quant.weight_bits=4"]).student.low_bit
    assert (four.transition_rate, four.decay_by_bits, four.step_size_bound, four.dampening) == (None, False, 0.1, 0.1)
    eight = load_config(
        path, ["name=other", "student.quant.weight_bits=8", "student.low_bit.dampening=0"]
    ).student.low_bit
    assert (eight.transition_rate, eight.step_size_bound, eight.reestimate_batches) == (None, None, 50)
    two = load_config(
        written(tmp_path / "four", bound({"recipe": "default"}, bits=4).model_dump(mode="json")),
        ["student.quant.weight_bits=2"],
    )
    assert two.student.low_bit.transition_rate == 0.005
    plain = written(tmp_path / "plain", bound({}).model_dump(mode="json"))
    with_recipe = load_config(plain, ["name=y", "student.recipe=default"]).student
    assert with_recipe.low_bit.transition_rate == 0.005
    assert load_config(plain).student.low_bit == LowBitConfig()


def test_what_is_refused_of_new_configs_can_still_be_read(tmp_path: Path) -> None:
    stored = bound({"low_bit": {"oscillation_thresholds": [0.04, 0.01]}}).model_dump(mode="json")
    stored["student"]["quant"]["weight_quantizer"] = "stats"
    path = written(tmp_path / "run", stored)
    assert load_config(path).student.low_bit.oscillation_thresholds == (0.04, 0.01)
    assert stored_config(path.parent).student.quant.weight_quantizer == "stats"
    with pytest.raises(ConfigError, match="needs `quant.weight_quantizer: lsq`"):
        bind(stored)


def test_the_widths_that_rules_act_on_are_those_of_the_quantizers() -> None:
    assert 2**MOST_BITS == MOST_VALUES
    way = [{"weight_bits": 4, "act_bits": 4, "epochs": 1}]
    bound({"low_bit": {"dampening": 1e-3}, "quant": {"weight_bits": 8}, "widths": way})
    bound({"low_bit": {"dampening": 1e-3}, "quant": {"weight_bits": 8, "overrides": {"conv1": {"weight_bits": 4}}}})
