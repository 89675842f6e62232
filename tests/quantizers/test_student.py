"""States, frozen layers, casts and copies of a student."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import quantizers
from qkd.files import read_safetensors
from qkd.nets.weights import WeightsError, load_weights, save_weights
from qkd.training.state import fill
from quantizers import QuantSpec, act_quantizers, calibrate, integer_view, prepare, quant_layers
from quantizers.records import is_grid_record


def without_records(student: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in student.state_dict().items() if not is_grid_record(name)}


def fresh(make_net: Any, images: Any, name: str = "residual", **options: Any) -> Any:
    return prepare(make_net(name), QuantSpec(**options), example_inputs=images(2))


# -- states of other grids ---------------------------------------------------------------------------------------------

OTHERS = {
    "widths": (
        {"weight_bits": 2, "act_bits": 2}, {"weight_bits": 4, "act_bits": 4},
        r"a\.0\.0: the state has 4-bit weights \(-8 to 7, lsq, one step per channel\), the student 2-bit weights "
        r"\(-2 to",
    ),
    "activations alone": (
        {"act_bits": 2}, {"act_bits": 4},
        r"the state has 4-bit unsigned activations \(lsq\), the student 2-bit unsigned activations \(lsq\)",
    ),
    "weights alone": ({"weight_bits": 2}, {"weight_bits": 3}, "the state has 3-bit weights .* the student 2-bit"),
    "first layer": ({"first_bits": 8}, {"first_bits": 4}, r"stem\.0: the state has 4-bit weights .* 8-bit weights"),
    "sums": ({"sum_bits": 8}, {"sum_bits": 4}, "the state has 4-bit .* activations .* 8-bit"),
    "grain": ({"per_channel": True}, {"per_channel": False}, "one step per tensor.* one step per channel"),
    "weight method": ({"weight_quantizer": "lsq"}, {"weight_quantizer": "dorefa"}, "dorefa.* lsq"),
    "activation method": ({"act_quantizer": "lsq"}, {"act_quantizer": "dorefa"}, r"\(dorefa\), the student .* \(lsq\)"),
    "clipping level": ({"act_quantizer": "lsq"}, {"act_quantizer": "pact"}, r"\(pact\), the student .* \(lsq\)"),
    "override": ({}, {"overrides": {"b.1.*": {"weight_bits": 6}}}, r"b\.1\.0: the state has 6-bit .* 4-bit"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_other_grids_is_refused_and_nothing_is_loaded(name: str, make_net: Any, images: Any) -> None:
    mine, theirs, message = OTHERS[name]
    student, other = fresh(make_net, images, **mine), fresh(make_net, images, **theirs)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    expected = f"(?s)this state is from a student with other grids; .*{message}.*QuantSpec"
    with pytest.raises(RuntimeError, match=expected):
        student.load_state_dict(other.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    with pytest.raises(ValueError, match="other grids"):
        fill(student, other.state_dict())
    parent, stranger = nn.ModuleDict({"student": student}), nn.ModuleDict({"student": other})
    with pytest.raises(RuntimeError, match="the state has"):  # inside another module, too
        parent.load_state_dict(stranger.state_dict())


def test_signed_and_unsigned_grids_do_not_mix() -> None:
    from quantizers.tensor_quant import LsqActQuant

    made = {kind: LsqActQuant(4, kind) for kind in ("unsigned", "signed", "shifted")}
    for mine in made:
        for theirs in made:
            if mine == theirs:
                made[mine].load_state_dict(made[theirs].state_dict())
                continue
            with pytest.raises(RuntimeError, match=f"4-bit {theirs} activations .* the student 4-bit {mine}"):
                made[mine].load_state_dict(made[theirs].state_dict())


def test_older_states_load_and_tell_the_widths_of_their_activations(
    make_student: Any, make_net: Any, images: Any
) -> None:
    student = make_student("residual", 4, 4)
    state = without_records(student)
    assert len(state) < len(student.state_dict())
    again = fresh(make_net, images, weight_bits=4, act_bits=4)
    again.load_state_dict(state, strict=True)
    again.eval()
    assert torch.equal(again(images(3)), student(images(3)))
    assert set(again.state_dict()) == set(student.state_dict())
    fill(fresh(make_net, images, weight_bits=4, act_bits=4), state)
    with pytest.raises(RuntimeError, match=r"the state has 4-bit \w+ activations .* the student 2-bit"):
        fresh(make_net, images, weight_bits=2, act_bits=2).load_state_dict(state)


def test_records_pass_through_safetensors(make_student: Any, make_net: Any, images: Any, tmp_path: Path) -> None:
    student = make_student("squeeze_excite", 2, 2)
    save_weights(student, tmp_path / "s.safetensors")
    stored = read_safetensors(tmp_path / "s.safetensors")
    assert {key: tensor.dtype for key, tensor in stored.items() if is_grid_record(key)} and all(
        tensor.dtype == torch.int32 for key, tensor in stored.items() if is_grid_record(key)
    )
    again = fresh(make_net, images, "squeeze_excite", weight_bits=2, act_bits=2)
    load_weights(again, tmp_path / "s.safetensors")
    assert torch.equal(again.eval()(images(3)), student(images(3)))
    with pytest.raises(WeightsError, match=r"s\.safetensors: this state is from a student with other grids"):
        load_weights(fresh(make_net, images, "squeeze_excite"), tmp_path / "s.safetensors")


def test_older_files_load(make_student: Any, make_net: Any, images: Any, tmp_path: Path) -> None:
    from qkd.files import write_safetensors

    student = make_student("plain", 2, 2)
    write_safetensors(tmp_path / "s.safetensors", without_records(student))
    again = fresh(make_net, images, "plain", weight_bits=2, act_bits=2)
    load_weights(again, tmp_path / "s.safetensors")
    assert torch.equal(again.eval()(images(3)), student(images(3)))


# -- frozen layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "perceptron", "preactivation", "shapes"])
def test_frozen_layers_stay_as_they_are(name: str, make_net: Any, images: Any) -> None:
    net = make_net(name)
    frozen = {path for path, _ in net.named_parameters() if path.split(".")[0] not in ("head", "head2")}
    for path, parameter in net.named_parameters():
        parameter.requires_grad_(path not in frozen)
    student = prepare(net, QuantSpec(weight_bits=4, act_bits=4), example_inputs=images(2))
    quantizers.calibrate(student, [images(8, seed=3)])
    student.train()
    kept = {
        path: parameter for path, parameter in student.named_parameters()
        if path.split(".")[0] not in ("head", "head2") and ".act_quant." not in path
    }  # fmt: skip
    assert kept and not any(parameter.requires_grad for parameter in kept.values())
    before = {path: parameter.detach().clone() for path, parameter in kept.items()}
    statistics = {k: v.clone() for k, v in student.state_dict().items() if k.endswith("running_mean")}
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05, weight_decay=0.1)
    head = student.get_submodule("head").weight.detach().clone()
    for seed in range(2):
        optimizer.zero_grad()
        student(images(8, seed=seed)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(parameter, before[path]) for path, parameter in kept.items())
    assert not torch.equal(student.get_submodule("head").weight, head)
    # running statistics follow the batches, as in the float network in training mode
    changed = [k for k, v in student.state_dict().items() if k in statistics and not torch.equal(v, statistics[k])]
    assert sorted(changed) == sorted(statistics)
    assert all(q.quant.owner.scale.requires_grad for q in act_quantizers(student).values())


def test_one_frozen_bias_alone(make_net: Any, images: Any) -> None:
    net = make_net("plain")
    net.head.bias.requires_grad_(False)
    layer = quant_layers(prepare(net, QuantSpec(), example_inputs=images(2)))["head"]
    assert (layer.weight.requires_grad, layer.bias.requires_grad, layer.quant.scale.requires_grad) == (
        True,
        False,
        True,
    )


# -- casts and copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_half_precision_is_refused_with_the_way_out(cast: str, make_student: Any, images: Any) -> None:
    student = make_student("plain")
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}[cast]
    for attempt in (getattr(student, cast), lambda: student.to(dtype), lambda: nn.Sequential(student).to(dtype)):
        with pytest.raises(TypeError, match=r"a student cannot be made torch\.b?float16: .*torch\.autocast"):
            attempt()
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert student(images(2)).shape == (2, 5)


def test_double_computes_and_says_so_at_export(make_student: Any, images: Any) -> None:
    student = make_student("residual", 4, 4)
    batch = images(3)
    single = student(batch).detach()
    double = student.double()(batch.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.detach().float(), single, rtol=0.05, atol=0.05)
    with pytest.raises(TypeError, match=r"is torch\.float64: .*call student\.float\(\) first"):
        integer_view(student)
    assert torch.equal(student.float()(batch), single)


def test_pickling_is_refused_with_the_way_out(make_student: Any) -> None:
    student = make_student("plain")
    for attempt in (lambda: torch.save(student, io.BytesIO()), lambda: pickle.dumps(student)):
        with pytest.raises(TypeError, match=r"cannot be pickled.*student\.state_dict\(\).*prepare"):
            attempt()
    kept = io.BytesIO()
    torch.save(student.state_dict(), kept)
    kept.seek(0)
    state = torch.load(kept, weights_only=True)
    student.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_copies_are_students(copied: Any, make_student: Any, images: Any) -> None:
    student = make_student("residual")
    twin = copied(student)
    assert type(twin).__mro__[1] is quantizers.Student and twin.spec == student.spec
    assert twin.tap_paths == student.tap_paths and torch.equal(twin(images(2)), student(images(2)))
    assert len(integer_view(twin).nodes) == len(integer_view(student).nodes)
    own = {id(p) for p in student.parameters()} & {id(p) for p in twin.parameters()}
    assert bool(own) == (copied is copy.copy)


def test_a_net_that_is_frozen_throughout_is_said_to_be(make_net: Any, images: Any) -> None:
    net = make_net("plain").requires_grad_(False)
    with pytest.warns(UserWarning, match=r"every parameter of Plain is frozen .*requires_grad_\(True\)") as found:
        student = prepare(net, QuantSpec(), example_inputs=images(2))
    assert len(found) == 1
    assert not any(p.requires_grad for layer in quant_layers(student).values() for p in layer.parameters())


class Ending(nn.Module):
    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.conv, self.head, self.end = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(F.relu(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(-1), nn.Softmax(dim=-1)])
def test_the_guard_of_prepare_passes_a_net_that_ends_in_softmax(end: nn.Module, images: Any) -> None:
    """Training mode gives logits; eval mode, and the guard, what the net gives."""
    torch.manual_seed(0)
    net = Ending(end)
    student = prepare(net, QuantSpec(weight_bits=8, act_bits=8), example_inputs=images(2))
    calibrate(student, images(8))
    with torch.no_grad():
        logits, given = student.train()(images(4)), student.eval()(images(4))
    torch.testing.assert_close(given, end(logits), rtol=0.05, atol=0.02)
    torch.testing.assert_close(given, net.eval()(images(4)), rtol=0.1, atol=0.05)
    assert not torch.allclose(logits, given)


# -- what is no such student, and no such image ------------------------------------------------------------------------


class Half(nn.Module):
    """Depends on the size of its images: it looks at columns 0 to 7."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x))[..., :8].mean((2, 3)))


@pytest.mark.parametrize("copied", [lambda s: s, copy.deepcopy, copy.copy])
def test_images_of_another_size_are_refused(copied: Any) -> None:
    """Its windows and slices are those of the size it was prepared for, so it would be another function."""
    x = torch.randn(2, 3, 16, 16)
    student = prepare(Half(), QuantSpec(), example_inputs=x)
    calibrate(student, x)
    student = copied(student)
    assert student(x).shape == (2, 2) and student(x[:0]).shape == (0, 2)
    for given in ((torch.randn(2, 3, 8, 16),), (torch.randn(2, 1, 16, 16),)):
        with pytest.raises(ValueError, match=r"prepared for \(3, 16, 16\).*give images of that size"):
            student(*given)
    with pytest.raises(ValueError, match="prepared for"):
        student(x=torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"add a batch axis, image\[None\]"):
        student(x[0])


@pytest.mark.parametrize("wrapped", [lambda s: s, nn.Sequential, lambda s: nn.Sequential(nn.Conv2d(3, 3, 1), s)])
def test_a_student_is_no_float_net(wrapped: Any, make_student: Any, images: Any) -> None:
    with pytest.raises(TypeError, match="is already a low-bit student; give prepare the float network"):
        prepare(wrapped(make_student()), QuantSpec(), example_inputs=images(2))


def test_what_is_no_net_or_no_spec_is_named(make_net: Any, images: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        prepare(lambda x: x, QuantSpec(), example_inputs=images(2))
    with pytest.raises(TypeError, match=r"spec must be a QuantSpec, such as QuantSpec\(.*got 'w4a4'"):
        prepare(make_net("residual"), "w4a4", example_inputs=images(2))
