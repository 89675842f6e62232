"""Batch norm and the grid behind it in one pass: torch's values and gradients, and the same bits with any machinery."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import quantizers
from quantizers import QuantSpec, calibrate, prepare
from quantizers.fused import batch_norm
from quantizers.fused.batch_norm import SHARED, Grid, takes
from quantizers.kernels import compiled_for, fake_quantize
from quantizers.layers import ActQuantizer, QuantConvBn2d
from quantizers.native.fake_quant import load
from quantizers.student import Student

pytestmark = pytest.mark.usefixtures("compiled_kernels")
LAST = torch.channels_last
# one short part; channels that divide nothing; several parts; more channels than lanes
SHAPES = ((5, 24, 7, 9), (3, 300, 5, 5), (40, 16, 16, 16), (2, 1500, 3, 4), (4, 2, 9, 11))


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, mean: float = 0.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + mean
    return values.to(dtype).contiguous(memory_format=LAST)


def layer(channels: int) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def grid_of(step: Tensor, *, residual: bool = True) -> Grid:
    return Grid(step, torch.tensor(0.0), torch.tensor(3.0), 0.1, residual, fake_quantize)


def results(x: Tensor, grad: Tensor, *, on_grid: bool, residual: bool = True, by_torch: bool = False) -> list[Tensor]:
    """Return output, gradients, and the running statistics afterward."""
    norm, leaf, step = layer(x.size(1)), x.clone().requires_grad_(), torch.tensor(0.4, requires_grad=True)
    grid = grid_of(step, residual=residual)
    if by_torch:
        out = norm(leaf)
        settings = (grid.step, grid.low, grid.high)
        out = fake_quantize(out, *settings, grad_scale=0.1, residual=residual) if on_grid else out
    else:
        assert takes(leaf, norm)
        out = batch_norm.batch_norm(leaf, norm, compiled_for, grid if on_grid else None)
    out.backward(grad)
    found = [leaf.grad, norm.weight.grad, norm.bias.grad, *([step.grad] if on_grid else [])]
    assert all(one is not None for one in found)
    tracked = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return [out.detach(), *found, *tracked]  # type: ignore[list-item]


@pytest.mark.skipif(load() is None, reason="no C++ compiler at hand")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["alone", "lsq", "pact"])
def test_compiled_or_not_and_on_any_number_of_threads_the_bits_are_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str
) -> None:
    x, grad = drawn(shape, dtype, mean=3.0), drawn(shape, dtype, seed=1)
    options = {"on_grid": kind != "alone", "residual": kind != "pact"}
    found = []
    for fused, threads in ((True, 1), (True, 3), (False, 1)):
        quantizers.set_fused(enabled=fused)
        torch.set_num_threads(threads)
        found.append(results(x, grad, **options))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert one.dtype is same.dtype and torch.equal(one, same)
    assert found[0][0].dtype is dtype and found[0][0].is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("shape", SHAPES)
def test_alone_it_is_torch_batch_norm(shape: tuple[int, ...]) -> None:
    x, grad = drawn(shape, torch.float32, mean=3.0), drawn(shape, torch.float32, seed=1)
    for mine, its in zip(results(x, grad, on_grid=False), results(x, grad, on_grid=False, by_torch=True), strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-4, atol=2e-4)


def test_with_a_grid_it_is_batch_norm_and_then_the_quantizer() -> None:
    x, grad = drawn((40, 16, 16, 16), torch.float32), drawn((40, 16, 16, 16), torch.float32, seed=1)
    mine, its = (results(x, grad, on_grid=True, by_torch=by_torch) for by_torch in (False, True))
    differs = mine[0] != its[0]
    assert differs.float().mean() < 1e-4, "rounding apart, which moves few values over the edge of a code"
    for one, other in zip(mine[2:], its[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert ((mine[1] - its[1]).abs() > 1e-4).float().mean() < 1e-3


def test_a_large_mean_cancels_nothing() -> None:
    """The variance is of distances from the mean: squares of the values would lose it."""
    x = drawn((8, 6, 10, 10), torch.float32) * 1e-2 + 1000
    x = x.contiguous(memory_format=LAST)
    norm = layer(6)
    batch_norm.batch_norm(x, norm, compiled_for)
    exact = x.double().var(dim=(0, 2, 3), correction=1) * 0.1 + 0.9
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_var.double(), exact, rtol=1e-6, atol=0)


def test_second_derivatives_are_those_of_torch() -> None:
    """The penalty on a gradient, as meta-learning methods take it."""
    found = []
    for own in (True, False):
        norm, x = layer(3), drawn((4, 3, 5, 5), torch.float32).requires_grad_()
        out = batch_norm.batch_norm(x, norm, compiled_for) if own else norm(x)
        (by_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        by_x.square().sum().backward()
        assert x.grad is not None and norm.weight.grad is not None
        found.append((x.grad, norm.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_processes_sum_before_they_normalize() -> None:
    """Two halves of a batch, each told the other's sums, give what the whole batch gives."""
    whole, grad = drawn((6, 4, 5, 5), torch.float32), drawn((6, 4, 5, 5), torch.float32, seed=1)
    norm, leaf = layer(4), whole.clone().requires_grad_()
    expected = batch_norm.batch_norm(leaf, norm, compiled_for)
    expected.backward(grad)
    halves = [whole[:4].clone().requires_grad_(), whole[4:].clone().requires_grad_()]
    norms = [layer(4), layer(4)]
    sent: list[list[Tensor]] = [[], []]

    def passes(known: list[list[Tensor]] | None) -> list[Tensor]:
        outs = []
        for part, (half, own) in enumerate(zip(halves, norms, strict=True)):
            turn = iter(range(9))

            def reduce(tensor: Tensor, part: int = part, turn: Iterator[int] = turn) -> None:
                at = next(turn)
                sent[part].append(tensor.clone())
                if known is not None:
                    tensor.add_(known[1 - part][at])

            own.__dict__[SHARED] = lambda reduce=reduce: reduce
            half.grad = None
            out = batch_norm.batch_norm(half, own, compiled_for)
            out.backward(grad[:4] if part == 0 else grad[4:])
            outs.append(out)
        return outs

    passes(None)  # what each has of the forward pass does not depend on the other
    first = [[own[0]] for own in sent]
    sent[:] = [[], []]
    passes([[*own, torch.zeros(8, dtype=torch.float64)] for own in first])
    second = [[mine[0], own[1]] for mine, own in zip(first, sent, strict=True)]
    sent[:] = [[], []]
    norms = [layer(4), layer(4)]
    outs = passes(second)
    assert leaf.grad is not None and halves[0].grad is not None and halves[1].grad is not None
    torch.testing.assert_close(torch.cat(outs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([halves[0].grad, halves[1].grad]), leaf.grad, rtol=1e-4, atol=1e-5)
    assert norm.weight.grad is not None and norms[0].weight.grad is not None and norms[1].weight.grad is not None
    torch.testing.assert_close(norms[0].weight.grad + norms[1].weight.grad, norm.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms[0].running_var, norm.running_var)


def test_it_takes_only_what_it_computes() -> None:
    x = drawn((4, 6, 5, 5), torch.float32)
    assert takes(x, layer(6))
    assert not takes(x.contiguous(), layer(6)) and not takes(x.double(), layer(6))
    assert not takes(x, layer(6).eval()) and not takes(x, layer(6).double())
    assert not takes(x, nn.BatchNorm2d(6, affine=False)) and not takes(x, nn.BatchNorm2d(6, momentum=None))
    assert not takes(x, nn.BatchNorm2d(6, track_running_stats=False)) and not takes(x, nn.InstanceNorm2d(6))
    watched, replaced = layer(6), layer(6)
    watched.register_forward_hook(lambda *_: None)
    replaced.__dict__["forward"] = lambda x: x
    assert not takes(x, watched) and not takes(x, replaced)


def student() -> tuple[Student, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    images = drawn((6, 3, 8, 8), torch.float32)
    made = prepare(net, QuantSpec(weight_bits=2, act_bits=2), images[:2])
    calibrate(made, [images])
    return made.train().to(memory_format=LAST), images


def step_of(net: Student, images: Tensor) -> dict[str, Tensor]:
    net(images).square().sum().backward()
    return {name: one.grad.clone() for name, one in net.named_parameters() if one.grad is not None}


def readers(net: Student) -> list[ActQuantizer]:
    return [one for layer in net.modules() if isinstance(layer, QuantConvBn2d) for one in layer._reader]


def test_hooks_see_the_values_before_the_grid_and_change_no_bit() -> None:
    net, images = student()
    other = copy.deepcopy(net)
    assert len(readers(net)) == 2 and not set(readers(net)) & set(readers(other)), "a copy has its own"
    before: list[Tensor] = []
    for reader in readers(other):
        reader.register_forward_hook(lambda _module, inputs, _out: before.append(inputs[0].detach()))
    found, watched = step_of(net, images), step_of(other, images)
    assert len(before) == 2 and all(one.unique().numel() > 4 for one in before)
    assert found.keys() == watched.keys() and all(torch.equal(found[name], watched[name]) for name in found)
    for (name, one), same in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(one, same), name


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the first layer's images need no gradient
@pytest.mark.parametrize("where", ["layer", "quantizer", "norm", "everywhere"])
def test_backward_hooks_change_only_the_order_of_sums(where: str) -> None:
    """They replace the tensors that a module gets and returns, so values must not be put on the grid twice."""
    net, images = student()
    other = copy.deepcopy(net)
    calls: list[object] = []
    layer = next(one for one in other.modules() if isinstance(one, QuantConvBn2d))
    modules = {"layer": layer, "quantizer": readers(other)[0], "norm": layer.bn}
    found = step_of(net, images)
    if where == "everywhere":
        handle = nn.modules.module.register_module_full_backward_hook(lambda *given: calls.append(given[0]))
    else:
        handle = modules[where].register_full_backward_hook(lambda *given: calls.append(given[0]))
    try:
        watched = step_of(other, images)
    finally:
        handle.remove()
    assert calls and found.keys() == watched.keys()
    errors = {name: float((found[name] - watched[name]).norm() / found[name].norm()) for name in found}
    assert max(errors.values()) < 1e-2, errors  # quantized twice: 0.6 and more


@pytest.mark.parametrize("change", ["bypass", "finer", "observer"])
def test_a_quantizer_that_does_something_else_gets_the_values(change: str) -> None:
    net, images = student()
    quant = readers(net)[0].quant
    seen: list[Tensor] = []
    if change == "observer":
        quant.observer = type("Seeing", (), {"see": lambda self, x: seen.append(x)})()  # type: ignore[assignment]
    elif change == "bypass":
        quant.bypass = True
    else:
        quant.finer = 4
    outputs: list[Tensor] = []
    nexts = [layer for layer in net.modules() if isinstance(layer, QuantConvBn2d)][1]
    nexts.register_forward_pre_hook(lambda _module, inputs: outputs.append(inputs[0].detach()))
    net(images)
    codes = outputs[0].unique().numel()
    assert codes > 100 if change == "bypass" else 4 < codes <= 13 if change == "finer" else codes <= 4
    assert len(seen) == (change == "observer")


def test_eval_mode_and_frozen_batch_norm_do_not_hand_over() -> None:
    net, images = student()
    net.eval()
    assert all(one._given is None for one in readers(net))
    before = net(images)
    assert torch.equal(before, net(images.contiguous()))


def test_a_student_whose_pass_was_interrupted_can_be_copied() -> None:
    """What a layer hands to its quantizer is no part of a student, and has a graph that cannot be copied."""
    net, images = student()
    reader = readers(net)[0]
    reader.give(net(images) * 2)  # as if something between layer and quantizer had raised
    assert reader._given is not None and reader._given.grad_fn is not None
    other = copy.deepcopy(net)
    assert readers(other)[0]._given is None
    found, expected = step_of(other, images), step_of(student()[0], images)
    assert found.keys() == expected.keys()
