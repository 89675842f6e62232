"""Nets by name: known sizes, torch.fx, small and gray images, torchvision's, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
import torch.fx
from torch import nn

from qkd.nets import NETS, build_net, net_names
from qkd.nets.resnet import cifar_resnet
from qkd.nets.wide_resnet import WideResNet

# The papers' figures: He et al. table 6 (0.27, 0.46, 0.85 M; their shortcuts have no parameters, ours 1 % more),
# Zagoruyko & Komodakis (0.18, 0.7, 0.6, 2.2 M), ResNet-18 for CIFAR (11.17 M).
PARAMETERS = {
    "resnet8": 78_042,
    "resnet20": 272_474,
    "resnet32": 466_906,
    "resnet56": 855_770,
    "resnet18_cifar": 11_173_962,
    "wrn_16_1": 175_066,
    "wrn_16_2": 691_674,
    "wrn_40_1": 563_930,
    "wrn_40_2": 2_243_546,
}


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def build(name: str, channels: int = 3, image_size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return build_net(name, classes=10, channels=channels, image_size=image_size)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_sizes_are_the_published_ones(name: str) -> None:
    assert count(build(name)) == PARAMETERS[name]


@pytest.mark.parametrize("depth", [20, 32, 56])
def test_without_projections_the_sizes_are_exactly_option_a(depth: int) -> None:
    n = (depth - 2) // 6
    stem, norms = 3 * 16 * 9 + 32, sum(2 * n * 2 * width for width in (16, 32, 64))
    convs = 2 * n * 16 * 16 * 9 + (16 + (2 * n - 1) * 32) * 32 * 9 + (32 + (2 * n - 1) * 64) * 64 * 9
    projections = 16 * 32 + 64 + 32 * 64 + 128
    assert count(build(f"resnet{depth}")) - projections == stem + norms + convs + 64 * 10 + 10


def test_lenet_sizes_are_the_known_ones() -> None:
    for image_size in (28, 32):
        assert count(build("lenet5", 1, image_size)) == 61_706
        assert count(build("lenet5_half", 1, image_size)) == 15_738


# Every net on the smallest images; on the larger ones one of each family.
SHAPES = [(name, 1, 8) for name in sorted(set(NETS) - {"alexnet_cifar"})]
SHAPES += [(name, *shape) for name in ("resnet8", "wrn_16_1", "lenet5") for shape in ((3, 32), (1, 28))]


@pytest.mark.parametrize(("name", "channels", "image_size"), SHAPES)
def test_nets_are_traceable_and_take_small_and_gray_images(name: str, channels: int, image_size: int) -> None:
    net = build(name, channels, image_size).eval()
    traced = torch.fx.symbolic_trace(net)
    images = torch.randn(2, channels, image_size, image_size)
    with torch.no_grad():
        logits = net(images)
        assert torch.equal(traced(images), logits)
    assert logits.shape == (2, 10) and bool(logits.isfinite().all())


def test_alexnet_is_traceable_and_as_described() -> None:
    net = build("alexnet_cifar", 1, 8).eval()
    with torch.no_grad():
        images = torch.randn(2, 1, 8, 8)
        assert torch.equal(torch.fx.symbolic_trace(net)(images), net(images))
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.out_channels, conv.kernel_size[0]) for conv in convs] == [
        (64, 11),
        (192, 5),
        (384, 3),
        (256, 3),
        (256, 3),
    ]


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18_cifar", "wrn_16_2", "lenet5", "lenet5_half"])
def test_every_activation_is_used_once_and_every_parameter_learns(name: str) -> None:
    net = build(name, 1, 8)
    targets = [node.target for node in torch.fx.symbolic_trace(net).graph.nodes if node.op == "call_module"]
    activations = [path for path, module in net.named_modules() if isinstance(module, nn.ReLU)]
    assert all(targets.count(path) == 1 for path in activations)
    nn.functional.cross_entropy(net(torch.randn(4, 1, 8, 8)), torch.arange(4)).backward()
    for path, parameter in net.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), path


def widths_of_stem(net: nn.Module) -> int:
    return int(net.get_parameter("conv1.weight").shape[0])


def test_resnets_have_the_stages_that_taps_name() -> None:
    for name, stages in (("resnet20", 3), ("resnet18_cifar", 4), ("wrn_16_1", 3)):
        net = build(name)
        x, shapes = torch.zeros(1, widths_of_stem(net), 32, 32), []
        for number in range(1, stages + 1):
            x = net.get_submodule(f"layer{number}").eval()(x)
            shapes.append(tuple(x.shape[1:]))
        widths = (64, 128, 256, 512) if stages == 4 else (16, 32, 64)
        assert shapes == [(width, 32 >> index, 32 >> index) for index, width in enumerate(widths)]


def test_a_seed_repeats_the_weights() -> None:
    first, second = build("resnet8"), build("resnet8")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_every_torchvision_classifier_is_listed() -> None:
    names = net_names()
    assert set(NETS) < set(names)
    for name in (
        "resnet18",
        "resnet50",
        "mobilenet_v2",
        "vgg11_bn",
        "alexnet",
        "squeezenet1_1",
        "googlenet",
        "mobilenet_v2",
        "vit_b_16",
    ):
        assert f"torchvision/{name}" in names
    assert len(names) > 60
    assert not any("rcnn" in name or "deeplab" in name or "raft" in name for name in names)


@pytest.mark.parametrize(
    ("name", "channels", "image_size"),
    [
        ("resnet18", 1, 8),
        ("squeezenet1_1", 1, 32),
        ("shufflenet_v2_x0_5", 3, 32),
        *(
            pytest.param(name, 1, 64, marks=pytest.mark.slow)
            for name in (
                "googlenet",
                "mobilenet_v2",
                "regnet_y_400mf",
                "vgg11_bn",
                "alexnet",
                "resnet50",
                "densenet121",
                "efficientnet_b0",
            )
        ),
    ],
)
def test_torchvision_nets_take_the_classes_and_channels_asked_for(name: str, channels: int, image_size: int) -> None:
    net = build(f"torchvision/{name}", channels, image_size)
    nn.functional.cross_entropy(net(torch.randn(2, channels, image_size, image_size)), torch.arange(2)).backward()
    net.eval()
    images = torch.randn(2, channels, image_size, image_size)
    with torch.no_grad():
        logits = net(images)
        assert torch.equal(torch.fx.symbolic_trace(net)(images), logits)
    assert logits.shape == (2, 10)


def test_a_first_convolution_for_gray_images_differs_in_nothing_else() -> None:
    color, gray = build("torchvision/resnet18"), build("torchvision/resnet18", 1)
    first, other = color.get_submodule("conv1"), gray.get_submodule("conv1")
    assert str(other) == str(first).replace("Conv2d(3,", "Conv2d(1,")
    assert {key: value.shape for key, value in color.state_dict().items() if key != "conv1.weight"} == {
        key: value.shape for key, value in gray.state_dict().items() if key != "conv1.weight"
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resent20", "unknown net 'resent20'; did you mean `resnet20`?"),
        ("resnet18", "did you mean `torchvision/resnet18` or `resnet18_cifar`?"),
        ("ResNet-18", "did you mean `torchvision/resnet18` or `resnet18_cifar`?"),
        ("torchvision.models.resnet18", "did you mean `torchvision/resnet18` or `resnet18_cifar`?"),
        ("timm/mobilenet-v2", "did you mean `torchvision/mobilenet_v2`?"),
        ("MobileNetV2", "did you mean `torchvision/mobilenet_v2`?"),
        ("vgg11", "did you mean `torchvision/vgg11`?"),
        ("torchvision/resnet20", "did you mean `resnet20`?"),
        ("torchvision/resnet19", "did you mean `torchvision/resnet18`?"),
        ("torchvision/fasterrcnn_resnet50_fpn", "unknown net"),
        ("zzzz", "unknown net 'zzzz'; `qkd ls nets` lists them"),
    ],
)
def test_an_unknown_net_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name)


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("torchvision/alexnet", 32, "torchvision/alexnet cannot take 32x32 images"),
        ("torchvision/vit_b_16", 30, "torchvision/vit_b_16 cannot be built for 30x30 images"),
        ("lenet5", 64, "even side up to 32, got image_size=64"),
        ("lenet5", 27, "even side up to 32, got image_size=27"),
        ("alexnet_cifar", 4, "at least 8 pixels"),
    ],
)
def test_images_that_a_net_cannot_take_are_refused(name: str, image_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, image_size=image_size)


@pytest.mark.parametrize("numbers", [(1, 3, 32), (10, 0, 32), (10, 3, 0)])
def test_numbers_out_of_range_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 2 classes, 1 channel and 1 pixel"):
        build_net("resnet8", classes=numbers[0], channels=numbers[1], image_size=numbers[2])


def test_depths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="6n \\+ 2, got depth=21"):
        cifar_resnet(21, classes=10, channels=3)
    with pytest.raises(ValueError, match="6n \\+ 4"):
        WideResNet(17, 1, classes=10, channels=3)
