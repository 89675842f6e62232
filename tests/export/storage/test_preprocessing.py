"""What a file says of the images it takes, and files that normalize uint8 pixels themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import ExportError, Preprocessing, check_parity, export_float, export_int8_baseline, export_onnx, repack
from export.lowering.pixels import NORMALIZED, check_pixels, every_pixel
from export.runtime import open_session
from export.storage.preprocessing import KEYS, read_preprocessing, write_properties
from qkd.data import normalize
from quantizers import QuantSpec, calibrate, prepare, settle

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WHAT = Preprocessing(MEAN, STD, (8, 6), ("cat", "dog", "newt", "öl"), resize="shorter_side")


def pixels(count: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def student(eager: None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    images = torch.from_numpy(WHAT.normalize(pixels().numpy()))
    made = prepare(net, QuantSpec(weight_bits=2, act_bits=2), images)
    calibrate(made, images)
    settle(made)
    return made.eval()


def example(student: nn.Module) -> Tensor:
    return torch.from_numpy(WHAT.normalize(pixels(2).numpy()))


def test_normalizing_is_that_of_training_to_the_bit() -> None:
    every = torch.from_numpy(every_pixel(WHAT))
    assert len(torch.unique(every)) == 256
    assert np.array_equal(WHAT.normalize(every.numpy()), normalize(every, MEAN, STD).numpy())


def test_the_file_says_what_it_takes(student: nn.Module, tmp_path: Path) -> None:
    exported = export_onnx(student, example(student), tmp_path / "s.onnx", preprocessing=WHAT, pack="int8")
    model = onnx.load(exported.path)
    assert read_preprocessing(model) == WHAT
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert set(KEYS) <= set(said)
    assert json.loads(said["needs"]) == exported.needs == "onnxruntime >= 1.14"
    assert json.loads(said["classes"])[3] == "öl"
    assert set(json.loads(said["versions"])) >= {"torch", "onnx"}
    assert check_parity(student, exported.path, [example(student)], preprocessing=WHAT).faults == ()


@pytest.mark.parametrize(("pack", "needs"), [("packed", "onnxruntime >= 1.24"), ("int8", "onnxruntime >= 1.14")])
def test_a_file_says_what_it_needs(student: nn.Module, tmp_path: Path, pack: Any, needs: str) -> None:
    assert export_onnx(student, example(student), tmp_path / "s.onnx", pack=pack).needs == needs


def test_a_repacked_file_says_what_it_needs_then(student: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(student, example(student), tmp_path / "s.onnx", pack="packed", preprocessing=WHAT).path
    for storage, needs in (("int4", "onnxruntime >= 1.23"), ("int8", "onnxruntime >= 1.14")):
        model = onnx.load_from_string(repack(path, storage))
        said = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(said["needs"]) == needs
        assert read_preprocessing(model) == WHAT


@pytest.mark.parametrize("flavor", ["ort", "qcdq"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_preprocessing_inside_is_exact_and_keeps_the_kernels(
    student: nn.Module, tmp_path: Path, flavor: str, layout: Any
) -> None:
    inside = replace(WHAT, place="inside", layout=layout)
    outer = export_onnx(student, example(student), tmp_path / "o.onnx", flavor=flavor, preprocessing=WHAT)
    inner = export_onnx(student, example(student), tmp_path / "i.onnx", flavor=flavor, preprocessing=inside)
    assert inner.fall_backs == outer.fall_backs == ()
    assert [layer.kernel for layer in inner.layers] == [layer.kernel for layer in outer.layers]
    counted = ("QLinearConv", "QGemm", "QLinearGlobalAveragePool", "DequantizeLinear", "QuantizeLinear")
    assert {one: inner.operators.get(one) for one in counted} == {one: outer.operators.get(one) for one in counted}
    report = check_parity(student, inner.path, [pixels(40, 3)], preprocessing=inside)
    assert report.faults == ()
    assert report.off.differing == report.on.differing == 0
    for optimize in (False, True):
        images = pixels(16, 5)
        session = open_session(inner.path, optimize=optimize)
        assert session.get_inputs()[0].type == "tensor(uint8)"
        found = session.run(None, {"images": inside.as_fed(images.numpy())})[0]
        floats = open_session(outer.path, optimize=optimize).run(None, {"images": WHAT.normalize(images.numpy())})[0]
        assert np.array_equal(found, floats)


def test_in_the_optimized_graph_nhwc_pixels_are_not_moved_twice(student: nn.Module, tmp_path: Path) -> None:
    made = {
        layout: export_onnx(
            student, example(student), tmp_path / "i.onnx", preprocessing=replace(WHAT, place="inside", layout=layout)
        ).operators.get("Transpose", 0)
        for layout in ("nchw", "nhwc")
    }  # type: ignore[arg-type]
    assert made["nhwc"] <= made["nchw"]


def test_nhwc_pixels_are_normalized_by_whole_rows(student: nn.Module, tmp_path: Path) -> None:
    inside = replace(WHAT, place="inside", layout="nhwc")
    model = onnx.load(export_onnx(student, example(student), tmp_path / "i.onnx", preprocessing=inside).path)
    shapes = {entry.name: list(entry.dims) for entry in model.graph.initializer}
    assert shapes["images.scale"] == shapes["images.shift"] == [6 * 3], "a last axis of 3 takes thirty times as long"


def test_a_file_that_normalizes_another_way_is_refused(student: nn.Module, tmp_path: Path) -> None:
    inside = replace(WHAT, place="inside")
    path = export_onnx(student, example(student), tmp_path / "i.onnx", preprocessing=inside).path
    other = replace(inside, mean=(0.5, 0.4822, 0.4465))
    faults = check_parity(student, path, [pixels()], preprocessing=other).faults
    assert any("images.shift" in fault for fault in faults)
    model = onnx.load(path)
    with pytest.raises(ExportError, match="not exact.*at the pixel value 0, channel 0"):
        check_pixels(model, other)
    check_pixels(model, inside)
    assert any(NORMALIZED in node.output for node in model.graph.node)


def test_metadata_that_says_another_thing_is_a_fault(student: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(student, example(student), tmp_path / "s.onnx", preprocessing=WHAT).path
    model = onnx.load(path)
    write_properties(model, {"input_mean": "[0.5, 0.5, 0.5]"})
    onnx.save(model, path)
    faults = check_parity(student, path, [example(student)], preprocessing=WHAT).faults
    assert any("input_mean" in fault for fault in faults)
    assert check_parity(student, path, [example(student)]).faults == ()


def test_pixels_and_floats_are_not_mixed_up(student: nn.Module, tmp_path: Path) -> None:
    inside = replace(WHAT, place="inside")
    inner = export_onnx(student, example(student), tmp_path / "i.onnx", preprocessing=inside).path
    outer = export_onnx(student, example(student), tmp_path / "o.onnx", preprocessing=WHAT).path
    with pytest.raises(ValueError, match="it takes uint8 pixels; say how"):
        check_parity(student, inner, [example(student)])
    with pytest.raises(ValueError, match="it takes normalized images"):
        check_parity(student, outer, [pixels()], preprocessing=inside)
    with pytest.raises(ValueError, match="batch 0: the file normalizes by itself"):
        check_parity(student, inner, [example(student)], preprocessing=inside)


def test_what_cannot_be_inside_is_refused_by_name(student: nn.Module, tmp_path: Path) -> None:
    inside = replace(WHAT, place="inside")
    with pytest.raises(ExportError, match="flavor 'qonnx' cannot hold"):
        export_onnx(student, example(student), tmp_path / "q.onnx", flavor="qonnx", preprocessing=inside)
    with pytest.raises(ExportError, match=r"images \[3, 9, 6\].*the net takes \[3, 8, 6\]"):
        export_onnx(student, example(student), tmp_path / "s.onnx", preprocessing=replace(WHAT, image_size=(9, 6)))
    with pytest.raises(ExportError, match="for students"):
        export_float(nn.Conv2d(3, 1, 1), example(student), tmp_path / "f.onnx", preprocessing=inside)
    assert list(tmp_path.iterdir()) == []


def test_float_and_int8_files_say_it_too(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    images = torch.from_numpy(WHAT.normalize(pixels(8).numpy()))
    exported = export_float(net.eval(), images, tmp_path / "f.onnx", preprocessing=WHAT)
    assert exported.needs == "onnxruntime >= 1.14"
    path = export_int8_baseline(exported.path, images.numpy(), tmp_path / "int8.onnx")
    for file in (exported.path, path):
        assert read_preprocessing(onnx.load(file)) == WHAT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"std": (0.1, 0.0, 0.1)}, "std positive"),
        ({"std": (0.1,)}, "one value per channel"),
        ({"mean": (0.1, float("nan"), 0.1)}, "finite"),
        ({"image_size": (0, 4)}, "1 to"),
        ({"place": "beside"}, "outside or inside"),
        ({"layout": "nhwc"}, "needs preprocessing inside"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(WHAT, **changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [("input_mean", "nonsense"), ("input_std", '["a", 1, 2]'), ("input_size", "[8]"), ("input_size", "[true, 8]"),
     ("classes", "[1]"), ("preprocess", '"elsewhere"'), ("input_mean", "[1e999, 0, 0]")],
)  # fmt: skip
def test_metadata_of_strangers_is_checked(key: str, value: str) -> None:
    model = onnx.ModelProto()
    write_properties(model, {**WHAT.properties(), key: value})
    with pytest.raises(ValueError, match="damaged"):
        read_preprocessing(model)


def test_a_file_that_says_nothing_says_nothing() -> None:
    assert read_preprocessing(onnx.ModelProto()) is None
