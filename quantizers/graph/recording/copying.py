"""Makes the private copy of a network to record, without its wrappers."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from quantizers.graph.form.refusal import RewriteError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm for inputs of any rank, in place of ``nn.SyncBatchNorm``, which needs a process group."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        pass


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, _PARALLEL):
            model = model.module
        elif _is_compiled(model):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _is_compiled(model: nn.Module) -> bool:
    """Return whether ``torch.compile`` made a module, whose compiler is loaded then; a child may have any name."""
    kind = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", None)
    return kind is not None and isinstance(model, kind)


def private_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network to record, unwrapped at every level and with unsynchronized batch norm.

    Tensors that hooks leave in modules after a step (old ``weight_norm``, ``spectral_norm``, pruning) are autograd
    results, which cannot be copied; the copy gets their values.

    Raises:
        RewriteError: If a module cannot be copied, or holds weights without values in float32 or float64.
    """
    source = unwrapped(model)
    _require_weights(source)
    _require_no_gradient_hooks(source)
    memo: dict[int, Any] = {}
    for module in source.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        root = copy.deepcopy(source, memo)
    except Exception as error:
        raise RewriteError(
            f"{_culprit(source)}: cannot be copied ({str(error).partition(chr(10))[0]}); remove everything but "
            "layers and tensors from it"
        ) from error
    return _replaced(root)


def _require_weights(root: nn.Module) -> None:
    """Raise unless all weights have finite values, in a precision in which grids are exact."""
    for path, tensor in (*root.named_parameters(), *root.named_buffers()):
        if is_lazy(tensor):
            raise RewriteError(f"{path}: has no shape yet (a lazy module); call the network on a batch of images first")
        if tensor.is_meta:
            raise RewriteError(f"{path}: has no values (device meta); load the weights first")
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise RewriteError(
                f"{path}: is {tensor.dtype}, but codes are exact only in float32; pass model.float() and float32 "
                "images, and train under torch.autocast if you want mixed precision"
            )
        if isinstance(tensor, nn.Parameter) and not bool(tensor.detach().isfinite().all()):
            raise RewriteError(
                f"{path}: has values that are not finite; its training diverged, or its file is damaged: load others"
            )


def _require_no_gradient_hooks(root: nn.Module) -> None:
    """Raise if a hook sees, and may change, gradients of layers or parameters: a student does not have these hooks."""
    for path, module in root.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise RewriteError(_hook_message(path or type(root).__name__))
    for path, parameter in root.named_parameters():
        hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        if parameter.requires_grad and any(hooks):
            raise RewriteError(_hook_message(path))


def _hook_message(place: str) -> str:
    return (
        f"{place}: has a hook on gradients, which its student would train without; remove it (handle.remove()) before "
        "prepare, and register it on the student if you need it there"
    )


def require_images(example: Tensor) -> None:
    """Raise unless an example can be computed with and can distinguish two functions.

    Raises:
        RewriteError: If it is empty, sparse, of integers or complex, or holds NaN or infinity.
    """
    if example.dim() < 2:
        raise RewriteError(
            f"example_inputs has shape {tuple(example.shape)}; give a batch of images, [batch, channels, height, width]"
        )
    if len(example) == 0:
        raise RewriteError("example_inputs holds no images; give at least one")
    if not example.is_floating_point() or example.layout != torch.strided:
        raise RewriteError(
            f"example_inputs is {example.dtype}, {example.layout}; give dense float images, as the network takes them"
        )
    if not bool(torch.isfinite(example).all()):
        raise RewriteError(
            "example_inputs holds NaN or infinity, which would hide differences from the student; give "
            "images as the network takes them"
        )


def _culprit(root: nn.Module) -> str:
    """Return the path of the first module that cannot be copied, as deep as possible."""
    for path, module in reversed(list(root.named_modules())):
        try:
            copy.deepcopy(module)
        except Exception:
            return path or type(root).__name__
    return type(root).__name__


def _replaced(root: nn.Module) -> nn.Module:
    """Replace wrappers inside a network with what they wrap, and synchronized batch norm with plain batch norm."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            inner = _plain(unwrapped(child))
            if inner is not child:
                setattr(module, name, inner)
    return _plain(root)


def _plain(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.SyncBatchNorm):
        return module
    plain = AnyBatchNorm(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    plain.__dict__.update(
        {key: module.__dict__[key] for key in ("_parameters", "_buffers", "training") if key in module.__dict__}
    )
    return plain


def input_name(root: nn.Module) -> str:
    """Return the name of the network's image argument.

    Raises:
        RewriteError: If it needs other arguments that have no default.
    """
    try:
        parameters = list(inspect.signature(root.forward).parameters.values())
    except (TypeError, ValueError):
        return "x"
    wanted = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    others = [p for p in parameters if p not in wanted[:1] and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in others if p.default is p.empty]
    if missing and not wanted:
        raise RewriteError(
            f"{type(root).__name__}: forward takes its images by keyword only ({', '.join(missing)}), and a student "
            "takes them as its only positional argument; wrap the network in a module whose forward(x) does that"
        )
    if missing:
        raise RewriteError(
            f"{type(root).__name__}: forward needs {', '.join(missing)} besides the images; give these arguments "
            "defaults, or wrap the network in a module that takes images only"
        )
    return wanted[0].name if wanted else "x"


def example_images(example: Tensor, count: int, device: torch.device) -> Tensor:
    """Return ``count`` different images like those of ``example``: its first, and noisy copies of its images.

    The first values could be all zeros, where most networks agree. The noise has the scale of the example.
    """
    generator = torch.Generator().manual_seed(count)
    rows = torch.arange(count) % max(len(example), 1)
    images = example.detach().to("cpu")[rows].clone()
    spread = float(images.std()) if images.numel() > 1 else 0.0
    noise = torch.randn(images.shape, generator=generator).to(images.dtype) * (spread if spread > 0 else 1.0)
    return (images + noise).to(device)
