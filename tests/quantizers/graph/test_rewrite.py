"""prepare: the float net is left alone, the student is the same function on grids, of the same structure each time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import quantizers
from export import check_parity, export_onnx
from quantizers import QuantSpec, act_quantizers, integer_view, prepare, quant_layers, quantizer_scales
from quantizers.layers import Concat, Product, Sum


def same_view(first: Any, second: Any) -> bool:
    """Tell whether two views hold the same numbers, bit for bit."""
    if len(first.nodes) != len(second.nodes) or first.grids != second.grids:
        return False
    return all(
        all(_same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
        for a, b in zip(first.nodes, second.nodes, strict=True)
    )


def _same(a: Any, b: Any) -> bool:
    return bool((a == b).all()) if hasattr(a, "dtype") else bool(a == b)


def test_the_model_is_untouched_and_its_weights_are_copied(make_net: Any, images: Any) -> None:
    net = make_net("residual").train()
    net.stem.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    kinds = [type(m) for m in net.modules()]
    student = prepare(net, QuantSpec(), example_inputs=images(2))
    assert [type(m) for m in net.modules()] == kinds and [m.training for m in net.modules()] == modes
    layers = quant_layers(student)
    for path, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert torch.equal(layers[path].weight, module.weight) and layers[path].weight is not module.weight
    assert torch.equal(layers["head"].bias, net.head.bias)
    quantizers.calibrate(student, [images(8)])
    for parameter in student.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_every_net_trains_one_step(net_name: str, make_student: Any, images: Any, train_step: Any) -> None:
    student = make_student(net_name)
    loss = train_step(student, images(4))
    assert bool(torch.isfinite(loss))
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert bool(torch.isfinite(parameter.grad).all()), f"{name} gets a gradient that is not finite"
    moving = [name for name, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert len(moving) > 0.7 * len(list(student.parameters()))


def test_every_net_exports_and_agrees(net_name: str, make_student: Any, images: Any, tmp_path: Path) -> None:
    student = make_student(net_name)
    export_onnx(student, images(1), tmp_path / "student.onnx", flavor="ort")
    report = check_parity(student, tmp_path / "student.onnx", [images(4, seed=11)])
    assert report.off.top1_agreement == 1.0 and report.layers and not report.all_zero
    for layer in report.layers:
        assert layer.max_steps <= 1 and layer.differing <= 0.002 * layer.values, layer


def test_eight_bits_come_close_to_the_float_net(net_name: str, make_net: Any, make_student: Any, images: Any) -> None:
    """At W8A8 the student is the float net but for small errors: the rewriting itself is right."""
    net, student = make_net(net_name), make_student(net_name, 8, 8)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for module in net.modules():
            module.train(not isinstance(module, (nn.Dropout, nn.Dropout2d)))
        for seed in (5, 6):
            net(images(8, seed=seed))
        expected, got = net.eval()(images(6, seed=7)), student(images(6, seed=7))
    assert float((got - expected).abs().mean()) < 0.1 * float(expected.std())


def test_state_loads_strictly_into_a_fresh_student(
    net_name: str, make_net: Any, make_student: Any, images: Any
) -> None:
    student = make_student(net_name)
    fresh = prepare(make_net(net_name, seed=99), QuantSpec(weight_bits=2, act_bits=2), example_inputs=images(1))
    fresh.load_state_dict(student.state_dict(), strict=True)
    fresh.eval()
    with torch.no_grad():
        assert torch.equal(fresh(images(3)), student(images(3)))
    assert same_view(integer_view(fresh), integer_view(student))


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_copies_are_independent(name: str, make_student: Any, images: Any, train_step: Any) -> None:
    student = make_student(name)
    twin = copy.deepcopy(student)
    own = {id(module) for module in twin.modules()}
    for layer in quant_layers(twin).values():
        assert id(layer.source) in own and all(id(c) in own for c in layer.consumers)
    for quantizer in act_quantizers(twin).values():
        assert id(quantizer.quant.owner) in own
        assert quantizer.origin is None or all(id(source) in own for source in quantizer.origin.sources)
    with torch.no_grad():
        before = student(images(3))
        assert torch.equal(twin(images(3)), before)
    train_step(twin, images(4))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.sub_(0.1 * parameter.grad)
        assert torch.equal(student.eval()(images(3)), before)
        assert not torch.equal(twin.eval()(images(3)), before)
    assert twin.tap_paths == student.tap_paths and twin.spec == student.spec


def test_operands_of_sums_have_equal_steps(make_student: Any) -> None:
    for name in ("residual", "bottleneck", "preactivation"):
        student = make_student(name)
        modules, sums = dict(student.named_modules()), 0
        for node in student.graph.nodes:
            if node.op == "call_module" and isinstance(modules[node.target], Sum):
                a, b = (modules[operand.target].quant for operand in node.args)
                assert a.owner is b.owner and a.step.item() == b.step.item() and a.bits == b.bits == 8
                sums += 1
        assert sums == {"residual": 3, "bottleneck": 2, "preactivation": 1}[name]


def test_operands_of_concatenations_lie_on_one_grid(make_student: Any) -> None:
    for name in ("dense", "branches", "shuffle"):
        student = make_student(name)
        view, found = integer_view(student), 0
        for node in view.nodes:
            if type(node).__name__ == "Concat":
                assert len({view.grids[operand] for operand in node.inputs}) == 1
                assert view.grids[node.output] == view.grids[node.inputs[0]]
                found += 1
        assert found == {"dense": 3, "branches": 2, "shuffle": 1}[name]
    dense = make_student("dense")
    rescaled = [n for n in act_quantizers(dense) if "_input" in n]
    assert all(n.endswith("_input0") for n in rescaled), "values of several like concatenations need one grid"


def test_first_last_and_overrides(make_net: Any, images: Any) -> None:
    overrides = {"a.1.*": {"weight_bits": 5}, "head": {"act_bits": 6, "weight_bits": 3}}
    spec = QuantSpec(weight_bits=2, act_bits=2, overrides=overrides)
    student = prepare(make_net("residual"), spec, example_inputs=images(1))
    bits = {name: (layer.quant.bits, layer.source.quant.bits) for name, layer in quant_layers(student).items()}
    assert bits["stem.0"] == (8, 8) and bits["a.0.0"] == (2, 2) and bits["a.1.0"] == (5, 2) and bits["head"] == (3, 6)
    assert student.spec is spec


def test_scales_are_listed_once(make_student: Any) -> None:
    for name, options in (("residual", {}), ("dense", {}), ("residual", {"act_quantizer": "pact"})):
        student = make_student(name, **options)
        scales = quantizer_scales(student)
        named = dict(student.named_parameters())
        expected = {n for n in named if n.rsplit(".", 1)[-1] in ("scale", "alpha")}
        assert len({id(p) for p in scales}) == len(scales)
        assert {id(p) for p in scales} == {id(named[n]) for n in expected}
        assert len(expected) == len({id(q.quant.owner) for q in act_quantizers(student).values()}) + len(
            quant_layers(student)
        )


def test_taps_stand_where_the_float_modules_stand(net_name: str, make_net: Any, make_student: Any, images: Any) -> None:
    """At 8 bits a tap gives what the float module gives, but for small errors."""
    net, student = make_net(net_name).eval(), make_student(net_name, 8, 8)
    state = {k: v for k, v in student.state_dict().items() if k.endswith(("running_mean", "running_var"))}
    norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    _copy_statistics(net, student)
    assert len(state) >= 2 * len(norms)
    wanted, got = _outputs(net, student.tap_paths, images(4)), _outputs(student, student.tap_paths.values(), images(4))
    assert "head" in student.tap_paths and "relu" in student.tap_paths and "stem.1" in student.tap_paths
    for path, inside in student.tap_paths.items():
        assert path in dict(net.named_modules())
        expected, value = wanted[path], got[inside]
        assert value.shape == expected.shape, path
        spread = float(expected.std()) + 1e-6
        assert float((value - expected).abs().mean()) < 0.3 * spread, path
    assert "stem.0" not in student.tap_paths, "its batch norm is folded in: the value does not exist"


def _copy_statistics(net: nn.Module, student: nn.Module) -> None:
    """Give the float net the statistics that calibration gave the student's layers, in the order of the net."""
    inside = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    by_weight = {tuple(m.weight.tolist()): m for m in inside}
    for norm in (m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        twin = min(by_weight, key=lambda w: _gap(w, norm.weight))
        norm.load_state_dict(by_weight[twin].state_dict())


def _gap(values: tuple[float, ...], weight: Tensor) -> float:
    if len(values) != len(weight):
        return float("inf")
    return float((torch.tensor(values) - weight.detach()).abs().max())


def _outputs(model: nn.Module, paths: Any, batch: Tensor) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(p).register_forward_hook(lambda _m, _i, out, p=p: values.__setitem__(p, out.clone()))
        for p in set(paths)
    ]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return values


def test_batch_size_changes_nothing(net_name: str, make_student: Any, images: Any) -> None:
    student, batch = make_student(net_name), images(6)
    with torch.no_grad():
        whole = student(batch)
        parts = torch.cat([student(batch[:1]), student(batch[1:3]), student(batch[3:])])
    assert bool(whole.std() > 0)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


def test_relu6_of_a_rectified_sum_still_bounds(images: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.other = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            total = F.relu(self.a(x)) + F.relu(self.b(x))
            return self.head(F.relu6(total)) + self.other(total)

    net = Net()
    for conv in (net.a, net.b):
        conv.weight.data.mul_(30)
    student = prepare(net, QuantSpec(weight_bits=8, act_bits=8), example_inputs=images(1))
    quantizers.calibrate(student, [images(8)])
    with torch.no_grad():
        entering = _outputs(student, [quant_layers(student)["head"].source.name], images(8))
    assert 5.5 < float(next(iter(entering.values())).max()) < 6.1


def test_in_place_functions_do_not_touch_what_others_read(images: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.head(x) + F.silu(x.clone(), inplace=True)

    student = prepare(Net(), QuantSpec(weight_bits=8, act_bits=8), example_inputs=images(1))
    functions = [m for m in student.modules() if isinstance(m, nn.SiLU)]
    assert len(functions) == 1 and not functions[0].inplace


def test_joints_are_modules(make_student: Any) -> None:
    kinds = {type(m) for n in ("squeeze_excite", "residual", "dense") for m in make_student(n).modules()}
    assert {Sum, Product, Concat} <= kinds


def test_nan_goes_through(make_student: Any, images: Any) -> None:
    batch = images(2)
    batch[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        out = make_student("residual")(batch)
    assert bool(torch.isnan(out[0]).any()) and not bool(torch.isnan(out[1]).any())


def test_not_calibrated(make_net: Any, images: Any) -> None:
    student = prepare(make_net("residual"), QuantSpec(), example_inputs=images(1))
    assert student.training
    for mode in (True, False):
        with pytest.raises(
            quantizers.NotCalibratedError, match=r"images_quant: scales are not calibrated; call quantizers"
        ):
            student.train(mode)(images(2))
    assert not prepare(make_net("plain").eval(), QuantSpec(), example_inputs=images(1)).training
