"""Quantizers by name: each builds a working Brevitas layer of the bits its name says."""

from __future__ import annotations

import re

import brevitas.nn as qnn
import pytest
import torch

from quantizers import QUANTIZERS
from quantizers.names import act_quantizer, weight_quantizer

GRAMMAR = re.compile(r"(Int|Uint|ShiftedUint)([2-8])(Weight|Act)Per(Tensor|Channel)(Lsq|Stats|Dorefa|Pact)")


def test_names_follow_the_grammar() -> None:
    assert len(QUANTIZERS) == 7 * (5 + 9)
    for name, injector in QUANTIZERS.items():
        match = GRAMMAR.fullmatch(name)
        assert match is not None, name
        assert injector.__name__ == name and injector.bit_width == int(match[2])


@pytest.mark.parametrize(
    "name",
    ["Int2WeightPerChannelLsq", "Int4WeightPerTensorLsq", "Int2WeightPerTensorDorefa", "Int2WeightPerChannelStats"],
)
def test_weight_quantizers_work_in_a_plain_brevitas_layer(name: str) -> None:
    torch.manual_seed(0)
    layer = qnn.QuantConv2d(3, 4, 3, weight_quant=QUANTIZERS[name])
    layer.weight_quant.skip_create_quant_tensor = True
    weight = layer.weight_quant(layer.weight)
    codes = layer.weight_quant.tensor_quant.codes(layer.weight)
    torch.testing.assert_close(weight, codes * layer.weight_quant.tensor_quant.step)
    assert 1 < len(codes.unique()) <= 2 ** QUANTIZERS[name].bit_width


@pytest.mark.parametrize(
    ("bits", "method", "per_channel", "name"),
    [
        (2, "lsq", True, "Int2WeightPerChannelLsq"),
        (3, "lsq", False, "Int3WeightPerTensorLsq"),
        (4, "dorefa", True, "Int4WeightPerTensorDorefa"),
    ],
)
def test_weight_lookup(bits: int, method: str, per_channel: bool, name: str) -> None:
    assert weight_quantizer(bits, method, per_channel=per_channel) is QUANTIZERS[name]


@pytest.mark.parametrize(
    ("kind", "method", "name"),
    [
        ("unsigned", "pact", "Uint4ActPerTensorPact"),
        ("signed", "lsq", "Int4ActPerTensorLsq"),
        ("shifted", "dorefa", "ShiftedUint4ActPerTensorDorefa"),
    ],
)
def test_activation_lookup(kind: str, method: str, name: str) -> None:
    assert act_quantizer(4, method, kind) is QUANTIZERS[name]
