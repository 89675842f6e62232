"""Auxiliary branches: small classifiers on a net's tapped feature maps, used in training and then discarded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from qkd.nets.resnet import BasicBlock
from qkd.nets.wide_resnet import PreActBlock

Shape = tuple[int, ...]  # of a feature without its batch: channels, height, width


class Branch(nn.Module):
    """Stages, global mean, linear: from a tapped feature map to logits.

    Args:
        stages: From the tapped map to a smaller one.
        channels: Of what the stages give.
        outputs: Number of logits.
    """

    def __init__(self, stages: nn.Module, *, channels: int, outputs: int) -> None:
        super().__init__()
        self.stages = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(channels, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, feature: Tensor) -> Tensor:
        """Map a feature ``[batch, channels, height, width]`` to logits ``[batch, outputs]``."""
        return self.fc(self.flatten(self.pool(self.stages(feature))))  # type: ignore[no-any-return]


def stage_names(net: nn.Module) -> tuple[str, ...]:
    """Return the module paths of a net's stages of residual blocks, first to last; empty for nets without them.

    Known are :class:`~qkd.nets.resnet.ResNet` and :class:`~qkd.nets.wide_resnet.WideResNet`.
    """
    return tuple(name for name, child in net.named_children() if _blocks(child))


def build_branches(net: nn.Module, taps: Sequence[str], shapes: Sequence[Shape], *, outputs: int) -> nn.ModuleList:
    """Build a branch for each tapped feature map, with random weights (from torch's global generator), in float32.

    A branch has the structure of what follows its tap in the net. If every tap is a stage of residual blocks, that is a
    copy (with separate weights) of each later stage; the branch of the last stage is that stage with stride 1.
    Otherwise each later tap becomes a 3x3 convolution with the stride and the channels that lead to that tap's shape,
    batch norm and ReLU; the branch of the last tap is one such layer with stride 1.

    Note: where the net's blocks begin with batch norm (WRN), a batch norm and a ReLU follow the stages, as in the net.

    Args:
        net: The float net that is tapped; untouched.
        taps: Module paths, from the input to the output.
        shapes: ``(channels, height, width)`` of each tapped feature.
        outputs: Logits of a branch.

    Returns:
        The branches, in the order of the taps.

    Raises:
        ValueError: If there are no taps, a tap is named twice, a feature is not a map, or taps are not in the order of
            the net (a later map must not be larger; stages must rise).

    References:
        Yang et al., `Hierarchical Self-supervised Augmented Knowledge Distillation
        <https://arxiv.org/abs/2107.13715>`_, 2021.
    """
    _check(taps, shapes)
    stages = stage_names(net)
    if not set(taps) <= set(stages):
        return _plain_branches(shapes, outputs)
    places = [stages.index(tap) for tap in taps]
    if places != sorted(places):
        raise ValueError(f"taps must go from the input to the output: the net has {', '.join(stages)}, got {taps}")
    return nn.ModuleList([_copied_branch(net, stages, place, outputs) for place in places])


def _check(taps: Sequence[str], shapes: Sequence[Shape]) -> None:
    if not taps or len(taps) != len(shapes):
        raise ValueError(f"branches need taps and one shape per tap, got {len(taps)} taps and {len(shapes)} shapes")
    if len(set(taps)) != len(taps):
        raise ValueError(f"every tap gets one branch, but a tap is listed twice: {', '.join(taps)}")
    for tap, shape in zip(taps, shapes, strict=True):
        if len(shape) != 3:
            raise ValueError(
                f"a branch reads maps [batch, channels, height, width], but tap {tap!r} gives {['batch', *shape]}; "
                f"tap a module before the pooling"
            )
    for (tap, shape), (later, smaller) in pairwise(zip(taps, shapes, strict=True)):
        if smaller[1] > shape[1] or smaller[2] > shape[2]:
            raise ValueError(
                f"taps must go from the input to the output, but {later!r} gives larger maps ({smaller[1]}x"
                f"{smaller[2]}) than {tap!r} before it ({shape[1]}x{shape[2]})"
            )


def _blocks(stage: nn.Module) -> list[BasicBlock | PreActBlock]:
    if not isinstance(stage, nn.Sequential) or not len(stage):
        return []
    known = all(isinstance(block, BasicBlock | PreActBlock) for block in stage)
    return [cast("BasicBlock | PreActBlock", block) for block in stage] if known else []


def _copied_branch(net: nn.Module, stages: Sequence[str], place: int, outputs: int) -> Branch:
    behind = stages[place + 1 :]
    copies = [_copied(_blocks(net.get_submodule(name))) for name in behind]
    last = _blocks(net.get_submodule(stages[-1]))
    channels = last[-1].conv2.out_channels
    if not behind:
        copies = [nn.Sequential(*(type(block)(channels, channels, 1) for block in last))]
    if isinstance(last[-1], PreActBlock):
        copies.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()))
    return Branch(nn.Sequential(*copies), channels=channels, outputs=outputs)


def _copied(blocks: Sequence[BasicBlock | PreActBlock]) -> nn.Sequential:
    return nn.Sequential(
        *(type(block)(block.conv1.in_channels, block.conv1.out_channels, block.conv1.stride[0]) for block in blocks)
    )


def _plain_branches(shapes: Sequence[Shape], outputs: int) -> nn.ModuleList:
    channels = shapes[-1][0]
    branches = []
    for place in range(len(shapes)):
        way = [_layer(before, after) for before, after in pairwise(shapes[place:])]
        stages = nn.Sequential(*(way or [_layer(shapes[-1], shapes[-1])]))
        branches.append(Branch(stages, channels=channels, outputs=outputs))
    return nn.ModuleList(branches)


def _layer(before: Shape, after: Shape) -> nn.Sequential:
    stride = (max(1, round(before[1] / after[1])), max(1, round(before[2] / after[2])))
    conv = nn.Conv2d(before[0], after[0], 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after[0]), nn.ReLU())
