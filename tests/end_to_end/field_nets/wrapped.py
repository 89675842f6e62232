"""Wrappers, signatures, names and shared or reparametrized layers."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, prune

from .registry import REFUSED, net, whole


def _parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


@net("wrapped", setup=_parallel)
def data_parallel(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn(self.conv(x))))


@net("wrapped", setup=lambda model: torch.compile(model), is_fast=True)
def compiled(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn(self.conv(x))))


@net("wrapped", setup=lambda model: nn.DataParallel(torch.compile(model)))
def parallel_of_compiled(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn(self.conv(x))))


@net("wrapped", setup=lambda model: nn.Sequential(OrderedDict(backbone=nn.DataParallel(model))))
def parallel_inside(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn(self.conv(x))))


@net("signature", is_fast=True)
def optional_flag(self: Any, x: Tensor, is_feat: bool = False) -> Any:
    y = self.relu(self.conv(x))
    out = self.head(y)
    return (out, y) if is_feat else out


@net("signature")
def optional_none(self: Any, x: Tensor, mask: Tensor | None = None, *, scale: float = 0.5) -> Tensor:
    y = self.relu(self.conv(x))
    if mask is not None:
        y = y * mask
    return self.head(y * scale)


@net("signature")
def star_arguments(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return self.head(self.relu(self.conv(x)))


@net("signature")
def sum_of_branches(self: Any, x: Tensor) -> Tensor:
    return self.head(sum([self.relu(self.conv(x)), self.side(x)]))


@net("signature", branches=lambda: nn.ModuleList(nn.Conv2d(3, 8, k, padding=k // 2) for k in (1, 3, 5)))
def sum_of_a_generator(self: Any, x: Tensor) -> Tensor:
    return self.head(F.relu(sum(branch(x) for branch in self.branches)))


@net("signature")
def add_by_keyword(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.add(self.relu(self.conv(x)), other=self.side(x)))


@net("signature")
def method_add_by_keyword(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x)).add(other=self.side(x)))


@net("signature")
def mul_by_keyword(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.mul(input=self.relu(self.conv(x)), other=torch.sigmoid(self.side(x))))


@net("signature")
def cat_by_keyword(self: Any, x: Tensor) -> Tensor:
    return self.head(self.wide(torch.cat(tensors=(self.conv(x), self.side(x)), dim=1)))


@net("signature")
def concatenate_along_negative_axis(self: Any, x: Tensor) -> Tensor:
    return self.head(self.wide(torch.concatenate([self.conv(x), self.side(x)], axis=-3)))


@net("signature", part=lambda: partial(F.max_pool2d, kernel_size=2))
def partial_function(self: Any, x: Tensor) -> Tensor:
    return self.head(self.part(self.relu(self.conv(x))))


NAMES = ("spec", "tap_paths", "meta", "graph", "code", "recompile", "print_readable", "_graph", "to_folder")


def _named(name: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.relu(getattr(self, name)(x)))

    forward.__name__ = f"a_layer_called_{name.strip('_')}" + "_private" * name.startswith("_")
    part = {name: lambda: nn.Conv2d(3, 8, 3, padding=1)}
    net("names", is_fast=name in ("spec", "graph"), **part)(forward)


for _name in NAMES:
    _named(_name)


@whole("names")
def modules_called_like_fx_nodes() -> nn.Module:
    parts = [("input", nn.Conv2d(3, 8, 3)), ("output", nn.ReLU()), ("add", nn.BatchNorm2d(8)), ("x", nn.ReLU())]
    parts += [("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("logits", nn.Linear(8, 5))]
    return nn.Sequential(OrderedDict(parts))


@whole("names")
def modules_called_images_and_logits() -> nn.Module:
    parts = [("images", nn.Conv2d(3, 8, 3)), ("images_quant", nn.ReLU()), ("x_quant", nn.Conv2d(8, 8, 1))]
    parts += [("logits", nn.AdaptiveAvgPool2d(1)), ("class", nn.Flatten()), ("weight", nn.Linear(8, 5))]
    return nn.Sequential(OrderedDict(parts))


# -- one module, two calls ------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Any] = {
    "silu": nn.SiLU, "leaky_relu": lambda: nn.LeakyReLU(0.2), "hardswish": nn.Hardswish, "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU, "relu6": nn.ReLU6, "mish": nn.Mish, "elu": nn.ELU, "softplus": nn.Softplus, "tanh": nn.Tanh,
}  # fmt: skip


def _twice(name: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        return self.head(self.act(self.conv2(y)) + y)

    forward.__name__ = f"{name}_used_twice"
    net("reuse", act=ACTIVATIONS[name], is_fast=name == "silu")(forward)


for _name in ACTIVATIONS:
    _twice(_name)


@net("reuse", small=lambda: nn.MaxPool2d(2))
def pool_used_twice(self: Any, x: Tensor) -> Tensor:
    return self.head(self.small(self.conv2(self.small(self.relu(self.conv(x))))))


@net("reuse", mean=lambda: nn.AvgPool2d(2))
def average_used_twice(self: Any, x: Tensor) -> Tensor:
    return self.head(self.mean(self.conv2(self.mean(self.relu(self.conv(x))))))


@net("reuse", flat=nn.Flatten, none=nn.Identity, b=lambda: nn.Linear(8, 5))
def flatten_and_identity_used_twice(self: Any, x: Tensor) -> Tensor:
    a = self.flat(self.pool(self.none(self.relu(self.conv(x)))))
    b = self.flat(self.pool(self.none(self.side(x))))
    return self.fc(a) + self.b(b)


@net("reuse", act=lambda: nn.PReLU())
def prelu_used_twice(self: Any, x: Tensor) -> Tensor:
    return self.head(self.act(self.conv2(self.act(self.conv(x)))))


@net("reuse", verdict=REFUSED, says="conv2")
def layer_used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.conv2(self.relu(self.conv2(y))))


@net("reuse", verdict=REFUSED, says="bn")
def norm_used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.bn(self.conv(x)))
    return self.head(self.relu(self.bn(self.conv2(y))))


def _tie(model: Any) -> None:
    model.conv3.weight = model.conv2.weight


@net("reuse", setup=_tie, verdict=REFUSED, says="conv[23]")
def two_layers_of_one_weight(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv3(self.relu(self.conv2(self.relu(self.conv(x))))))


@net("operand twice", is_fast=True)
def plus_itself(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y + y)


@net("operand twice")
def times_itself(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(self.conv2(y * y))


@net("operand twice")
def cat_with_itself(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.wide(torch.cat([y, y], 1)))


@net("operand twice", mix=lambda: nn.Conv2d(24, 8, 1))
def cat_with_itself_and_another(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(self.mix(torch.cat([y, self.relu(self.conv2(y)), y], 1)))


@net("operand twice")
def square_of_a_signed_value(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.conv(x) ** 2))


@net("operand twice")
def the_image_twice(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x + x)))


# -- weights that are computed --------------------------------------------------------------------------------------


def _prune(model: Any) -> None:
    prune.l1_unstructured(model.conv, "weight", amount=0.4)
    prune.ln_structured(model.conv2, "weight", amount=0.3, n=2, dim=0)


def _weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model.conv)


def _spectral_norm(model: Any) -> None:
    parametrizations.spectral_norm(model.conv)


def _old_weight_norm(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.conv)


def _old_spectral_norm(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(model.conv)


def _stepped(setup: Any) -> Any:
    """Return ``setup`` followed by a training step, which leaves tensors with a history on the module."""

    def run(model: Any) -> None:
        setup(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    return run


def _reparametrized(name: str, setup: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.relu(self.conv(x))))

    forward.__name__ = name
    # Spectral norm turns its vectors at each forward in training mode, so that mode is not compared.
    net("computed weights", setup=setup, same_in_training=False,
        is_fast=name in ("pruned", "weight_norm_after_a_step"))(forward)  # fmt: skip


for _name, _setup in {
    "pruned": _prune, "weight_norm": _weight_norm, "spectral_norm": _spectral_norm,
    "old_weight_norm": _old_weight_norm, "old_spectral_norm": _old_spectral_norm,
}.items():  # fmt: skip
    _reparametrized(_name, _setup)
    _reparametrized(f"{_name}_after_a_step", _stepped(_setup))


@net(
    "computed weights",
    kernel=lambda: nn.Parameter(torch.randn(8, 3, 3, 3) * 0.3),
    offset=lambda: nn.Parameter(torch.randn(8) * 0.3),
)
def functional_convolution(self: Any, x: Tensor) -> Tensor:
    y = F.conv2d(x, self.kernel, self.offset, padding=1)
    return self.head(F.relu(y))


@net("computed weights")
def functional_norm_and_linear(self: Any, x: Tensor) -> Tensor:
    y = F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias,
                     self.training, 0.1, 1e-5)  # fmt: skip
    y = self.pool(F.relu(y)).flatten(1)
    return F.linear(y, self.fc.weight, self.fc.bias)


@net("computed weights")
def standardized_weights(self: Any, x: Tensor) -> Tensor:
    weight = self.conv.weight
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
    return self.head(F.relu(F.conv2d(x, weight, self.conv.bias, padding=1)))


# -- hooks, parametrizations and outputs ----------------------------------------------------------------------------


class Outputs(OrderedDict):  # type: ignore[type-arg]
    """As libraries wrap what a model returns."""


@net("outputs", is_fast=True)
def dict_of_a_type_of_its_own(self: Any, x: Tensor) -> Any:
    y = self.relu(self.conv(x))
    return Outputs(logits=self.head(y), features=y)


def _hooked(model: Any) -> None:
    model.conv2.register_forward_hook(lambda _m, given, out: out * 0.5 + given[0])
    model.relu.register_forward_pre_hook(lambda _m, given: (given[0] - 0.1,))
    model.head.register_forward_hook(lambda _m, given, kwargs, out: -out, with_kwargs=True)


@net("hooks", setup=_hooked, is_fast=True)
def hooks_that_change_values(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv2(self.relu(self.conv(x)))))


class Bounded(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh() * 0.5


def _parametrize(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.conv2, "weight", Bounded())


@net("computed weights", setup=_parametrize)
def parametrized_weight(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv2(self.relu(self.conv(x)))))


@net("computed weights", base=lambda: nn.Parameter(torch.randn(8, 8, 3, 3)), verdict=REFUSED, says="`base`")
def two_weights_of_one_parameter(self: Any, x: Tensor) -> Tensor:
    y = F.relu(F.conv2d(self.relu(self.conv(x)), self.base * 0.3, padding=1))
    return self.head(F.conv2d(y, self.base.flip(3) * 0.5, padding=1))


@net("computed weights", verdict=REFUSED, says=r"random")
def weights_dropped_in_training(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(F.conv2d(x, F.dropout(self.conv.weight, 0.3, self.training), padding=1)))
