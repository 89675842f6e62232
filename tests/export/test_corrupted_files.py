"""A table of files that are not the student: each one fails, with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import export.parity.ways
from export import ParityError, ParityReport, check_parity, export_onnx
from export.runtime import open_session
from quantizers import QuantSpec, calibrate, prepare

Change = Callable[[onnx.ModelProto], None]
FLAVORS = ("ort", "qcdq")


class Net(nn.Module):
    """A padded convolution, both poolings, a residual sum, a flatten of several places and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.max = nn.MaxPool2d(3, 2, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.mean = nn.AvgPool2d(2)
        self.head = nn.Linear(8 * 9, 6)

    def forward(self, x):
        x = self.max(torch.relu(self.stem(x)))
        x = torch.relu(x + self.body(x))
        return self.head(self.mean(x).flatten(1))


def batches(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    colors = 2 * torch.randn(24, 3, 1, 1, generator=generator)
    return [colors + torch.randn(24, 3, 12, 12, generator=generator)]


def make_student(seed: int = 0):
    torch.manual_seed(seed)
    student = prepare(Net(), QuantSpec(weight_bits=4, act_bits=4), example_inputs=batches(1)[0])
    calibrate(student, batches(1))
    return student.eval()


@pytest.fixture(scope="module")
def student():
    return make_student()


@pytest.fixture(scope="module", params=FLAVORS)
def path(request, student, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "student.onnx"
    export_onnx(student, batches(1)[0], path, flavor=request.param, pack="int8")
    return path


def compare(student, path: Path, target: Path, change: Change) -> ParityReport:
    model = onnx.load(path)
    before = model.SerializeToString()
    change(model)
    assert model.SerializeToString() != before, "nothing was changed"
    onnx.save(model, target)
    return check_parity(student, target, batches(2))


def altered(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the one initializer whose name starts so."""

    def apply(model: onnx.ModelProto) -> None:
        tensor = next(entry for entry in model.graph.initializer if entry.name.startswith(name))
        values = numpy_helper.to_array(tensor)
        changed = np.asarray(change(values.copy()), values.dtype).reshape(values.shape)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))

    return apply


def node_of(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == operator)


def attribute(operator: str, name: str, value: object) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        node = node_of(model, operator)
        kept = [entry for entry in node.attribute if entry.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return apply


def swapped_channels(values: np.ndarray) -> np.ndarray:
    return values[[1, 0, *range(2, len(values))]]


def quantizer_scale(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the scale with which a quantizer puts values on its grid (and not what reads it)."""

    def apply(model: onnx.ModelProto) -> None:
        tap = next(tap for tap in taps_of(model) if tap["name"].startswith(name))
        makers = {output: node for node in model.graph.node for output in node.output}
        node = makers[tap["tensor"]]
        while node.op_type != "QuantizeLinear":
            node = makers[node.input[0]]
        scale = next(entry for entry in model.graph.initializer if entry.name == node.input[1])
        values = change(numpy_helper.to_array(scale).copy())
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), "other.scale"))
        node.input[1] = "other.scale"

    return apply


def taps_of(model: onnx.ModelProto) -> list[dict]:
    return json.loads(next(entry.value for entry in model.metadata_props if entry.key == "quantizers"))


def retapped(change: Callable[[list[dict]], object]) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        taps = taps_of(model)
        change(taps)
        next(entry for entry in model.metadata_props if entry.key == "quantizers").value = json.dumps(taps)

    return apply


def no_relu(model: onnx.ModelProto) -> None:
    """Let negative values through where the grid clips them: the zero point moves to the middle."""
    tap = next(tap for tap in taps_of(model) if tap["zero_point"] == 0 and tap["bits"] == 8)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and tap["tensor"] in (*node.input, *node.output):
            node.input[2] = "other.zero"
    model.graph.initializer.append(numpy_helper.from_array(np.array(100, np.uint8), "other.zero"))


def mean_for_maximum(model: onnx.ModelProto) -> None:
    """Replace the maximum over windows by its first value: the same shape, another function."""
    attribute("MaxPool", "kernel_shape", [1, 1])(model)
    attribute("MaxPool", "pads", [0, 0, 0, 0])(model)


def transposed(model: onnx.ModelProto) -> None:
    flatten = next(node for node in model.graph.node if node.op_type in ("Flatten", "Reshape"))
    turned = helper.make_node("Transpose", [flatten.input[0]], ["turned"], name="turned", perm=[0, 1, 3, 2])
    place = list(model.graph.node).index(flatten)
    flatten.input[0] = "turned"
    model.graph.node.insert(place, turned)


def reworked_output(operator: str, constants: dict[str, np.ndarray], shape: list[object], **attributes) -> Change:
    """Put a node behind the logits."""

    def apply(model: onnx.ModelProto) -> None:
        maker = next(node for node in model.graph.node if "logits" in node.output)
        maker.output[0] = "earlier"
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
        model.graph.node.append(
            helper.make_node(operator, ["earlier", *constants], ["logits"], name="rw", **attributes)
        )
        del model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape))

    return apply


def bounds(end: int) -> dict[str, np.ndarray]:
    values = {"starts": 0, "ends": end, "axes": 1}
    return {name: np.array([value], np.int64) for name, value in values.items()}


CODES = "first layer that differs is"
LOGITS = "optimizations off: logits of 24 of 24 images differ by up to"
CORRUPTIONS: dict[str, tuple[Change, str]] = {
    "two channels of weights swapped": (altered("body.weight", swapped_channels), CODES),
    "one weight": (altered("stem.weight", lambda w: w + (np.arange(w.size).reshape(w.shape) == 13)), CODES),
    "weights negated": (altered("head.weight", np.negative), LOGITS),
    "scale of weights, 1 %": (altered("stem.weight.scale", lambda s: s * 1.01), CODES),
    "scale of the last weights, 1 %": (altered("head.weight.scale", lambda s: s * 1.01), LOGITS),
    "scale of a grid, 1 %": (quantizer_scale("relu_1", lambda s: s * 1.01), CODES),
    "a bias": (altered("body.bias", lambda b: b + (b.max() - b.min()) / 4), CODES),
    "no ReLU": (no_relu, CODES),
    "other padding": (attribute("Conv", "pads", [0, 0, 2, 2]), CODES),
    "no padding": (attribute("Conv", "pads", [0, 0, 0, 0]), "could not be compared: "),
    "another maximum": (mean_for_maximum, CODES),
    "another window of the mean": (attribute("AveragePool", "strides", [1, 1]), "could not be compared: |failed"),
    "transposed before flatten": (transposed, LOGITS),
    "truncated outputs": (reworked_output("Slice", bounds(4), ["batch", 4]),
                          r"logits are \[\d+, 6\] in the student, \[\d+, 4\] in the file"),
    "one output, which would broadcast": (reworked_output("Slice", bounds(1), ["batch", 1]),
                                          r"logits are \[\d+, 6\] in the student, \[\d+, 1\] in the file"),
    "logits scaled, same classes": (reworked_output("Mul", {"two": np.array(2, np.float32)}, ["batch", 6]), LOGITS),
    "logits shifted, same classes": (reworked_output("Add", {"one": np.array(1, np.float32)}, ["batch", 6]), LOGITS),
    "softmax of logits, same classes": (reworked_output("Softmax", {}, ["batch", 6], axis=1), LOGITS),
    "logits are NaN": (reworked_output("Mul", {"nan": np.array(np.nan, np.float32)}, ["batch", 6]),
                       "24 of 24 images differ, some not finite"),
    "one logit is NaN": (reworked_output("Div", {"ones": np.array([0, 1, 1, 1, 1, 1], np.float32)}, ["batch", 6]),
                         "24 of 24 images differ, some not finite"),
    "an infinite scale": (altered("head.weight.scale", lambda s: np.where(np.arange(s.size) == 0, np.inf, s)),
                          "not finite|failed"),
    "a quantizer left out of the list": (retapped(lambda taps: taps.pop(1)), "the file does not list this quantizer"),
    "all quantizers left out": (retapped(lambda taps: taps.clear()), "could not be compared: .* and . more"),
    "a quantizer of another name": (retapped(lambda taps: taps[1].update(name="x")), "x .the student has no such"),
    "a quantizer listed twice": (retapped(lambda taps: taps.append(taps[1])), "the student has no such quantizer, or"),
    "a tensor that is not there": (retapped(lambda taps: taps[1].update(tensor="x")), "the file has no tensor 'x'"),
    "a scale that the list changes": (retapped(lambda taps: taps[1].update(scale=taps[1]["scale"] * (1 + 1e-6))),
                                      "its scale is .* in the file, .* in the student"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_file_that_is_not_the_student_fails(student, path, tmp_path, name):
    change, words = CORRUPTIONS[name]
    report = compare(student, path, tmp_path / "c.onnx", change)
    assert not report.passed
    with pytest.raises(ParityError, match=words):
        report.raise_if_worse()
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["passed"] is False and written["faults"] == list(report.faults)


def doubled(field: str, **changed: str) -> Change:
    """Repeat an entry, changed: a reader that takes the first and one that takes the last disagree."""

    def apply(model: onnx.ModelProto) -> None:
        entries = model.metadata_props if field == "metadata_props" else getattr(model.graph, field)
        entries.add().CopyFrom(entries[0])
        for key, value in changed.items():
            setattr(entries[-1], key, value)

    return apply


@pytest.mark.parametrize(
    "change",
    [doubled("metadata_props", value="[]"), doubled("initializer"), doubled("output")],
    ids=["metadata", "constant", "output"],
)
def test_what_is_there_twice_is_no_one_file(student, path, tmp_path, change):
    with pytest.raises(ValueError, match=r"c\.onnx: .* occurs twice in the file|[Dd]uplicate"):
        compare(student, path, tmp_path / "c.onnx", change)


def test_the_untouched_file_passes(student, path):
    report = check_parity(student, path, batches(2))
    assert report.passed and report.faults == () and report.to_json()["passed"] is True
    assert report.off.allowed == pytest.approx(
        0.6 * report.output_step, rel=0.1
    )  # half a step and the rounding of float32 sums
    assert report.off.beyond == report.on.beyond == 0


def test_another_student_with_the_same_classes_fails(student, path, tmp_path):
    """Retrained by a hair: every class the same, every logit nearly."""
    other = make_student()
    with torch.no_grad():
        other.head.bias += 1e-3
    export_onnx(other, batches(1)[0], tmp_path / "other.onnx")
    report = check_parity(student, tmp_path / "other.onnx", batches(2))
    assert report.off.differing == 0 and not any(layer.differing for layer in report.layers)
    with pytest.raises(ParityError, match=LOGITS):
        report.raise_if_worse()
    export_onnx(make_student(1), batches(1)[0], tmp_path / "seed.onnx")
    assert "its scale is" in "".join(check_parity(student, tmp_path / "seed.onnx", batches(2)).uncompared)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (quantizer_scale("relu_1", lambda scale: np.nextafter(scale, np.float32(np.inf))), "'other.scale'"),
        (altered("head.weight.scale", lambda scale: np.nextafter(scale, np.float32(np.inf))), "'head.weight.scale'"),
    ],
)
def test_a_change_below_rounding_changes_no_integer_and_is_named(student, path, tmp_path, change, name):
    """One unit in the last place of a scale gives the same codes and classes, and yet is no constant of the student."""
    report = compare(student, path, tmp_path / "c.onnx", change)
    assert not any(layer.differing or layer.differing_on for layer in report.layers)
    assert report.off.max_steps < 0.5
    assert not report.passed and len(report.faults) == 1 and name in report.faults[0]
    assert check_parity(student, tmp_path / "c.onnx", batches(2), constants=False).passed


def test_the_step_is_the_students_and_not_the_files(student, path, tmp_path):
    """A file that claims a huge step does not widen what is allowed."""

    def change(model: onnx.ModelProto) -> None:
        reworked_output("Mul", {"two": np.array(2, np.float32)}, ["batch", 6])(model)
        next(entry for entry in model.metadata_props if entry.key == "output_step").value = "1e9"

    with pytest.raises(ParityError, match=LOGITS):
        compare(student, path, tmp_path / "c.onnx", change).raise_if_worse()


@pytest.mark.parametrize("what", ["opened", "run"])
def test_a_runtime_that_fails_with_optimizations_on_is_a_fault(student, path, monkeypatch, what):
    class Broken:
        def run(self, names, feeds):
            raise RuntimeError("no kernel\n for QLinearConv")

    def opened(model, *, optimize, threads=1):
        if not optimize:
            return open_session(model, optimize=False, threads=threads)
        if what == "opened":
            raise RuntimeError("no kernel\n for QLinearConv")
        return Broken()

    monkeypatch.setattr(export.parity.ways, "open_session", opened)
    report = check_parity(student, path, batches(2))
    assert report.on.fault == "ONNX Runtime failed: no kernel for QLinearConv"
    assert (report.on.top1_agreement, report.on.differing, report.off.differing) == (0.0, 24, 0)
    assert report.to_json()["on"]["max_difference"] is None
    with pytest.raises(ParityError, match="^optimizations on: ONNX Runtime failed: no kernel"):
        report.raise_if_worse()


def test_kernels_that_cannot_run_alone_are_not_equal(student, path, monkeypatch):
    def opened(model, *, optimize, threads=1):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("export.parity.layers.open_session", opened)
    report = check_parity(student, path, batches(2))
    assert report.layers == () and "ONNX Runtime failed: no kernel" in report.uncompared[0]
    with pytest.raises(ParityError, match="could not be compared: x_quant"):
        report.raise_if_worse()


def test_a_kernel_that_rounds_otherwise_is_a_fault(student, path, monkeypatch):
    """The file is right, and what a device computes is not: fed the same codes, one kernel gives others."""
    wrong = {"done": 0}
    tap = next(tap for tap in taps_of(onnx.load(path)) if tap["name"] == "relu_1")
    target, step = tap["tensor"], 1 if tap["type"] == "UINT8" else tap["scale"]

    class Off:
        def __init__(self, session):
            self.session = session

        def run(self, names, feeds):
            found = self.session.run(names, feeds)
            if names == [target]:
                found[0].flat[0] += step
                wrong["done"] += 1
            return found

    def opened(model, *, optimize, threads=1):
        return Off(open_session(model, optimize=optimize, threads=threads))

    monkeypatch.setattr("export.parity.layers.open_session", opened)
    report = check_parity(student, path, batches(2))
    assert not report.uncompared
    assert sum(layer.differing_on for layer in report.layers) == wrong["done"] == 2
    with pytest.raises(ParityError, match=r"^with optimizations on, kernels give wrong codes .*: \S+ \(2 of"):
        report.raise_if_worse()


def test_a_student_whose_logits_are_nan_is_no_proof(student, path):
    """NaN in student and file alike: as integers they would be equal."""
    other = make_student()
    other.head.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    report = check_parity(other, path, batches(2))
    assert report.off.beyond == 24 and report.off.max_difference == np.inf
    with pytest.raises(ParityError, match="some not finite"):
        report.raise_if_worse()


def test_codes_that_are_nan_are_not_equal(student, path):
    other = make_student()
    name = next(tap["name"] for tap in taps_of(onnx.load(path)))
    other.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * float("nan"))
    report = check_parity(other, path, batches(2))
    assert any(f"{name} (a value is not finite)" in line for line in report.uncompared)


def test_empty_batches_compare_nothing(student, path):
    with pytest.raises(ValueError, match="there are no images"):
        check_parity(student, path, [torch.ones(0, 3, 12, 12)])
    mixed = [torch.ones(0, 3, 12, 12), *batches(2)]
    assert check_parity(student, path, mixed).images == 24


def test_what_is_no_student_is_refused(path):
    with pytest.raises(ValueError, match="compare a student that quantizers.prepare made, got Net"):
        check_parity(Net(), path, batches(2))


@pytest.mark.parametrize("value", ["[", "{}", "[1]", '[{"name": 1}]', "[" * 5000, "null"])
def test_a_damaged_list_of_quantizers_is_refused(student, path, tmp_path, value):
    model = onnx.load(path)
    next(entry for entry in model.metadata_props if entry.key == "quantizers").value = value
    onnx.save(model, tmp_path / "c.onnx")
    with pytest.raises(ValueError, match="its list of quantizers is damaged"):
        check_parity(student, tmp_path / "c.onnx", batches(2))


def test_ties_of_the_student_are_told_apart():
    """Two logits that are equal but for rounding may come in either order; others may not."""
    from export.parity.expected import Expected
    from export.parity.tally import Side

    side = Side(Expected((), ("logits",), 1e-3, 1e-6, 64.0), optimized=False)
    ours = np.array([[1, 1 + 1e-6, 0], [1, 1.0003, 0], [0, 1, 2]], np.float32)
    theirs = np.array([[1 + 1e-6, 1, 0], [1.0001, 1, 0], [0, 1, 2]], np.float32)
    side.add([ours], [theirs], None)
    assert (side.differing, side.ties, side.beyond) == (2, 1, 0)


def test_places_of_a_map_and_further_outputs_count_by_image():
    from export.parity.expected import Expected
    from export.parity.tally import Side

    ours = np.random.default_rng(0).standard_normal((4, 3, 5, 5)).astype(np.float32)
    side = Side(Expected((), ("logits",), 1e-3, 1e-6, 64.0), optimized=False)
    theirs = ours.copy()
    theirs[1, :, 0, 0] = np.roll(theirs[1, :, 0, 0], 1)
    side.add([ours, ours], [theirs, ours], None)
    assert (side.differing, side.beyond) == (1, 1)
    side = Side(Expected((), ("logits", "logits_2"), 1e-3, 1e-6, 64.0), optimized=False)
    side.add([ours, ours], [ours, theirs], None)
    assert (side.differing, side.beyond, side.fault) == (0, 1, "")
    side.add([ours, ours], [ours], None)
    assert side.fault == "the student gives 2 outputs, the file 1"
