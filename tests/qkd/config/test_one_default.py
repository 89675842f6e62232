"""Settings that the config wraps have one name, one default and one range with what they wrap."""

from __future__ import annotations

import dataclasses

import pytest

from export import Settings
from qkd.config import BenchConfig, QuantConfig, filling
from qkd.config.binding import load_config
from qkd.config.filling import filled
from qkd.failures import ConfigError
from quantizers import QuantSpec
from quantizers.spec import PRESETS


def test_bits_and_quantizers_are_those_of_quant_spec() -> None:
    spec = {field.name: field for field in dataclasses.fields(QuantSpec)}
    assert set(spec) == set(QuantConfig.model_fields) - {"preset"}, "a preset is QuantSpec.preset(name)"
    made = QuantConfig(weight_bits=4, act_bits=4).model_dump()
    assert made == dataclasses.asdict(QuantSpec())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_of_a_config_is_that_of_quant_spec(name: str) -> None:
    assert filling.PRESETS == PRESETS
    data = filled({"student": {"quant": {"preset": name, "per_channel": False}}})["student"]["quant"]
    made = QuantConfig.model_validate(data)
    assert made.preset == name and "preset" not in made.model_dump(), "a run folder holds the widths"
    assert QuantSpec(**made.model_dump()) == QuantSpec.preset(name, per_channel=False)
    assert QuantConfig.model_validate(filled({"student": {"quant": made.model_dump()}})["student"]["quant"]) == (
        made.model_copy(update={"preset": None})
    )


def test_a_preset_is_told_from_widths_that_contradict_it() -> None:
    words = ["student.quant.preset=fast", "student.quant.sum_bits=2"]
    assert load_config("digits/w2a2", words[:1]).student.quant.sum_bits == 8
    fault = r"config\.student\.quant\.sum_bits: got 2, but preset fast has 8; leave one of them out"
    with pytest.raises(ConfigError, match=fault):
        load_config("digits/w2a2", words)
    with pytest.raises(ConfigError, match=r"config\.student\.quant\.preset: must be"):
        load_config("digits/w2a2", ["student.quant.preset=quick"])
    with pytest.raises(ValueError, match="preset must be one of fast, got 'quick'"):
        QuantSpec.preset("quick")


@pytest.mark.parametrize("key", ["first_bits", "last_bits"])
def test_first_and_last_layer_may_be_as_the_others(key: str) -> None:
    values = {"weight_bits": 2, "act_bits": 3, key: None}
    spec = QuantSpec(**QuantConfig.model_validate(values).model_dump())
    assert spec.layer_bits("x", is_first=key == "first_bits", is_last=key == "last_bits") == (2, 3)


def test_settings_of_a_measurement_are_those_of_export() -> None:
    own, fields = BenchConfig().model_dump(), {field.name for field in dataclasses.fields(Settings)}
    shared = fields & set(own)
    assert fields - shared == {"memory", "seed"}, "what only callers in Python set"
    assert {name: own[name] for name in shared} == {name: getattr(Settings(), name) for name in shared}
