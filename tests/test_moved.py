"""Old names, for a release: modules that have moved; names, arguments, config keys and records in British spelling."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import export.moved
import qkd.moved
from export import ExportedModel, check_parity, cost_of_file, export_onnx, repack
from qkd.config import ExportConfig
from qkd.config.binding import ConfigError, apply_overrides, bind, load_config
from qkd.config.explaining import explained
from qkd.moved import FREE_FORM, in_new_spelling, json_in_first_spelling, train_in_first_spelling
from qkd.report import ModelRow, RunSummary
from qkd.report.records import read_record
from qkd.run.folder import RunFolder
from qkd.training.origin import other_settings
from quantizers import QuantSpec, Student, calibrate, prepare

PLACES = {**export.moved.OLD_ROOMS, **export.moved.OLD_MODULES, **qkd.moved.OLD_MODULES}
OWNERS = {"ExportedModel": ExportedModel, "ExportConfig": ExportConfig, "ModelRow": ModelRow, "RunSummary": RunSummary}


@pytest.fixture
def forgotten(old: str) -> Iterator[str]:
    """An old name that has not been imported, and is not after the test."""
    parent, _, name = old.rpartition(".")
    parent = PLACES.get(parent, parent)

    def forget() -> None:
        sys.modules.pop(old, None)
        vars(importlib.import_module(parent)).pop(name, None)

    forget()
    yield old
    forget()


@pytest.mark.parametrize("old", sorted(PLACES))
def test_a_module_is_found_under_its_old_name(forgotten: str) -> None:
    module = importlib.import_module(PLACES[forgotten])
    spec = module.__spec__
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert importlib.import_module(forgotten) is module
    assert f"the module {forgotten} is {PLACES[forgotten]} now" in str(told[-1].message)
    assert module.__spec__ is spec and module.__name__ == PLACES[forgotten]


def test_the_tables_hold_what_moved() -> None:
    """Names of 0.1.0 that a table written from memory left out."""
    left_out = {
        "export.elementwise", "export.layer_parity", "qkd.data.arrays", "qkd.data.digits", "qkd.data.folder",
        "qkd.data.vision", "qkd.stages.auxiliary",
    }  # fmt: skip
    assert left_out <= set(PLACES) and len(PLACES) > 90
    assert not set(PLACES) & {"export.metadata", "export.windows", "qkd.data.facts", "qkd.user_paths"}, "never were"


def test_a_name_that_no_module_had_is_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="qkd.bindings"):
        importlib.import_module("qkd.bindings")


def test_names_of_an_old_module_are_imported_as_before() -> None:
    code = "from qkd.binding import load_config; import export.packing as p; print(load_config.__module__, p.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "qkd.config.binding export.storage.packing\n"


@pytest.mark.parametrize(
    ("owner", "old"), [(owner, old) for owner, names in export.moved.OLD_NAMES.items() for old in names]
)
def test_a_public_name_is_found_under_its_british_spelling(owner: str, old: str) -> None:
    new = export.moved.OLD_NAMES[owner][old]
    if owner in OWNERS:
        value = object.__new__(OWNERS[owner])
        object.__setattr__(value, "__dict__", {new: "kept"})
    else:
        value = importlib.import_module(owner)
        assert new in value.__all__ and old not in value.__all__
    with pytest.warns(DeprecationWarning, match=rf"{owner}\.{old} is {owner}\.{new} now"):
        assert getattr(value, old) is getattr(value, new)
    with pytest.raises(AttributeError, match="nothing"):
        value.nothing  # noqa: B018


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), torch.rand(8, 1, 8, 8)
    made = prepare(net, QuantSpec(weight_bits=2, act_bits=2, last_bits=4), images)
    calibrate(made, [images])
    return made.eval()


def test_the_argument_flavour_still_works_and_warns(student: Student, tmp_path: Path) -> None:
    example = torch.zeros(1, 1, 8, 8)
    with pytest.warns(DeprecationWarning, match=r"the argument 'flavour' of export_onnx\(\) is 'flavor' now"):
        made = export_onnx(student, example, tmp_path / "a.onnx", flavour="qcdq")  # type: ignore[call-arg]
    assert made.flavor == "qcdq"
    with pytest.raises(TypeError, match="got both 'flavor' and its old name 'flavour'; drop 'flavour'"):
        export_onnx(student, example, tmp_path / "b.onnx", flavor="ort", flavour="ort")  # type: ignore[call-arg]


def test_files_of_earlier_versions_are_read(student: Student, tmp_path: Path) -> None:
    path, images = tmp_path / "student.onnx", torch.rand(2, 1, 8, 8)
    export_onnx(student, images, path, pack="packed")
    model = onnx.load(path)
    [entry] = [entry for entry in model.metadata_props if entry.key == "flavor"]
    entry.key = "flavour"
    onnx.save(model, path)
    assert check_parity(student, path, [images]).passed
    assert cost_of_file(path).student.macs > 0
    assert repack(path, "int8") != path.read_bytes()


def test_a_config_in_british_spelling_is_bound_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    text = "{loss: similarity_preserving, taps: [[stage3, stage3]], tap: quantised}"
    digits = Path("configs/digits/w2a2.yaml")
    file.write_text((Path(__file__).parents[1] / digits).read_text(encoding="utf-8") + "\nexport: {flavour: qcdq}\n")
    with pytest.warns(DeprecationWarning, match=r"`config\.export\.flavour` is `flavor` now"):
        config = load_config(file)
    assert config.export.flavor == "qcdq"
    with pytest.warns(DeprecationWarning) as told:
        config = load_config("digits/w2a2", ["export.flavour=qonnx", f"student.terms=[{text}]"])
    assert config.export.flavor == "qonnx" and config.student.terms[0].tap == "quantized"
    assert "`quantised` is `quantized` now" not in str(told[0].message)
    assert any("tap=quantised` is `quantized` now" in str(one.message) for one in told)


def test_both_spellings_of_a_key_are_a_fault() -> None:
    data = {"name": "a", "export": {"flavour": "ort", "flavor": "ort"}}
    with pytest.raises(ConfigError, match="config.export.flavour: unknown key; did you mean `flavor`"):
        bind(data)


def test_every_group_of_options_is_known_as_free() -> None:
    keys = {part for key in explained().keys for part in key.path.split(".") if part.endswith("options")}
    assert keys == FREE_FORM


@pytest.mark.parametrize("group", ["method_options", "net_options"])
def test_keys_of_own_methods_losses_and_nets_are_theirs(group: str) -> None:
    data = {"student": {group: {"flavour": 1, "tap": "quantised"}}}
    assert in_new_spelling(data) == data
    assert apply_overrides({}, [f"student.{group}.flavour=1"]) == {"student": {group: {"flavour": 1}}}


def test_an_unfinished_run_of_an_earlier_version_continues(tmp_path: Path) -> None:
    """Config, manifests and checkpoints in the first spelling are those of the same run; nobody is warned."""
    terms = "student.terms=[{loss: similarity_preserving, taps: [[stage3, stage3]]}]"
    config = load_config("digits/w2a2", ["name=old", "export.flavor=qcdq", terms])
    with RunFolder.open(config, tmp_path) as run:
        (run.folder("export") / "a").write_text("a")
        run.complete("export", [run.path / "export" / "a"])
        files = [run.path / "config.yaml", run.manifest_file("export")]
    for file in files:
        text = file.read_text(encoding="utf-8").replace("flavor", "flavour").replace("quantized", "quantised")
        assert "flavour" in text and "quantised" in text
        file.write_text(text, encoding="utf-8")
    with RunFolder.open(config, tmp_path) as again:
        assert again.is_complete("export")
    assert other_settings({"student.terms[0].tap": "quantised"}, {"student.terms[0].tap": "quantized"}) == []
    assert json_in_first_spelling('{"a": [{"tap": "quantized"}]}') == '{"a": [{"tap": "quantised"}]}'


@pytest.mark.parametrize(
    ("now", "first"),
    [
        ({}, {"autocast": "off", "channels_last": False}),
        ({"precision": "float32", "memory_format": "contiguous"}, {"autocast": "off", "channels_last": False}),
        ({"precision": "bf16", "memory_format": "channels_last"}, {"autocast": "bf16", "channels_last": True}),
    ],
)
def test_hashes_of_trainings_have_the_arithmetic_as_first_spelled(now: dict[str, Any], first: dict[str, Any]) -> None:
    assert train_in_first_spelling({"lr": 0.1, **now}) == {"lr": 0.1, **first}


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    file.write_text('{"student": {"flavour": "ort", "path": "student.onnx"}}', encoding="utf-8")
    assert read_record(file) == {"student": {"flavor": "ort", "path": "student.onnx"}}
