"""A student and its file compute the same, and a file that does not is found out."""

from __future__ import annotations

import json
import math
import os
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from export import ExportError, ParityError, check_parity, export_onnx, repack
from quantizers import NotCalibratedError, QuantSpec, calibrate, prepare


class Residual(nn.Module):
    """A convolution, a residual block, a mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(x + self.body(x))
        return self.head(self.pool(x).flatten(1))


def batches(seed: int, count: int = 3) -> list[torch.Tensor]:
    """Return noisy images, each with its own color, so that their classes differ."""
    generator = torch.Generator().manual_seed(seed)
    colors = [2 * torch.randn(20, 3, 1, 1, generator=generator) for _ in range(count)]
    return [color + torch.randn(20, 3, 12, 12, generator=generator) for color in colors]


def make_student(weight_bits: int, act_bits: int):
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        for batch in batches(1):
            model(batch)  # running statistics
    spec = QuantSpec(weight_bits=weight_bits, act_bits=act_bits)
    student = prepare(model, spec, example_inputs=batches(1)[0])
    calibrate(student, batches(1))
    return student.eval()


@pytest.fixture(scope="module", params=[(2, 2), (4, 4)], ids=["w2a2", "w4a4"])
def student(request):
    return make_student(*request.param)


@pytest.fixture(scope="module")
def path(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "student.onnx"
    export_onnx(student, batches(1)[0], path, strict=True)
    return path


def altered(path, target, name, change):
    model = onnx.load(path)
    tensor = next(entry for entry in model.graph.initializer if entry.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, target)
    return target


def test_one_batch_by_itself_is_a_batch(student, path):
    images = batches(5, count=1)[0]
    labels = torch.arange(len(images)) % 6
    for alone, listed in ((images, [images]), ((images, labels), [(images, labels)])):
        found, wanted = (check_parity(student, path, given, layer_images=4) for given in (alone, listed))
        assert (found.passed, found.images, found.off) == (True, 20, wanted.off)


def test_student_and_file_agree(student, path):
    report = check_parity(student, path, batches(2), layer_images=60)
    assert report.images == report.layer_images == 60
    assert report.off.top1_agreement == 1.0 and report.off.differing == 0
    assert report.on.top1_agreement == 1.0
    assert report.off.max_steps < 0.5  # less than half a unit of the last layer's accumulator: the same integers
    assert len(report.layers) >= 6 and all(layer.values > 0 for layer in report.layers)
    assert not any(layer.differing for layer in report.layers)
    assert report.predicted_classes > 1 and not report.all_zero and report.notes == ()
    assert report.accuracy is report.off.accuracy is None
    report.raise_if_worse()
    assert json.loads(json.dumps(report.to_json()))["off"]["top1_agreement"] == 1.0


def test_layers_are_in_order_and_named_as_modules(student, path):
    modules = dict(student.named_modules())
    names = [layer.name for layer in check_parity(student, path, batches(2, 1)).layers]
    assert all(name in modules for name in names) and len(set(names)) == len(names)


def test_labels_give_accuracies(student, path):
    pairs = []
    with torch.no_grad():
        for number, images in enumerate(batches(2)):
            labels = student(images).argmax(1)
            labels[: 5 * number] = (labels[: 5 * number] + 1) % 6
            pairs.append((images, labels))
    report = check_parity(student, path, pairs, layer_images=0)
    assert report.accuracy == report.off.accuracy == report.on.accuracy == pytest.approx(45 / 60)
    assert report.layers == () and report.layer_images == 0


def test_layers_are_compared_on_so_many_images_at_most(student, path):
    report = check_parity(student, path, batches(2), layer_images=25)
    assert (report.images, report.layer_images) == (60, 25)
    image = report.layers[0]
    assert image.values == 25 * 3 * 12 * 12


def test_an_altered_weight_is_found(student, path, tmp_path):
    changed = altered(path, tmp_path / "changed.onnx", "stem.0.weight.int8", np.negative)
    report = check_parity(student, changed, batches(2), layer_images=60)
    image, first = report.layers[0], next(layer for layer in report.layers if layer.differing)
    assert image.differing == 0 and first.name == report.layers[1].name and first.max_steps > 0
    assert report.off.max_difference > 0 and report.off.differing > 0
    with pytest.raises(ParityError, match=f"first layer that differs is {first.name}") as caught:
        report.raise_if_worse()
    assert caught.value.report is report


def test_an_altered_bias_of_the_last_layer_is_found(student, path, tmp_path):
    def lift(bias):
        bias[5] += 2**24
        return bias

    report = check_parity(student, altered(path, tmp_path / "c.onnx", "head.bias.int32", lift), batches(2))
    assert report.off.top1_agreement < 1 and report.off.max_steps == pytest.approx(2**24, rel=0.5)
    assert not any(layer.differing for layer in report.layers)
    with pytest.raises(ParityError, match="optimizations off: .*optimizations on"):
        report.raise_if_worse()
    with pytest.raises(ParityError, match=r"optimizations off: logits of 60 of 60 images differ by up to") as caught:
        report.raise_if_worse(min_top1_off=0.0, min_top1_on=0.0)  # classes are not all that is looked at
    assert "class" not in str(caught.value)
    report = check_parity(student, tmp_path / "c.onnx", batches(2), constants=False)
    report.raise_if_worse(min_top1_off=0.0, min_top1_on=0.0, max_steps_off=math.inf, max_steps_on=math.inf)


def test_student_is_left_as_it_was(student, path, tmp_path):
    student.train()
    student.stem.eval()
    flags = {name: module.training for name, module in student.named_modules()}
    state = {name: value.clone() for name, value in student.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in student.modules())
    try:
        export_onnx(student, batches(1)[0], tmp_path / "n.onnx")
        check_parity(student, path, batches(2, 1))
        with pytest.raises(ExportError):
            export_onnx(student, batches(1)[0], tmp_path / "n.onnx", opset=3)
        with pytest.raises(ValueError, match="not finite"):
            check_parity(student, path, [torch.full((1, 3, 12, 12), float("nan"))])
        assert flags == {name: module.training for name, module in student.named_modules()}
    finally:
        student.eval()
    assert hooks == sum(len(module._forward_hooks) for module in student.modules())
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert (tmp_path / "n.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no images"),
        ([torch.zeros(4, 3, 12, 12)], "every image is all zeros"),
        (
            [torch.zeros(4, 3, 12, 12, dtype=torch.uint8)],
            "batch 0: images must be normalized floats, found torch.uint8",
        ),
        ([torch.ones(4, 3, 16, 16)], r"images are \[3, 16, 16\], but the file takes \[3, 12, 12\]"),
        ([torch.ones(4, 1, 12, 12)], r"images are \[1, 12, 12\], but the file takes \[3, 12, 12\]"),
        ([(torch.ones(4, 3, 12, 12), torch.zeros(3))], r"batch 0: \[3\] labels for \[4, 3, 12, 12\] images"),
    ],
)
def test_batches_that_prove_nothing(student, path, given, message):
    with pytest.raises(ValueError, match=message):
        check_parity(student, path, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "batches must be image tensors, or tuples that start with one, got NoneType"),
        ({"images": torch.ones(4, 3, 12, 12)}, "batches must be image tensors.* got dict"),
        (np.ones((4, 3, 12, 12), np.float32), "batch 0: must be an image tensor.* found ndarray.*from_numpy"),
        ([torch.ones(4, 3, 12, 12), np.ones((4, 3, 12, 12))], "batch 1: must be an image tensor.* found ndarray"),
        ([{"images": torch.ones(4, 3, 12, 12)}], "batch 0: must be an image tensor.* found dict"),
        ([()], "batch 0: must be an image tensor.* found nothing"),
        ([(torch.ones(4, 3, 12, 12), [0, 1, 2, 3])], "batch 0: .* both tensors, found Tensor, list"),
    ],
)
def test_batches_of_other_types_are_refused(student, path, given, message):
    with pytest.raises(TypeError, match=message):
        check_parity(student, path, given)


def test_batches_as_calibrate_takes_them(student, path):
    images, labels = torch.randn(4, 3, 12, 12), torch.arange(4)
    for given in ([(images,)], [[images]], [(images, labels)], [(images, labels, "paths")], [(images, None)], images):
        calibrate(prepare(Residual(), QuantSpec(4, 4), example_inputs=images), given)
        assert check_parity(student, path, given).images == 4


def test_a_file_of_others_is_refused(student, path, tmp_path):
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "n.onnx")
    with pytest.raises(ValueError, match="compare a file that export_onnx wrote"):
        check_parity(student, tmp_path / "n.onnx", batches(2, 1))
    with pytest.raises(FileNotFoundError, match="no model file"):
        check_parity(student, tmp_path / "none.onnx", batches(2, 1))
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.onnx: it is not an ONNX file, or it is damaged"):
        check_parity(student, tmp_path / "cut.onnx", batches(2, 1))


def test_logits_that_are_all_zero_prove_nothing(tmp_path):
    student = make_student(4, 4)
    with torch.no_grad():
        student.head.weight.zero_()
        student.head.bias.zero_()
    export_onnx(student, batches(1)[0], tmp_path / "n.onnx")
    report = check_parity(student, tmp_path / "n.onnx", batches(2, 1))
    assert report.all_zero and "every logit is zero" in report.notes[0]
    with pytest.raises(ParityError, match="every logit is zero"):
        report.raise_if_worse()


def test_quantizers_that_the_student_lacks_are_noted(student, path, tmp_path):
    model = onnx.load(path)
    entry = next(entry for entry in model.metadata_props if entry.key == "quantizers")
    taps = json.loads(entry.value)
    taps[1]["name"] = "elsewhere"
    entry.value = json.dumps(taps)
    onnx.save(model, tmp_path / "n.onnx")
    report = check_parity(student, tmp_path / "n.onnx", batches(2, 1))
    assert len(report.layers) == len(taps) - 1
    assert report.notes[0].startswith("elsewhere: its codes were not compared")


def test_what_is_not_a_calibrated_student_is_refused(tmp_path):
    images = batches(1)[0]
    with pytest.raises(ExportError, match="takes what quantizers.prepare made, got Residual"):
        export_onnx(Residual(), images, tmp_path / "n.onnx")
    with pytest.raises(NotCalibratedError):
        export_onnx(prepare(Residual(), QuantSpec(4, 4), example_inputs=images), images, tmp_path / "n.onnx")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("given", [torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3), [None]])
def test_example_inputs_must_be_float_batches(student, tmp_path, given):
    with pytest.raises(ExportError, match="example input 0 must be a normalized float batch"):
        export_onnx(student, given, tmp_path / "n.onnx")


class Heads(nn.Module):
    """A dictionary of outputs; ``build`` makes it of the module and features."""

    def __init__(self, build) -> None:
        super().__init__()
        self.conv, self.conv2, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1), nn.Linear(6, 5)
        self.build = build

    def forward(self, x):
        return self.build(self, torch.relu(self.conv(x)))


DICTIONARIES = {
    "two": (lambda self, y: {"out": self.head(y.mean((2, 3))), "features": self.conv2(y)}, ["out", "features"]),
    "one": (lambda self, y: {"scores": self.head(y.mean((2, 3)))}, ["scores"]),
    "logits second": (lambda self, y: {"map": self.conv2(y), "logits": self.head(y.mean((2, 3)))}, ["map", "logits"]),
}


def heads_student(name: str):
    torch.manual_seed(2)
    student = prepare(Heads(DICTIONARIES[name][0]), QuantSpec(), example_inputs=batches(1)[0])
    calibrate(student, batches(1))
    return student.eval()


@pytest.mark.parametrize("flavor", ["ort", "qcdq"])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_outputs_are_compared_by_the_keys_of_the_students_dictionary(name, flavor, tmp_path):
    student, names = heads_student(name), DICTIONARIES[name][1]
    export_onnx(student, batches(1)[0], tmp_path / "s.onnx", flavor=flavor)
    model = onnx.load(tmp_path / "s.onnx")
    assert [entry.name for entry in model.graph.output] == names
    report = check_parity(student, tmp_path / "s.onnx", batches(4))
    assert report.off.differing == 0 and report.off.beyond == 0 and report.off.max_steps < 0.5 and not report.uncompared
    assert not [layer for layer in report.layers if layer.differing or layer.differing_on]
    # names say which is which, not the place in the file
    shuffled = list(reversed(model.graph.output))
    del model.graph.output[:]
    model.graph.output.extend(shuffled)
    onnx.save(model, tmp_path / "other.onnx")
    assert check_parity(student, tmp_path / "other.onnx", batches(4)).off == report.off


def test_an_output_beside_the_logits_is_compared_by_value(tmp_path):
    student = heads_student("two")
    export_onnx(student, batches(1)[0], tmp_path / "s.onnx")
    with torch.no_grad():
        student.conv2.bias.add_(0.5)
    report = check_parity(student, tmp_path / "s.onnx", batches(4))
    assert report.off.differing == 0 and report.off.max_steps < 0.5
    assert report.off.beyond == report.images and not report.passed


def test_outputs_of_other_names_are_told(tmp_path):
    student = heads_student("two")
    export_onnx(student, batches(1)[0], tmp_path / "s.onnx")
    model = onnx.load(tmp_path / "s.onnx")
    text = model.SerializeToString()
    for old, new, message in (("features", "fixtures", "'features' .the file has no such output"),):
        (tmp_path / "t.onnx").write_bytes(text.replace(old.encode(), new.encode()))
        report = check_parity(student, tmp_path / "t.onnx", batches(4))
        assert not report.passed and any(re.search(message, row) for row in report.uncompared)
        assert any("'fixtures' (the student has no such output" in row for row in report.uncompared)
    (tmp_path / "u.onnx").write_bytes(text.replace(b"out", b"cut"))
    with pytest.raises(ValueError, match="not 'out'; compare a file that export_onnx wrote of this student"):
        check_parity(student, tmp_path / "u.onnx", batches(4))


@pytest.mark.parametrize("linear", ["gemm", "matmul_nbits"])
def test_one_scale_per_tensor_declares_every_output(linear, tmp_path):
    """One scale for all outputs says nothing about their number, which shape inference would lose."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5))
    images = torch.randn(16, 3, 4, 4)
    spec = QuantSpec(weight_bits=2, first_bits=None, last_bits=None, per_channel=False)
    student = prepare(net, spec, images)
    calibrate(student, images)
    path = export_onnx(student.eval(), images[:1], tmp_path / "n.onnx", linear=linear).path
    assert onnx.load(path).graph.output[0].type.tensor_type.shape.dim[1].dim_value == 5
    assert check_parity(student, path, images).passed
    (tmp_path / "int8.onnx").write_bytes(repack(path, "int8"))
    assert check_parity(student, tmp_path / "int8.onnx", images).passed


@pytest.mark.parametrize("shape", [[0, 4], [0, 1], [0, 6, 1], [6]])
def test_an_output_that_has_another_shape_than_declared_is_found(student, path, tmp_path, shape):
    model = onnx.load(path)
    sizes = model.graph.output[0].type.tensor_type.shape
    del sizes.dim[:]
    for size in shape:
        added = sizes.dim.add()
        if size:
            added.dim_value = size
        else:
            added.dim_param = "batch"
    onnx.save(model, tmp_path / "other.onnx")
    try:
        report = check_parity(student, tmp_path / "other.onnx", batches(2), constants=False)
    except ValueError:
        return  # the runtime itself refuses it
    assert not report.passed
    assert any("the file says that its output" in fault for fault in report.faults)
