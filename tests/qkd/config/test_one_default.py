"""Settings that the config wraps have one name, one default and one range with what they wrap."""

from __future__ import annotations

import dataclasses

import pytest

from export import Settings
from qkd.config import BenchConfig, QuantConfig
from quantizers import QuantSpec


def test_bits_and_quantizers_are_those_of_quant_spec() -> None:
    spec = {field.name: field for field in dataclasses.fields(QuantSpec)}
    assert set(spec) == set(QuantConfig.model_fields)
    made = QuantConfig(weight_bits=4, act_bits=4).model_dump()
    assert made == dataclasses.asdict(QuantSpec())


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
