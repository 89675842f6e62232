"""The specification checks itself, and says which bits a layer gets."""

from __future__ import annotations

from typing import Any

import pytest

from quantizers import QuantSpec


@pytest.mark.parametrize("field", ["weight_bits", "act_bits", "first_bits", "last_bits", "sum_bits"])
@pytest.mark.parametrize("value", [1, 9, 0, -2, 2.0, "4", True])
def test_bits_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be an integer from 2 to 8, got {value!r}"):
        QuantSpec(**{field: value})


@pytest.mark.parametrize("field", ["weight_bits", "act_bits", "sum_bits"])
def test_only_first_and_last_may_be_none(field: str) -> None:
    QuantSpec(first_bits=None, last_bits=None)
    with pytest.raises(ValueError, match=field):
        QuantSpec(**{field: None})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_quantizer": "pact"}, "weight_quantizer must be one of lsq, stats, dorefa, got 'pact'"),
        ({"act_quantizer": "ewgs"}, "act_quantizer must be one of lsq, pact, dorefa, got 'ewgs'"),
        ({"overrides": {"layer1.*": {"bits": 4}}}, r"overrides\['layer1\.\*'\] must be one of weight_bits, act_bits"),
        (
            {"overrides": {"fc": {"act_bits": 16}}},
            r"overrides\['fc'\]\.act_bits must be an integer from 2 to 8, got 16",
        ),
        ({"overrides": {0: {"act_bits": 4}}}, "overrides: a layer's name must be text, such as '0', got 0"),
        ({"overrides": [("0", {})]}, r"overrides must map layer names to bits, got \["),
        ({"overrides": None}, "overrides must map layer names to bits, got None"),
        ({"overrides": {"fc": 4}}, r"overrides\['fc'\] must be a mapping such as .*, got 4"),
    ],
)
def test_raises(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)


def test_code() -> None:
    assert QuantSpec(weight_bits=2, act_bits=3).code == "w2a3"


def test_first_last_and_overrides() -> None:
    spec = QuantSpec(
        weight_bits=2,
        act_bits=3,
        first_bits=8,
        last_bits=6,
        overrides={"layer1.*": {"weight_bits": 4}, "layer1.0": {"act_bits": 5}, "fc": {"weight_bits": 7}},
    )
    assert spec.layer_bits("conv1", is_first=True, is_last=False) == (8, 8)
    assert spec.layer_bits("other", is_first=False, is_last=False) == (2, 3)
    assert spec.layer_bits("layer1.1", is_first=False, is_last=False) == (4, 3)
    assert spec.layer_bits("layer1.0", is_first=False, is_last=False) == (4, 5), (
        "each key from the last pattern with it"
    )
    assert spec.layer_bits("fc", is_first=False, is_last=True) == (7, 6), "over first and last, too"
    assert QuantSpec(first_bits=None).layer_bits("conv1", is_first=True, is_last=False) == (4, 4)


def test_unused_overrides() -> None:
    spec = QuantSpec(overrides={"layer1.*": {"weight_bits": 4}, "layre2.*": {"weight_bits": 4}})
    assert spec.unused_overrides(["layer1.0", "layer2.0"]) == ["layre2.*"]
