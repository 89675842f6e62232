"""Auxiliary branches: copies of the stages behind a tap, or plain layers down to the last tap's shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qkd.nets import build_net
from qkd.nets.branches import build_branches, stage_names
from qkd.nets.resnet import BasicBlock
from qkd.nets.wide_resnet import PreActBlock

RESNET_SHAPES = [(16, 8, 8), (32, 4, 4), (64, 2, 2)]


def net(name: str, size: int = 8) -> nn.Module:
    return build_net(name, classes=5, channels=1, image_size=size)


def strides(branch: nn.Module) -> list[int]:
    return [module.conv1.stride[0] for module in branch.modules() if isinstance(module, BasicBlock | PreActBlock)]


def test_stages_of_nets() -> None:
    assert stage_names(net("resnet20")) == ("layer1", "layer2", "layer3")
    assert stage_names(net("wrn_16_1")) == ("layer1", "layer2", "layer3")
    assert stage_names(net("resnet18_cifar")) == ("layer1", "layer2", "layer3", "layer4")
    assert stage_names(net("lenet5")) == ()


@pytest.mark.parametrize("name", ["resnet20", "resnet8"])
def test_a_branch_has_the_blocks_of_the_stages_behind_its_tap(name: str) -> None:
    own = net(name)
    blocks = len(own.get_submodule("layer2"))
    branches = build_branches(own, stage_names(own), RESNET_SHAPES, outputs=20)
    first, second, last = branches
    rest = [1] * (blocks - 1)
    assert strides(first) == [2, *rest, 2, *rest]
    assert strides(second) == [2, *rest]
    assert strides(last) == [1, *rest]
    for branch, shape in zip(branches, RESNET_SHAPES, strict=True):
        assert branch(torch.randn(3, *shape)).shape == (3, 20)


def test_a_copy_has_weights_of_its_own_and_leaves_the_net_alone() -> None:
    own = net("resnet8")
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    branches = build_branches(own, ["layer1", "layer3"], [RESNET_SHAPES[0], RESNET_SHAPES[2]], outputs=20)
    mine = {parameter.data_ptr() for parameter in own.parameters()}
    assert not any(parameter.data_ptr() in mine for parameter in branches.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    sizes = [tuple(p.shape) for p in branches[0].stages.parameters()]
    assert sizes == [tuple(p.shape) for stage in ("layer2", "layer3") for p in own.get_submodule(stage).parameters()]


def test_nets_that_begin_blocks_with_batch_norm_end_branches_with_one() -> None:
    own = net("wrn_16_1")
    branches = build_branches(own, stage_names(own), [(16, 8, 8), (32, 4, 4), (64, 2, 2)], outputs=8)
    assert [type(module) for module in branches[0].stages[-1]] == [nn.BatchNorm2d, nn.ReLU]
    assert strides(branches[0]) == [2, 1, 2, 1] and strides(branches[2]) == [1, 1]
    assert branches[1](torch.randn(2, 32, 4, 4)).shape == (2, 8)


def test_other_nets_get_plain_layers_that_follow_the_taps() -> None:
    own = net("lenet5", size=28)
    shapes = [(6, 28, 28), (6, 14, 14), (16, 5, 5)]
    branches = build_branches(own, ["relu1", "pool1", "pool2"], shapes, outputs=12)
    convs = [[(m.in_channels, m.out_channels, m.stride[0]) for m in branch.modules() if isinstance(m, nn.Conv2d)]
             for branch in branches]  # fmt: skip
    assert convs == [[(6, 6, 2), (6, 16, 3)], [(6, 16, 3)], [(16, 16, 1)]]
    for branch, shape in zip(branches, shapes, strict=True):
        assert branch(torch.randn(2, *shape)).shape == (2, 12)


@pytest.mark.parametrize(
    ("taps", "shapes", "match"),
    [
        ([], [], "need taps"),
        (["layer1"], [], "1 taps and 0 shapes"),
        (["layer1", "layer1"], RESNET_SHAPES[:1] * 2, "listed twice"),
        (["flatten"], [(64,)], r"tap 'flatten' gives \['batch', 64\]; tap a module before the pooling"),
        (["layer2", "layer1"], [RESNET_SHAPES[1], RESNET_SHAPES[0]], r"'layer1' gives larger maps \(8x8\)"),
        (["layer2", "layer1"], [(8, 4, 4), (8, 4, 4)], "from the input to the output: the net has layer1, layer2"),
    ],
)
def test_refusals(taps: list[str], shapes: list[tuple[int, ...]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_branches(net("resnet8"), taps, shapes, outputs=8)
