"""Which grid every value is on: its width, its kind, its quantizer."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quantizers import QuantSpec, RewriteError
from quantizers.graph.plan import Plan, weight_range
from quantizers.graph.trace import trace
from quantizers.integer import PAIR_SUM_LIMIT


def plan_of(net: nn.Module, images: Any, **options: Any) -> tuple[Plan, dict[str, Any]]:
    traced = trace(net, images(1))
    plan = Plan(traced, QuantSpec(**{"weight_bits": 2, "act_bits": 3, **options}))
    nodes: dict[str, Any] = {}
    for node in traced.graph.nodes:  # a module that is called twice: its path for the first call, then relu_1, relu_2
        nodes.setdefault(traced.path(node), node)
        nodes.setdefault(node.name, node)
    return plan, nodes


def test_widths_follow_the_readers(make_net: Any, images: Any) -> None:
    plan, nodes = plan_of(make_net("residual"), images, sum_bits=6)
    bits = {path: plan.bits(node) for path, node in nodes.items()}
    assert bits["images"] == 8, "the first layer reads it"
    assert bits["relu_2"] == 6, "a sum reads it, too"
    assert bits["relu"] == bits["relu_1"] == 3, "convolutions alone read them"
    assert bits["a.0.0"] is None and bits["a.0.1"] is None, "goes through a ReLU first"
    assert bits["b.0.0"] == bits["project.0"] == 6 and bits["add"] is None
    assert bits["head"] is None


def test_kinds(make_net: Any, images: Any) -> None:
    plan, nodes = plan_of(make_net("bottleneck"), images)
    assert plan.kind(nodes["images"]) == "shifted"
    assert plan.kind(nodes["relu"]) == "unsigned"
    assert plan.kind(nodes["reduce.0"]) == plan.kind(nodes["add"]) == "signed"
    assert plan.kind(nodes["blocks.0.1"]) == "unsigned" and plan.largest(nodes["blocks.0.1"]) == 6.0
    assert plan.largest(nodes["relu6"]) == 6.0 and plan.largest(nodes["relu"]) is None
    plan, nodes = plan_of(make_net("squeeze_excite"), images)
    assert plan.kind(nodes["silu"]) == "shifted" and plan.kind(nodes["sigmoid"]) == "unsigned"


def test_quantizer_of_low_bit_inputs_only(make_net: Any, images: Any) -> None:
    plan, nodes = plan_of(make_net("residual"), images, act_quantizer="pact", first_bits=None)
    methods = {path: plan.method(nodes[path], plan.bits(nodes[path]) or 8) for path in ("images", "relu_1", "relu_2")}
    assert methods == {"images": "lsq", "relu_1": "pact", "relu_2": "lsq"}


def test_a_relu_behind_pooling_bounds_the_grid_before_it(images: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU6(), nn.Conv2d(4, 2, 1))
    plan, nodes = plan_of(net, images, last_bits=None)
    conv = nodes["0"]
    assert (plan.bits(conv), plan.kind(conv), plan.largest(conv)) == (3, "unsigned", 6.0)
    assert plan.rectifiers(conv) == [nodes["2"]]


def test_concatenations_make_one_kind(make_net: Any, images: Any) -> None:
    plan, nodes = plan_of(make_net("dense"), images)
    grown = nodes["convs.0"]
    assert len(plan.cats(grown)) == 2, "two concatenations read it"
    assert plan.kind(grown) == "signed" and plan.kind(nodes["cat_1"]) == "signed", "an operand may be negative"
    plan, nodes = plan_of(make_net("branches"), images)
    assert plan.kind(nodes["cat"]) == "unsigned"


class Two(nn.Module):
    """Two layers that see the image, two that make the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mid = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.c, self.d = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(F.relu(F.relu(self.a(F.avg_pool2d(x, 2))) + F.relu(self.b(F.max_pool2d(x, 2)))))
        x = F.relu(x)
        return self.c(x) + self.d(x)


def test_every_layer_that_sees_the_image_or_makes_the_output(images: Any) -> None:
    plan, nodes = plan_of(Two(), images, first_bits=7, last_bits=6)
    bits = {path: plan.layer_bits[nodes[path]] for path in ("a", "b", "mid", "c", "d")}
    assert bits == {"a": (7, 7), "b": (7, 7), "mid": (2, 3), "c": (6, 6), "d": (6, 6)}


def test_overrides(make_net: Any, images: Any) -> None:
    overrides = {"a.*": {"weight_bits": 4}, "stem.0": {"act_bits": 5}, "head": {"weight_bits": 3}}
    plan, nodes = plan_of(make_net("residual"), images, overrides=overrides)
    assert plan.layer_bits[nodes["a.1.0"]] == (4, 3)
    assert plan.layer_bits[nodes["stem.0"]] == (8, 5)
    assert plan.layer_bits[nodes["head"]] == (3, 8)
    with pytest.raises(RewriteError, match=r"overrides \['aa\.\*'\] match no layer; the layers are: stem\.0, .*head"):
        plan_of(make_net("residual"), images, overrides={"aa.*": {"weight_bits": 4}})


@pytest.mark.parametrize("act_bits", range(2, 9))
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_pair_sums_fit_16_bits(weight_bits: int, act_bits: int) -> None:
    narrowed = weight_range(weight_bits, act_bits, "lsq")
    low = narrowed.get("low", -(2 ** (weight_bits - 1)))
    assert 2 * (2**act_bits - 1) * -low <= PAIR_SUM_LIMIT
    assert (narrowed == {}) == ((weight_bits, act_bits) != (8, 8))
    assert narrowed in ({}, {"low": -64, "high": 63})


def test_batch_norm_of_a_value_read_twice_is_not_folded(images: Any) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(F.relu(self.bn(x)) + F.relu(x))

    plan, nodes = plan_of(Shared(), images)
    assert plan.folded == set()
    assert plan.bits(nodes["conv"]) == 8
