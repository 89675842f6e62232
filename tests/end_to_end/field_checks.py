"""Checks, independent of the guard in ``prepare``, that a student is its float net and a file its student."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import quantizers
from export import check_parity, export_onnx
from quantizers import QuantSpec
from quantizers.layers import ActQuantizer, QuantConvBn2d, QuantLinearBn

FLOAT_ROUNDING = 1e-5  # of the largest value: batch norm folds no weights here, so only the order of sums differs
TRAINING_ROUNDING = 2e-4  # batch statistics divide by small variances
EIGHT_BIT_ERROR = 0.08  # relative, root of the mean square
EIGHT = QuantSpec(weight_bits=8, act_bits=8)
FOUR = QuantSpec(weight_bits=4, act_bits=4)


class Differs(AssertionError):  # noqa: N818 - the worst that can happen: a silent difference
    """A student computes another function than its float net, and nobody said so."""


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output of any shape, in order."""
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output
    return [tensor for item in items for tensor in tensors(item)]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the net inside ``DataParallel`` and ``torch.compile``."""
    while isinstance(model, nn.DataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, nn.DataParallel) else model._orig_mod
    return model


def _plain_activation(self: Any, input: Tensor) -> Tensor:  # noqa: A002 - Brevitas' name
    if self.quant.kind != "unsigned":
        return input
    bound = self.quant.largest
    return torch.relu(input) if bound is None else input.clamp(0.0, bound)


def _plain_layer(apply: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002 - Brevitas' name
        out = apply(self, input)
        return out if self.bn is None else self.bn(out)

    return forward


@contextmanager
def without_quantizers() -> Iterator[None]:
    """Run students in float: float weights, batch norm as a module, unsigned grids as the ReLU they absorbed."""
    patches = {
        ActQuantizer: _plain_activation,
        QuantConvBn2d: _plain_layer(lambda self, x: self._conv_forward(x, self.weight, self.bias)),
        QuantLinearBn: _plain_layer(lambda self, x: F.linear(x, self.weight, self.bias)),
    }
    before = {kind: kind.forward for kind in patches}
    try:
        for kind, forward in patches.items():
            kind.forward = forward
        yield
    finally:
        for kind, forward in before.items():
            kind.forward = forward


def compare(found: Any, wanted: Any, tolerance: float, what: str) -> None:
    """Raise :class:`Differs` where an output is beyond ``tolerance`` of its largest value."""
    ours, theirs = tensors(found), tensors(wanted)
    if [tuple(t.shape) for t in ours] != [tuple(t.shape) for t in theirs]:
        raise Differs(f"{what}: shapes {[tuple(t.shape) for t in ours]}, not {[tuple(t.shape) for t in theirs]}")
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        scale = max(float(their.detach().abs().max()), 1e-3)
        worst = float((our - their).detach().abs().max()) / scale
        if not worst <= tolerance:
            raise Differs(f"{what}: output {index} is {worst:.2e} of its largest value away, {tolerance:.0e} allowed")


def relative_error(found: Any, wanted: Any) -> float:
    """Return the largest relative error of an output, root of the mean square."""
    pairs = zip(tensors(found), tensors(wanted), strict=True)
    return max(float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-6)) for a, b in pairs)


@torch.no_grad()
def check_same_function(student: nn.Module, model: nn.Module, x: Tensor, *, drops: bool, in_training: bool) -> None:
    """Compare the student without quantizers with the float net, in evaluation and in training mode."""
    student, model = copy.deepcopy(student), unwrapped(model)
    with without_quantizers():
        compare(student.eval()(x), model.eval()(x), FLOAT_ROUNDING, "evaluation mode")
        one = student(x[:1])
        compare(one, _with_batch(model(x[:1]), one), FLOAT_ROUNDING, "evaluation mode, a batch of one")
        if drops:
            _check_random(student.train(), x)
        elif in_training:
            compare(student.train()(x), model.train()(x), TRAINING_ROUNDING, "training mode")


def _with_batch(wanted: Any, found: Any) -> list[Tensor]:
    """Give tensors their batch axis back that a float net's ``squeeze`` takes from a batch of one."""
    pairs = zip(tensors(wanted), tensors(found), strict=True)
    return [their.unsqueeze(0) if their.shape == our.shape[1:] else their for their, our in pairs]


def _check_random(student: nn.Module, x: Tensor) -> None:
    runs = [tensors(student(x))[0] for _ in range(4)]
    if all(torch.equal(runs[0], run) for run in runs[1:]):
        raise Differs("training mode: dropout does nothing")


def calibrated(model: nn.Module, spec: QuantSpec, batches: Sequence[Tensor]) -> Any:
    """Return a calibrated student."""
    student = quantizers.prepare(model, spec, example_inputs=batches[0][:2])
    quantizers.calibrate(student, batches)
    return student


def train_a_step(student: Any, batch: Tensor) -> None:
    """Train one small step, then settle, as the last stage of a training does."""
    student.train()
    sum(t.square().mean() for t in tensors(student(batch))).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 0.1)
    frozen = [(p, p.detach().clone()) for p in student.parameters() if not p.requires_grad]
    torch.optim.SGD(student.parameters(), lr=1e-2).step()
    assert all(torch.equal(parameter, before) for parameter, before in frozen), "a frozen parameter trained"
    quantizers.settle(student)
    student.eval()


@torch.no_grad()
def with_statistics(model: nn.Module, batches: Sequence[Tensor], *, drops: bool) -> nn.Module:
    """Give a float net's batch norms the statistics of ``batches``, as ``calibrate`` does a student's."""
    net = unwrapped(model)
    net.train(not drops)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        for batch in batches:
            net(batch)
    if any(not norm.num_batches_tracked for norm in norms):  # F.batch_norm on a module's statistics: a moving average
        for _ in range(60):
            net(torch.cat(list(batches)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.train()


def check_frozen(student: Any, model: nn.Module) -> None:
    """Each frozen parameter of the float net is a frozen one of the student, and the learned ones still learn."""
    ours = list(student.parameters())
    for name, parameter in unwrapped(model).named_parameters():
        same = [our for our in ours if our.shape == parameter.shape and torch.equal(our, parameter)]
        if not parameter.requires_grad:
            assert same and not any(our.requires_grad for our in same), f"{name} was frozen and would train"
        elif same:  # others are folded into a new parameter
            assert any(our.requires_grad for our in same), f"{name} was learned and would not train"


def check_close(student: Any, model: nn.Module, x: Tensor, allowed: float = EIGHT_BIT_ERROR) -> float:
    """Return how far an 8-bit student is from its float net; raise beyond ``allowed``."""
    with torch.no_grad():
        error = relative_error(student.eval()(x), unwrapped(model).eval()(x))
    if not error < allowed:
        raise Differs(f"the 8-bit student is {error:.1%} away from the float net")
    return error


def _session(path: Path, *, optimize: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_file(student: Any, x: Tensor, path: Path, flavor: str) -> int:
    """Export, run the file by hand with batches of one and three, and compare every code.

    Returns:
        How many codes were compared.
    """
    export_onnx(student, x[:1], path, flavor=flavor)
    step = _output_step(path)
    for optimize in (False, True):
        session = _session(path, optimize=optimize)
        for part in (x[:1], x[:3]):
            found = session.run(None, {session.get_inputs()[0].name: part.numpy()})
            with torch.no_grad():
                wanted = tensors(student(part))
            _compare_arrays(found, wanted, step, f"{flavor}, optimizations {'on' if optimize else 'off'}")
    return _compare_codes(student, x, path, flavor)


def _output_step(path: Path) -> float | None:
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(properties["quantizers"]) is not None
    return float(properties["output_step"]) if "output_step" in properties else None


def _compare_arrays(found: Sequence[Any], wanted: Sequence[Tensor], step: float | None, what: str) -> None:
    shapes = [array.shape for array in found], [tuple(tensor.shape) for tensor in wanted]
    assert shapes[0] == shapes[1], f"{what}: the file gives {shapes[0]}, the student {shapes[1]}"
    for index, (array, tensor) in enumerate(zip(found, wanted, strict=True)):
        difference = float(np.abs(array - tensor.numpy()).max(initial=0))
        # the first output's step is known; of others, and of real-valued ones, the size is
        allowed = step if step is not None and index == 0 else 0.02 * float(tensor.abs().max()) + 1e-6
        assert difference <= allowed * 1.001, f"{what}: output {index} differs by {difference:.3g}, step {step}"


def _compare_codes(student: Any, x: Tensor, path: Path, flavor: str) -> int:
    report = check_parity(student, path, [x])
    missing = [note for note in report.notes if "not compared" in note]
    assert not missing, f"{flavor}: {missing}"
    off = [layer for layer in report.layers if layer.differing]
    on = [layer for layer in report.layers if layer.differing_on]
    assert not off, f"{flavor}: codes differ, optimizations off: {off[0]}"
    assert not on, f"{flavor}: codes differ, optimizations on: {on[0]}"
    return sum(layer.values for layer in report.layers)
