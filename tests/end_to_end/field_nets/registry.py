"""A table of small nets, each a ``forward`` with the layers that it names."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

Parts = dict[str, Callable[[], Any]]

EXACT, REFUSED = "exact", "refused"

# What a forward may name without declaring it: eight channels, five classes.
DEFAULTS: Parts = {
    "conv": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "side": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "conv2": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "conv3": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "down": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "wide": lambda: nn.Conv2d(16, 8, 1),
    "narrow": lambda: nn.Conv2d(4, 8, 1),
    "bn": lambda: nn.BatchNorm2d(8),
    "bn2": lambda: nn.BatchNorm2d(8),
    "relu": nn.ReLU,
    "pool": lambda: nn.AdaptiveAvgPool2d(1),
    "fc": lambda: nn.Linear(8, 5),
    "head": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
}


@dataclass(frozen=True)
class FieldNet:
    """A net as people write it, and what must become of it.

    Args:
        kind: The kind of net that it is an example of.
        name: The forward's name.
        build: Returns the net, the same one each time.
        shape: Of an image: channels, height, width.
        verdict: ``exact`` or ``refused``.
        says: Regular expression that a refusal must contain: the layer, the node or the line.
        is_fast: Whether it is in the fast tier.
        drops: Whether training mode must be random.
        same_in_training: Whether the student in training mode gives what the float net gives there.
    """

    kind: str
    name: str
    build: Callable[[], nn.Module] = field(repr=False)
    shape: tuple[int, int, int] = (3, 8, 8)
    verdict: str = EXACT
    says: str = ""
    is_fast: bool = False
    drops: bool = False
    same_in_training: bool = True

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.name}".replace(" ", "_")


NETS: list[FieldNet] = []


def net(
    kind: str, *, shape: tuple[int, int, int] = (3, 8, 8), verdict: str = EXACT, says: str = "", is_fast: bool = False,
    drops: bool = False, same_in_training: bool = True, setup: Callable[[Any], Any] | None = None, **parts: Any,
) -> Callable[[Any], Any]:  # fmt: skip
    """Register a forward: the layers it names come from ``parts`` and :data:`DEFAULTS`.

    Args:
        kind: The kind of net that it is an example of.
        shape: Of an image.
        verdict: What must become of it.
        says: What a refusal must say.
        is_fast: Whether it is in the fast tier.
        drops: Whether training mode must be random.
        same_in_training: Whether training mode may be compared, too.
        setup: Called with the finished net; what it returns, if anything, is the net (a wrapper).
        parts: Attribute -> a maker of a module, parameter, buffer or value.
    """

    def register(forward: Any) -> Any:
        name = forward.__name__

        def build() -> nn.Module:
            torch.manual_seed(zlib.crc32(name.encode()))
            return _build(forward, parts, setup)

        assert all(known.name != name for known in NETS), f"two nets are called {name}"
        NETS.append(FieldNet(kind, name, build, shape, verdict, says, is_fast, drops, same_in_training))
        return forward

    return register


def whole(kind: str, **options: Any) -> Callable[[Any], Any]:
    """Register a class, or a function, that returns the finished net."""

    def register(maker: Any) -> Any:
        def build() -> nn.Module:
            torch.manual_seed(zlib.crc32(maker.__name__.encode()))
            return settled(maker())

        assert all(known.name != maker.__name__ for known in NETS), f"two nets are called {maker.__name__}"
        NETS.append(FieldNet(kind, maker.__name__, build, **options))
        return maker

    return register


def _build(forward: Any, parts: Parts, setup: Any) -> nn.Module:
    made: nn.Module = type(forward.__name__, (nn.Module,), {"forward": forward})()
    named = set(_names(forward.__code__))
    for name, make in {**DEFAULTS, **parts}.items():
        if name in parts or name in named:
            value = make()
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                made.register_buffer(name, value)
            else:
                setattr(made, name, value)
    settled(made)
    wrapper = None if setup is None else setup(made)
    return made if wrapper is None else wrapper


def _names(code: CodeType) -> list[str]:
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return [*code.co_names, *inner]


@torch.no_grad()
def settled(model: nn.Module) -> nn.Module:
    """Give a net the weights of a trained one: no statistic, offset or factor is at its start, so none can hide."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _settle_norm(module)
        elif isinstance(module, nn.PReLU):
            module.weight.uniform_(-0.3, 0.6)
        elif isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
            if not isinstance(module.weight, nn.Parameter):
                continue  # computed by a parametrization
            module.weight.mul_(1.7)
            if module.bias is not None:
                module.bias.uniform_(-0.4, 0.4)
    return model


def _settle_norm(module: nn.modules.batchnorm._BatchNorm) -> None:
    if module.running_mean is not None and module.running_var is not None:
        module.running_mean.uniform_(-0.4, 0.4)
        module.running_var.uniform_(0.4, 1.6)
    if module.weight is not None:
        module.weight.uniform_(0.5, 1.5)
        module.weight[::3] *= -1  # negative factors, too
        module.bias.uniform_(-0.5, 0.5)
