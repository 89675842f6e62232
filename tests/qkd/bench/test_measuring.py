"""``qkd bench`` of named models: what is measured, how it is shown, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qkd.bench.measuring
from export import Device, DeviceResult, Preprocessing, Sample, export_float, export_onnx, read_sample, write_sample
from export.storage.preprocessing import prepared_text
from qkd.bench.targets import find_targets, is_float
from qkd.cli import main
from qkd.config.binding import config_text
from qkd.files import sha256_of
from qkd.testing import TinyNet, synthetic_images, tiny_config, write_npz_set
from quantizers import QuantSpec, calibrate, prepare

QUICK = ("--rounds", "3", "--warmup", "0")


@pytest.fixture(scope="module")
def made(unfused: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as the stages up to export leave it, of a net that was not trained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    (folder / "export").mkdir(parents=True)
    images = (synthetic_images(64)[0].float() / 127.5 - 1).contiguous()
    net = TinyNet().eval()
    student = prepare(net, QuantSpec(weight_bits=2, act_bits=4), example_inputs=images[:2])
    calibrate(student, [images])
    student.eval()
    export_onnx(student, images[:2], folder / "export" / "student.onnx")
    export_float(net, images[:2], folder / "export" / "teacher.onnx")
    facts = {name: {"path": f"{name}.onnx"} for name in ("student", "teacher")}
    (folder / "export" / "export.json").write_text(json.dumps(facts))
    with torch.no_grad():
        logits = {"student": student(images).numpy(), "teacher": net(images).numpy()}
    labels = logits["student"].argmax(1).astype(np.int64)
    write_sample(folder / "export" / "sample.npz", Sample(images.numpy(), labels, logits))
    data = write_npz_set(folder.parent / "data")
    (folder / "config.yaml").write_text(config_text(tiny_config(data)))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["bench", *map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_run_folder_with_its_sample_and_the_int8_baseline(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(capsys, made, *QUICK, "--int8-baseline", "--output", tmp_path / "o.json", "--json")
    result = json.loads(out)
    assert result == json.loads((tmp_path / "o.json").read_text()) and result["reference"] == "teacher"
    (device,) = result["devices"]
    models = device["models"]
    assert list(models) == ["student", "teacher", "int8-static"] and device["failure"] is None
    assert models["student"]["accuracy"] == models["student"]["agreement"] == 1.0
    assert device["images"] == 64 and models["teacher"]["to_float"] == 1.0
    assert models["teacher"]["agreement"] == 1.0 and models["int8-static"]["agreement"] > 0.9
    assert models["int8-static"]["max_difference"] > 1e-3, "to the float net, not to itself"
    assert models["student"]["to_float"] == models["student"]["median_ms"] / models["teacher"]["median_ms"]
    assert models["student"]["peak_memory_bytes"] > 1e6
    assert "local: 3 rounds of student; teacher; int8-static" in err


def test_the_table_and_a_device_that_fails(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, made, *QUICK, "--on", "local", "--on", "ssh://127.0.0.1:1", code=1)
    head, *lines, told, terms = out.splitlines()
    assert told == "Times are for a batch of 1 image, with 1 thread: 3 rounds, after 0 for warm-up."
    assert terms.startswith("p10, p90, p99: ")
    assert head.split() == ["device", "model", "median", "p10", "p90", "p99", "vs.", "FP32", "size", "memory",
                            "accuracy", "agreement", "notes"]  # fmt: skip
    assert [line.split()[:2] for line in lines] == [
        ["local", "student"], ["local", "teacher"], ["ssh://127.0.0.1:1", "-"],
    ]  # fmt: skip
    assert " 1.000 " in lines[1] and "100.00 %" in lines[0]
    assert re.search(r"FAILED: (ssh to 127\.0\.0\.1 failed.*Connection refused|cannot run ssh)", lines[2])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise ImportError('gone')", "openvino is missing for"),
        ("class Core:\n    def read_model(self, path):\n        raise RuntimeError('no such operator')",
         "RuntimeError: no such operator"),
    ],
)  # fmt: skip
def test_a_runtime_that_fails_costs_no_row_of_another(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str,
    reason: str,
) -> None:  # fmt: skip
    (tmp_path / "openvino.py").write_text(content + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(made, tmp_path / "run", ignore=shutil.ignore_patterns("bench"))
    both = (tmp_path / "run", *QUICK, "--runtime", "onnxruntime,openvino")
    out, err = run(capsys, *both, code=1)
    _, *lines = out.splitlines()
    assert [line.split()[:2] for line in lines] == [["local", "student"], ["local", "teacher"], ["local", "-"]]
    assert "FAILED: " in lines[2] and reason in lines[2]
    assert "recorded in" in err
    (file,) = (tmp_path / "run" / "bench").glob("local*.json")
    record = json.loads(file.read_text())
    assert list(record["models"]) == ["student", "teacher"] and record["failure"] is None
    (device,) = json.loads(run(capsys, *both, "--json", code=1)[0])["devices"]
    assert reason in device["failure"] and list(device["models"]) == ["student", "teacher"]
    # nothing else was asked for: a failure alone, and nothing is recorded
    file.unlink()
    alone, _ = run(capsys, tmp_path / "run", *QUICK, "--runtime", "openvino", code=2 if "missing" in reason else 1)
    assert len(alone.splitlines()) == 2 and reason in alone
    assert not any((tmp_path / "run" / "bench").glob("*.json"))


def test_a_python_of_the_command_line_stands_above_the_devices_own(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Device] = []

    def measure(devices: Sequence[Device], *_: object, **__: object) -> tuple[DeviceResult, ...]:
        found.extend(devices)
        return tuple(DeviceResult(device, failure="not reached") for device in devices)

    monkeypatch.setattr(qkd.bench.measuring, "measure_devices", measure)
    (tmp_path / "d.yaml").write_text("devices: {pi: {address: ssh://pi, python: /other}}")
    on = [word for name in ("local", "ssh://board", "pi") for word in ("--on", name)]
    run(capsys, made, *on, "--devices", tmp_path / "d.yaml", "--python", "env/bin/python", code=1)
    assert [device.python for device in found] == ["python3", "env/bin/python", "env/bin/python"]


def test_files_get_names_and_expected_logits(made: Path, tmp_path: Path) -> None:
    export = made / "export"
    other = tmp_path / "student.onnx"
    other.write_bytes((export / "student.onnx").read_bytes())
    targets = find_targets([str(export / "student.onnx"), str(other)])
    assert list(targets.paths) == ["student", "student.onnx"] and targets.sample is None and targets.reference is None
    targets = find_targets([str(export / "teacher.onnx"), str(other)], export / "sample.npz")
    assert targets.reference == "teacher" and targets.sample is not None
    assert set(targets.sample.logits) == {"teacher", "student"}
    assert is_float(export / "teacher.onnx") and not is_float(other)


def test_images_prepared_for_another_run_are_refused(made: Path, tmp_path: Path) -> None:
    """The shape fits, and the accuracy is wrong: a sample of one run was used for another with other normalization."""
    size = read_sample(made / "export" / "sample.npz").images.shape[2:]
    ours, theirs = (Preprocessing((mean,), (0.5,), size, ("a", "b"), resize="stretch") for mean in (0.5, 0.25))
    net, example = TinyNet().eval(), torch.zeros(2, 1, *size)
    files = {name: tmp_path / f"{name}.onnx" for name in ("ours", "theirs")}
    for path, preprocessing in zip(files.values(), (ours, theirs), strict=True):
        export_float(net, example, path, preprocessing=preprocessing)
    plain = Sample(np.zeros((4, 1, *size), np.float32), np.zeros(4, np.int64))
    own, bare = tmp_path / "own.npz", tmp_path / "bare.npz"
    write_sample(own, replace(plain, prepared=prepared_text(ours)))
    write_sample(bare, plain)
    for fits in ([files["ours"]], [files["ours"], made / "export" / "student.onnx"]):  # one that says nothing
        assert find_targets(list(map(str, fits)), own).sample is not None
    with pytest.raises(ValueError, match=r"prepared for the sample do not fit theirs, .* mean 0\.5, .* mean 0\.25, "):
        find_targets([str(files["theirs"])], own)
    with pytest.raises(ValueError, match="prepared for ours do not fit theirs, so its accuracy would be wrong"):
        find_targets(list(map(str, files.values())), bare)
    assert find_targets([str(files["theirs"])], bare).sample is not None, "nothing says that it does not fit"


def test_two_runs_keep_their_names_apart(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made, tmp_path / "second")
    targets = find_targets([str(made), str(tmp_path / "second")])
    assert list(targets.paths) == ["tiny/student", "tiny/teacher", "second/student", "second/teacher"]
    assert targets.sample is not None and set(targets.sample.logits) == set(targets.paths)
    assert targets.reference == "tiny/teacher"
    mine = read_sample(made / "export" / "sample.npz")
    write_sample(tmp_path / "second" / "export" / "sample.npz", Sample(mine.images[:9], mine.labels[:9]))
    _, err = run(capsys, made, tmp_path / "second", *QUICK, code=2)
    assert "have different test images" in err and "measure them one by one" in err


def test_runs_in_folders_of_one_name_are_told_apart(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their names end alike, so one of them was lost without a word."""
    for name in ("a/run", "b/run", "a/other"):
        shutil.copytree(made, tmp_path / name)
    folders = [str(tmp_path / name) for name in ("a/run", "b/run", "a/other")]
    out, _ = run(capsys, *folders, *QUICK, "--provider", "cpu", "--json")
    (device,) = json.loads(out)["devices"]
    assert list(device["models"]) == [f"{prefix}/{name}" for prefix in ("a/run", "b/run", "other")
                                      for name in ("student", "teacher")]  # fmt: skip
    assert all(row["agreement"] == 1.0 for row in device["models"].values())
    _, err = run(capsys, folders[0], tmp_path / "b" / ".." / "a" / "run", *QUICK, code=2)
    assert "a/run is named twice; name each run folder once" in err


def test_runs_with_other_labels_are_not_scored_on_one_sample(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path / "coarse")
    mine = read_sample(made / "export" / "sample.npz")
    write_sample(tmp_path / "coarse" / "export" / "sample.npz", replace(mine, labels=mine.labels // 2))
    _, err = run(capsys, made, tmp_path / "coarse", *QUICK, code=2)
    assert "the same test images with different labels" in err and "measure them one by one" in err


def test_expected_logits_belong_to_a_file_not_to_a_name(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of the same name was judged by the logits of the run's own student."""
    export = tmp_path / "run" / "export"
    shutil.copytree(made / "export", export)
    mine, apart = export / "sample.npz", tmp_path / "sample.npz"
    other, renamed = tmp_path / "student.onnx", tmp_path / "renamed.onnx"
    other.write_bytes((export / "teacher.onnx").read_bytes())
    renamed.write_bytes((export / "student.onnx").read_bytes())
    sample = read_sample(mine)
    wrong = replace(sample, logits={name: np.roll(value, 1, axis=1) for name, value in sample.logits.items()})
    write_sample(mine, wrong)  # so that it shows which logits are used
    hashes = {name: sha256_of(export / f"{name}.onnx") for name in ("student", "teacher")}
    write_sample(apart, replace(wrong, files=hashes))

    def used(file: Path, sample: Path) -> bool:
        (device,) = json.loads(run(capsys, file, "--sample", sample, *QUICK, "--provider", "cpu", "--json")[0])[
            "devices"
        ]
        (row,) = device["models"].values()
        return bool(row["agreement"] < 1)

    assert used(export / "student.onnx", mine), "nothing records hashes: only the files beside the sample are its own"
    assert not used(other, mine) and not used(renamed, mine)
    assert used(renamed, apart) and used(other, apart), (
        "the sample records which files they are of, whatever their names"
    )
    (export / "export.json").write_text(json.dumps({
        name: {"path": f"{name}.onnx", "sha256": sha256} for name, sha256 in hashes.items()
    }))  # fmt: skip
    assert used(renamed, mine), "the record beside the sample says so"
    (export / "student.onnx").write_bytes((export / "teacher.onnx").read_bytes())
    assert targets_computed(export / "student.onnx", tmp_path / "none.npz", sample) == ("student",)
    _, err = run(capsys, made / "export" / "student.onnx", "--sample", mine, *QUICK)
    assert "agreement of" not in err
    write_sample(mine, replace(sample, logits={}))
    _, err = run(capsys, made / "export" / "student.onnx", "--sample", mine, *QUICK)
    assert "agreement of student: with the file as computed here without optimizations" in err


def targets_computed(file: Path, place: Path, sample: Sample) -> tuple[str, ...]:
    write_sample(place, sample)
    return find_targets([str(file)], place).computed


def test_images_of_others_are_not_recorded_as_the_runs(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report called them test images."""
    folder, other = tmp_path / "run", tmp_path / "other.npz"
    shutil.copytree(made, folder)
    own = ("--rounds", "5", "--warmup", "1", "--provider", "auto")
    sample = read_sample(made / "export" / "sample.npz")
    write_sample(other, Sample(sample.images[::-1].copy() + 1, np.zeros(len(sample.images), np.int64)))
    run(capsys, folder, *own)
    before = json.loads((folder / "bench" / "local.json").read_text())
    assert before["stage"] and before["models"]["student"]["accuracy"] == 1.0
    (tmp_path / "d.yaml").write_text("devices: {board: {address: local}}\n")
    board = ("--on", "board", "--devices", tmp_path / "d.yaml")
    out, err = run(capsys, folder, *own, "--sample", other, "--on", "local", *board, "--json")
    assert all(row["accuracy"] < 1 for one in json.loads(out)["devices"] for row in one["models"].values()), "is shown"
    assert "accuracy and agreement are not recorded: the images are not those of the run's sample" in err
    assert json.loads((folder / "bench" / "local.json").read_text()) == before, "its scores are kept"
    for name, device in (("local-another-sample", "local (another sample)"), ("board", "board")):
        record = json.loads((folder / "bench" / f"{name}.json").read_text())
        assert record["device"] == device and record["images"] == 0 and not record["stage"]
        rows = record["models"].values()
        assert {row[key] for row in rows for key in ("accuracy", "agreement", "max_difference")} == {None}
    same = tmp_path / "same.npz"
    write_sample(same, replace(sample, logits={}))
    _, err = run(capsys, folder, *own, "--sample", same)
    assert "are not recorded" not in err, "the same images"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["STUDENT", "--python", "env/bin/python"], "--python is for a device"),
        (["digits/smoke", "--python", "env/bin/python"], "name the Python in a devices file (bench.devices=FILE)"),
        (["none.onnx"], "none.onnx: no such file; name ONNX files, run folders, or one config"),
        (["STUDENT", "--on", "pi9"], "device 'pi9' is neither an address"),
        (["STUDENT", "--on", "ssh://-oProxyCommand=x"], "is no host"),
        (["STUDENT", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["STUDENT", "--timeout", "0"], "timeout_s must be positive, got 0.0"),
        (["STUDENT", "--timeout", "-1"], "timeout_s must be positive, got -1.0"),
        (["STUDENT", "--provider", "Foo"], "provider 'Foo' is not in this onnxruntime"),
        (["TEACHER", "--int8-baseline"], "needs images to calibrate on"),
        (["STUDENT", "--int8-baseline", "--sample", "SAMPLE"], "is made of a float model"),
        (["STUDENT", "--sample", "none.npz"], "no sample file at none.npz"),
        (["STUDENT", "STUDENT"], None),
        (["STUDENT", "digits/smoke"], "digits/smoke: no such file"),
        (["digits/smoke", "--threads", "3", "--on", "local"], "give bench.on=..., bench.threads=..."),
        (["digits/smoke", "--sample", "x.npz"], "options are for ONNX files and run folders"),
        (["JUNK"], "junk.onnx: it is not an ONNX file"),
    ],
)
def test_what_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str | None
) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"\xff" * 50)
    known: dict[str, Any] = {
        "STUDENT": made / "export" / "student.onnx", "SAMPLE": made / "export" / "sample.npz",
        "TEACHER": made / "export" / "teacher.onnx", "JUNK": tmp_path / "junk.onnx",
    }  # fmt: skip
    if message is None:
        out, _ = run(capsys, *(known[word] for word in words), *QUICK)
        assert [line.split()[1] for line in out.splitlines()[1:-2]] == ["student", "student.onnx"]
        return
    is_config = words[0].startswith("digits")
    quick = () if is_config or "--rounds" in words else QUICK
    out, err = run(capsys, *(known.get(word, word) for word in words), *quick, code=2)
    assert message in out + err


def test_a_run_that_has_not_been_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    _, err = run(capsys, tmp_path, code=2)
    assert "no run whose export stage has run (export/export.json is missing)" in err


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1,,2", ""])
def test_cpus_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "x.onnx", f"--affinity={text}"])
    assert caught.value.code == 2 and "must be numbers of CPUs" in capsys.readouterr().err


def test_models_may_stand_behind_options(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = made / "export" / "student.onnx", made / "export" / "teacher.onnx"
    out, _ = run(capsys, student, "--affinity", "0-0,0", *QUICK, teacher, "--json")
    (device,) = json.loads(out)["devices"]
    assert list(device["models"]) == ["student", "teacher"] and device["affinity"] == [0, 0]


def test_options_stand_above_a_devices_own(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.yaml").write_text("devices: {slow: {address: local, threads: 2}}\n")
    words = (made / "export" / "student.onnx", *QUICK, "--on", "slow", "--devices", tmp_path / "d.yaml", "--json")
    (device,) = json.loads(run(capsys, *words)[0])["devices"]
    assert device["device"] == "slow" and device["threads"] == 2
    (device,) = json.loads(run(capsys, *words, "--threads", 1)[0])["devices"]
    assert device["threads"] == 1
