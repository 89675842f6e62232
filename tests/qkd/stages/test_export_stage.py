"""The export stage: flavors beside student.onnx, sizes and cost, and layers that stay in float."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml

import qkd.checking.config_files
import qkd.stages.export as stage
from export import ExportError, ParityError
from export.runtime import open_session
from export.targets import sessions
from qkd.bench.targets import run_files
from qkd.cli import main
from qkd.files import read_json
from qkd.pipeline import run_stages
from qkd.progress import Silent
from qkd.report import summarize
from qkd.report.text import flavor_sentence
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.stages.export import require_integer_layers
from qkd.stages.fitted import keep_fitted
from qkd.stages.kept import keep_proven
from qkd.testing import tiny_config, write_npz_set

pytestmark = pytest.mark.usefixtures("unfused")

NEEDS_QONNX = "qonnx's executor is in the extra [qonnx], for Python 3.11 and newer"


class Listening(Silent):
    """Keeps every message."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of runs that holds a trained one, not exported."""
    folder = tmp_path_factory.mktemp("runs")
    with RunFolder.open(tiny_config(data), folder) as run:
        for name in ("teacher", "search", "distill"):
            STAGES[name](run, Silent())
    return folder


def export(data: Path, trained: Path, listener: Any = None, **settings: Any) -> RunFolder:
    config = tiny_config(data, {f"export.{key}": value for key, value in settings.items()})
    run = RunFolder(config, trained / "tiny")
    STAGES["export"](run, listener or Silent())
    assert run.is_complete("export")
    return run


def test_sizes_and_cost_are_written(data: Path, trained: Path) -> None:
    run = export(data, trained)
    facts, cost = (read_json(run.path / "export" / f"{name}.json") for name in ("export", "cost"))
    assert sorted(facts) == ["student", "teacher"]
    student, teacher = facts["student"], facts["teacher"]
    assert student["size_bytes"] == cost["file_bytes"] == (run.path / "export" / "student.onnx").stat().st_size
    assert student["packed_weight_bytes"] == sum(layer["weight_bytes"] for layer in student["layers"])
    assert student["packed_weight_bytes"] == cost["student"]["weight_bytes"]  # 8 and 4 bits: stored at their bits
    assert student["theoretical_bytes"] == cost["student"]["parameter_bytes"] < student["size_bytes"]
    assert teacher["packed_weight_bytes"] == cost["float_twin"]["weight_bytes"]
    assert teacher["packed_weight_bytes"] < teacher["theoretical_bytes"] < teacher["size_bytes"]
    summary = summarize(run.path)
    assert summary.models[1].theoretical_bytes == student["theoretical_bytes"] and summary.cost == cost
    assert summary.flavors == {}


@pytest.mark.parametrize("flavor", ["qcdq", "qonnx"])
def test_another_flavor_lies_beside_and_is_compared(data: Path, trained: Path, flavor: str) -> None:
    if flavor == "qonnx":
        pytest.importorskip("qonnx", reason=NEEDS_QONNX)
    listener = Listening()
    run = export(data, trained, listener, flavor=flavor, pack="packed", strict=True)
    folder = run.path / "export"
    facts = read_json(folder / "export.json")
    assert facts[f"student.{flavor}"]["flavor"] == flavor and facts["student"]["flavor"] == "ort"
    domains = {entry.domain for entry in onnx.load(folder / f"student.{flavor}.onnx").opset_import}
    assert ("qonnx.custom_op.general" in domains) == (flavor == "qonnx")
    parity = read_json(folder / f"parity.{flavor}.json")
    assert parity["passed"] and parity["images"] == 32 and parity["off"]["differing"] == 0 and parity["layers"]
    assert all(layer["differing"] == 0 for layer in parity["layers"])
    assert parity["runtime_version"].startswith("qonnx ") == (flavor == "qonnx")
    assert any(f"parity of student.{flavor}.onnx: the same class" in line for line in listener.said)
    # what the bench stage runs: never a file that ONNX Runtime cannot load, or is not for it
    assert sorted(run_files(run.path)) == ["student", "teacher"]
    assert summarize(run.path).flavors[f"student.{flavor}"]["parity"] == parity
    STAGES["bench"](run, Silent())
    STAGES["report"](run, Silent())
    assert f"student.{flavor}.onnx" in (run.path / "report.md").read_text()
    student = folder / "student.onnx"  # what was changed is not measured under the run's name
    student.write_bytes(student.read_bytes() + b"\x00")
    with pytest.raises(ValueError, match=r"student\.onnx has changed since it was exported; run `qkd export"):
        run_files(run.path)


def test_files_for_other_runtimes_stay_while_they_are_of_the_same_student(
    data: Path, tmp_path: Path, trained: Path
) -> None:
    shutil.copytree(trained / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("export", "export.json"))
    folder = tmp_path / "tiny" / "export"
    export(data, tmp_path, target="openvino")
    first = {name: (folder / name).read_bytes() for name in ("student.onnx", "teacher.onnx", "student.openvino.onnx")}
    for content in first.values():  # nothing of where it was made
        assert str(tmp_path).encode() not in content and str(Path.cwd()).encode() not in content
    keep_fitted(export(data, tmp_path, target="onnxruntime-web"), "onnxruntime==1.17", Silent())
    (folder / "student.slim.onnx").write_bytes(b"a person's own")
    listener = Listening()
    export(data, tmp_path, listener, target="iree")
    kept = "student.onnxruntime-1.17.onnx, student.openvino.onnx"
    assert f"kept from an earlier export, of the same student: {kept}" in listener.said
    assert any("student.slim.onnx is not in any record of this run's exports" in line for line in listener.said)
    assert "student.onnx was exported for onnxruntime-web, and is now for ONNX Runtime (export.target)" in listener.said
    assert {name: (folder / name).read_bytes() for name in first} == first  # also student.onnx: the same bytes
    for target in ("iree", None):  # neither changes what student.onnx is for, nor does a first target
        listener = Listening()
        export(data, tmp_path, listener, target=target)
        assert not any("student.onnx was exported for" in line for line in listener.said)
    facts = read_json(folder / "export.json")
    others = {"student.openvino", "student.onnxruntime-1.17", "student.iree"}
    assert facts.keys() == {"student", "teacher", *others} and sorted(run_files(folder.parent)) == [
        "student", "teacher",
    ]  # fmt: skip
    assert summarize(folder.parent).flavors.keys() == others
    # one that was changed is not proven
    (folder / "student.iree.onnx").write_bytes(b"changed")
    kept_now = keep_proven(RunFolder(tiny_config(data), folder.parent), ["student"], listener)
    assert kept_now.facts.keys() == others - {"student.iree"} and not (folder / "parity.iree.json").exists()
    assert "student.iree.onnx has been deleted: it was not proven to be this run's current student" in listener.said
    # of a retrained student there is no file yet
    write_other_weights(folder.parent / "student" / "weights.safetensors")
    export(data, tmp_path, listener)
    assert any(line.startswith("student.openvino.onnx has been deleted") for line in listener.said)
    assert {path.name for path in folder.glob("student*.onnx")} == {"student.onnx", "student.slim.onnx"}
    assert read_json(folder / "export.json").keys() == {"student", "teacher"}


class Elsewhere:
    """A runtime that computes with ONNX Runtime."""

    version = "openvino 9.9"

    def __init__(self, content: bytes, threads: int) -> None:
        self.session = open_session(content, optimize=False, threads=threads)

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        return list(self.session.run(list(names), dict(feeds)))


def test_a_file_is_run_by_its_runtime_as_soon_as_that_is_installed(
    data: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, only ONNX Runtime compares the file; that says nothing about what the runtime computes."""
    shutil.copytree(trained / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("export", "export.json"))
    run = RunFolder(tiny_config(data, {"export.target": "openvino"}), tmp_path / "tiny")
    parity = run.path / "export" / "parity.openvino.json"

    def outcome(*, is_there: bool) -> list[str]:
        for module in (sessions, stage):
            monkeypatch.setattr(module, "unusable", lambda name: "" if is_there else f"{name} is not installed here")
        listener = Listening()
        run_stages(run, ("export",), listener)
        return listener.said

    missing = "student.openvino.onnx: openvino is not installed here, so only ONNX Runtime ran the file"
    assert missing in outcome(is_there=False) and read_json(parity)["runtime"] is None
    (sentence,) = (flavor_sentence(name, facts) for name, facts in summarize(run.path).flavors.items())
    assert sentence.endswith("Not run in openvino.")
    assert missing in outcome(is_there=False), "said again, although the stage is complete"
    monkeypatch.setitem(sessions.SESSIONS, "openvino", Elsewhere)
    before = (run.path / "export" / "student.openvino.onnx").read_bytes()
    assert any("openvino 9.9: logits of" in line for line in outcome(is_there=True))
    assert read_json(parity)["runtime"]["runtime"] == "openvino 9.9"
    assert (run.path / "export" / "student.openvino.onnx").read_bytes() == before
    (sentence,) = (flavor_sentence(name, facts) for name, facts in summarize(run.path).flavors.items())
    assert "openvino 9.9: passed there, too" in sentence
    assert outcome(is_there=True) == []

    def wrong(self: Elsewhere, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        return [values + 1 for values in self.session.run(list(names), dict(feeds))]

    parity.write_text(json.dumps({**read_json(parity), "runtime": None}))
    run.extend("export", [parity])
    monkeypatch.setattr(Elsewhere, "run", wrong)
    with pytest.raises(
        ParityError, match=r"student\.openvino\.onnx is not proven to be the student, do not use it: open"
    ):
        outcome(is_there=True)
    assert run.why_incomplete("export"), "a file that failed is not complete"


def write_other_weights(path: Path) -> None:
    """Change one weight of a stored student, as another training would."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    values = load_file(path)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    name = next(name for name, value in values.items() if value.ndim == 4)
    values[name] = -values[name]
    save_file(values, path, facts)


def test_a_flavor_that_cannot_be_proven_is_found_before_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qkd.checking.config_files, "find_spec", lambda name: None)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tiny_config(data, {"export.flavor": "qonnx"}).model_dump(mode="json")))
    assert main(["run", str(file), "--runs-dir", str(tmp_path / "runs")]) == 2
    found = capsys.readouterr().err
    assert "export.flavor: `qonnx` is proven with qonnx's executor, which is missing: pip install" in found
    assert not (tmp_path / "runs").exists()
    assert main(["validate", str(file), "export.flavor=qcdq"]) == 0


@pytest.fixture(scope="module")
def squeezing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the config of a net that ends with convolution and ReLU (its mean is over one pixel): they stay float."""
    folder = tmp_path_factory.mktemp("squeezing")
    changes = {"name": "squeezed", "teacher.net": "torchvision/squeezenet1_1"}
    changes |= {"teacher.train": {"epochs": 1, "lr": 1e-3}, "student.train": {"epochs": 1, "lr": 1e-3}}
    config = tiny_config(write_npz_set(folder / "data", train=32, test=16, image_size=21), changes)
    (folder / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


SENTENCE = "classifier.1 (Conv) runs as FusedConv in float: its real-valued output is read by classifier.2"


def test_a_fall_back_is_a_warning_or_with_strict_an_error(squeezing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [str(squeezing / "c.yaml"), "--runs-dir", str(squeezing / "runs")]
    assert main(["run", *common, "--json"]) == 0
    captured = capsys.readouterr()
    assert f"warning: {SENTENCE}" in captured.err
    facts = json.loads((squeezing / "runs" / "squeezed" / "export" / "export.json").read_text())
    assert [line.startswith(SENTENCE) for line in facts["student"]["fall_backs"]] == [True]
    # an export that is complete is judged, too, and stays
    assert main(["export", *common, "--strict"]) == 2
    captured = capsys.readouterr()
    assert "already complete" in captured.err and f"student.onnx: {SENTENCE}" in captured.err and captured.out == ""
    assert main(["export", *common]) == 0
    # with strict in the config, the stage itself refuses, and writes nothing
    run = RunFolder(tiny_config(squeezing / "data", {"export.strict": True}), squeezing / "runs" / "squeezed")
    (run.path / "export" / "student.onnx").unlink()
    with pytest.raises(ExportError, match=r"layers stay in float:\n  classifier\.1"):
        STAGES["export"](run, Silent())
    assert not (run.path / "export" / "student.onnx").exists() and not run.is_complete("export")
    with pytest.raises(ExportError, match=r"student\.onnx: classifier\.1"):
        require_integer_layers(run)


def test_strict_lets_integer_layers_pass(data: Path, trained: Path) -> None:
    require_integer_layers(export(data, trained, strict=True))


def test_dry_run_tries_every_flavor(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tiny_config(data).model_dump(mode="json")))
    flavors = ["qcdq"]
    try:
        import qonnx  # noqa: F401

        flavors.append("qonnx")
    except ImportError:
        pass
    for flavor in flavors:
        assert main(["run", str(file), f"export.flavor={flavor}", "--dry-run", "--json"]) == 0
        checks = json.loads(capsys.readouterr().out)["checks"]
        assert "3 files load and run" in checks[-1]["outcome"]
