"""The forward pass of a fixed net on a CPU, batch norms folded into convolutions, which also do sums and ReLUs."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from quantizers.fused.coded_conv import multiplied_in

_log = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of the largest output in float32: folding changes rounding (1e-6), a wrong fold changes everything
REDUCED_TOLERANCE = 0.02  # likewise in reduced precision, on top of twice the net's own error there
_SUMS = {operator.add, operator.iadd, torch.add}
_RECTIFIERS = {functional.relu, torch.relu}
_ONEDNN = (torch.float32, torch.bfloat16)


class FoldedNet:
    """Calls a read-only net through a folded copy of its convolutions if that gives the same outputs.

    The copy is updated when weights are written to. The net itself runs if nothing can be folded: on other devices, in
    training mode, with hooks, if :mod:`torch.fx` cannot trace its ``forward``, and if outputs differ by more than
    rounding, which is checked on the first images.

    Args:
        net: Maps a batch of images to a tensor.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net, self._modules = net, tuple(net.modules())
        self._tensors = (*net.parameters(), *net.buffers())
        self._versions: list[int] = []  # each write to a tensor increments its version
        self._folded: fx.GraphModule | None = None
        self._has_tried = False
        self._is_good: dict[torch.dtype, bool] = {}  # by the dtype of the convolutions

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """Return the net's output for images, ``[batch, channels, height, width]``, without a graph."""
        if not self._may_fold(images):
            return self._net(images)
        if not self._has_tried:
            self._folded, self._has_tried = _fold(self._net, images), True
        if self._folded is None:
            return self._net(images)
        self._follow(self._folded)
        precision = multiplied_in(images)
        if precision not in self._is_good:
            self._is_good[precision] = _agrees(self._folded, self._net, images)
        return self._folded(images) if self._is_good[precision] else self._net(images)

    def _may_fold(self, images: Tensor) -> bool:
        if images.device.type != "cpu" or type(images) is not Tensor or torch.compiler.is_compiling():
            return False
        return not any(one.training or one._forward_hooks or one._forward_pre_hooks for one in self._modules)

    def _follow(self, folded: fx.GraphModule) -> None:
        versions = [tensor._version for tensor in self._tensors]
        if versions != self._versions:
            for module in folded.modules():
                if isinstance(module, _Convolution):
                    module.fold()
            self._versions = versions


class _Convolution(nn.Module):
    """A convolution followed by a batch norm, optionally a sum with another tensor, optionally a ReLU."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self._of = (conv, norm)  # a tuple, so that they are not registered here
        self.rectifies = False
        self.fold()

    def fold(self) -> None:
        """Update from the current weights."""
        conv, norm = self._of
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if norm is not None:
            mean, var = norm.running_mean, norm.running_var
            weight, bias = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, norm.weight, norm.bias)  # type: ignore[arg-type]
        self._cast = {weight.dtype: (weight.detach(), None if bias is None else bias.detach())}
        self._dtype = weight.dtype

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        conv, dtype = self._of[0], multiplied_in(x)
        weight, bias = self._weights(dtype)
        place = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if not _has_onednn(x, dtype):
            out = functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            out = out if other is None else out + other
            return functional.relu(out) if self.rectifies else out
        end, onednn, x = ("relu" if self.rectifies else "none"), torch.ops.mkldnn, x.to(dtype)
        if other is None:
            return onednn._convolution_pointwise(x, weight, bias, *place, end, [], "")  # type: ignore[no-any-return]
        after: tuple[Any, ...] = ("add", 1.0, end if self.rectifies else None, [], None)
        return onednn._convolution_pointwise.binary(x, other.to(dtype), weight, bias, *place, *after)  # type: ignore[no-any-return]

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype not in self._cast:
            weight, bias = self._cast[self._dtype]
            self._cast[dtype] = weight.to(dtype), None if bias is None else bias.to(dtype)
        return self._cast[dtype]


def _has_onednn(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether oneDNN should do more than convolve; nothing is gained outside channels_last."""
    if dtype not in _ONEDNN or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # type: ignore[no-untyped-call]
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _fold(net: nn.Module, images: Tensor) -> fx.GraphModule | None:
    """Return the net with folded convolutions; None if there are none or its ``forward`` cannot be traced."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user's net repeats its warnings when it runs itself
            traced = fx.GraphModule(net, fx.Tracer().trace(net))
            _skip_identities(traced)
            with torch.autocast("cpu", enabled=False):
                ShapeProp(traced).propagate(images)
            found = [node for node in traced.graph.nodes if _is_convolution(traced, node)]
            for number, node in enumerate(found):
                _rewrite(traced, node, f"folded_{number}")
            traced.recompile()
    except Exception as error:  # the user's net may raise anything
        _log.info("batch norms of a fixed net are not folded: %s: %s", type(error).__name__, error)
        return None
    return traced if found else None


def _skip_identities(traced: fx.GraphModule) -> None:
    """Remove nodes that do nothing, since they would separate a convolution from a sum after it."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and type(traced.get_submodule(str(node.target))) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _is_convolution(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = traced.get_submodule(str(node.target))
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _rewrite(traced: fx.GraphModule, node: fx.Node, name: str) -> None:
    """Let a convolution absorb the operations on its output, as long as nothing else reads it."""
    norm = _reader(node, lambda one: _is_norm(traced, one))
    conv = traced.get_submodule(str(node.target))
    module = _Convolution(conv, None if norm is None else traced.get_submodule(str(norm.target)))  # type: ignore[arg-type]
    traced.add_submodule(name, module)
    node.target = name
    _absorb(node, norm)
    total = _reader(node, lambda one: _is_sum(one, node))
    if total is not None:
        node.args = (node.args[0], next(arg for arg in total.args if arg is not node))
        _absorb(node, total)
    rectifier = _reader(node, lambda one: _is_rectifier(traced, one))
    module.rectifies = rectifier is not None
    _absorb(node, rectifier)


def _reader(node: fx.Node, accepts: Callable[[fx.Node], bool]) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and accepts(readers[0]) else None


def _absorb(node: fx.Node, reader: fx.Node | None) -> None:
    if reader is not None:
        node.meta = reader.meta
        reader.replace_all_uses_with(node)
        reader.graph.erase_node(reader)


def _is_norm(traced: fx.GraphModule, node: fx.Node) -> bool:
    module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    return type(module) is nn.BatchNorm2d and module.running_mean is not None and len(node.args) == 1


def _is_sum(total: fx.Node, node: fx.Node) -> bool:
    """Return whether a node adds a tensor of the same shape that exists before the convolution runs."""
    if total.op != "call_function" or total.target not in _SUMS or len(total.args) != 2 or total.kwargs:
        return False
    others = [arg for arg in total.args if arg is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or not others[0] < node:
        return False
    shapes = [one.meta.get("tensor_meta") for one in (others[0], node)]
    return all(hasattr(one, "shape") for one in shapes) and shapes[0].shape == shapes[1].shape  # type: ignore[union-attr]


def _is_rectifier(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) is nn.ReLU
    return node.op == "call_function" and node.target in _RECTIFIERS and len(node.args) == 1


def _agrees(folded: nn.Module, net: nn.Module, images: Tensor) -> bool:
    """Return whether a folded net gives the same outputs as the net, up to rounding."""
    try:
        with torch.autocast("cpu", enabled=False):
            exact, same = net(images), folded(images)
        if not isinstance(exact, Tensor) or not _is_near(same, exact, TOLERANCE * _size(exact)):
            return False
        if not torch.is_autocast_enabled("cpu"):
            return True
        own, found = net(images), folded(images)
        return _is_near(found, exact, 2 * _size(own - exact) + REDUCED_TOLERANCE * _size(exact))
    except Exception as error:  # an operator that this build of PyTorch lacks
        _log.info("a fixed net runs unfolded: %s: %s", type(error).__name__, error)
        return False


def _size(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _is_near(found: object, wanted: Tensor, bound: float) -> bool:
    return isinstance(found, Tensor) and found.shape == wanted.shape and bool(((found - wanted).abs() <= bound).all())
