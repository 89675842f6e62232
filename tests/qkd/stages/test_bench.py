"""The bench stage: one file a device, failures included, and the baseline where it is asked for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import Device, DeviceResult, read_sample
from qkd.bench.device_file import entry_of
from qkd.bench.record import as_recorded, file_name, file_names, write_records
from qkd.cli import main
from qkd.config import BenchConfig
from qkd.config.binding import plain_text, read_config
from qkd.failures import ConfigError
from qkd.files import write_json
from qkd.pipeline.running import run_stages
from qkd.progress import Progress, Silent
from qkd.report import summarize
from qkd.report.findings.measurements import SETTINGS
from qkd.roles.sample import calibration_images
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.stages import bench as stage
from qkd.stages.bench import BenchError
from qkd.testing import run_tiny, tiny_config

NOWHERE = "ssh://127.0.0.1:1"
OWN = ["--rounds", "5", "--warmup", "1"]  # as the run's config says
REFUSED = "Connection refused|cannot run ssh"  # the second where no ssh is installed


@pytest.fixture(scope="module")
def exported(unfused: None, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run after its export stage."""
    config = tiny_config(data, {"teacher.train.epochs": 1, "student.train.epochs": 2})
    return run_tiny(config, tmp_path_factory.mktemp("runs"), "teacher", "search", "distill", "export")


def bench(exported: RunFolder, data: Path, progress: Progress | None = None, **changes: Any) -> Path:
    """Run the stage with other settings on the same files; return the folder of its results."""
    for path in (exported.path / "bench").glob("*"):
        path.unlink()
    config = tiny_config(data, {f"bench.{key}": value for key, value in changes.items()})
    run = RunFolder(config, exported.path)
    STAGES["bench"](run, progress or Silent())
    assert run.is_complete("bench")
    return exported.path / "bench"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_the_export_stage_writes_a_sample_with_what_pytorch_computes(exported: RunFolder, data: Path) -> None:
    sample = read_sample(exported.path / "export" / "sample.npz")
    assert sample.images.shape == (32, 1, 8, 8) and set(sample.logits) == {"student", "teacher"}
    with np.load(data / "test.npz") as test:
        np.testing.assert_array_equal(sample.labels, test["labels"])
    assert sample.logits["student"].shape == (32, 4) and len(np.unique(sample.logits["student"], axis=0)) > 16
    assert "export/sample.npz" in read(exported.path / "manifests" / "export.json")["files"]


def test_calibration_images_are_training_images(data: Path) -> None:
    images = calibration_images(tiny_config(data), 20)
    assert images.shape == (20, 1, 8, 8) and images.dtype == np.float32
    np.testing.assert_array_equal(images, calibration_images(tiny_config(data), 20))
    assert len(calibration_images(tiny_config(data))) == 48  # all that are left after validation


def test_local_results_and_the_baseline(exported: RunFolder, data: Path) -> None:
    folder = bench(exported, data, int8_baseline=True, affinity=(0,))
    assert sorted(path.name for path in folder.iterdir()) == ["int8-static.onnx", "local.json"]
    result = read(folder / "local.json")
    names = [name for name in result["models"] if name != "student, low-bit provider"]  # some kernels take four bits
    assert names == ["student", "teacher", "int8-static"] and result["reference"] == "teacher"
    assert result["rounds"] == 5 and result["affinity"] == [0] and result["images"] == 32
    student = result["models"]["student"]
    assert student["agreement"] == 1.0 and student["path"] == "student.onnx" and student["peak_memory_bytes"] > 1e6
    assert result["models"]["teacher"]["agreement"] == 1.0


def test_a_device_that_fails_is_written_down_and_the_others_go_on(
    exported: RunFolder, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bench(exported, data, Progress(), on=("local", NOWHERE))
    assert sorted(path.name for path in folder.iterdir()) == ["local.json", "ssh-127.0.0.1-1.json"]
    failed = read(folder / "ssh-127.0.0.1-1.json")
    assert re.search(REFUSED, failed["failure"]) and failed["models"] == {} and failed["device"] == NOWHERE
    assert "warning: ssh://127.0.0.1:1 failed" in capsys.readouterr().err


def test_no_device_at_all_fails_the_stage(exported: RunFolder, data: Path) -> None:
    with pytest.raises(BenchError, match=rf"all devices failed to measure: ssh://127\.0\.0\.1:1: .*({REFUSED})"):
        bench(exported, data, on=(NOWHERE,))
    assert (exported.path / "bench" / "ssh-127.0.0.1-1.json").is_file()
    with pytest.raises(ConfigError, match="device 'pi9' is neither an address"):
        bench(exported, data, on=("pi9",))


def test_names_of_files() -> None:
    assert file_name("ssh://pi@board:22") == "ssh-pi-board-22" and file_name("local") == "local"
    names = file_names(["a/b", "a-b", "c"])
    assert names["c"] == "c" and names["a/b"] != names["a-b"]
    assert all(name.startswith("a-b-") for name in (names["a/b"], names["a-b"]))
    assert file_names(["///"])["///"] and file_names(["c"]) == {"c": "c"}
    assert file_name("adb://R58M") == "adb-R58M" and file_name("../../x") == "x"


def test_a_device_added_by_the_command_is_in_the_report_and_nothing_is_trained(
    exported: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(exported, data)
    run = exported.path
    STAGES["report"](exported, Silent())
    exported.close()
    trained = {path: path.stat().st_mtime_ns for path in run.glob("*/weights.safetensors")}
    own = read(run / "bench" / "local.json")
    (tmp_path / "d.yaml").write_text("devices: {board: {address: local}}\n")
    words = ["--on", "board", "--devices", str(tmp_path / "d.yaml"), "--rounds", "3", "--warmup", "0", "--json"]
    assert main(["bench", str(run), *words, "--on", NOWHERE]) == 1  # this one fails, and is not recorded
    captured = capsys.readouterr()
    assert f"recorded in {run / 'bench' / 'board.json'}" in captured.err
    assert sorted(path.name for path in (run / "bench").iterdir()) == ["board.json", "local.json"]
    assert read(run / "bench" / "board.json") == json.loads(captured.out)["devices"][0]
    assert sorted(read(run / "bench" / "board.json")) == sorted(own)  # one shape
    assert main(["report", str(run)]) == 0
    text = capsys.readouterr().err
    assert "== report: new measurements" in text and "== teacher" not in text
    assert "board" in (run / "report.html").read_text() and "board" in (run / "report.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in run.glob("*/weights.safetensors")} == trained
    assert main(["run", str(run)]) == 0
    assert capsys.readouterr().err.count("already complete") == 6


def test_measuring_again_after_another_export_makes_the_report_possible(
    exported: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(exported.path, run)
    quick = ["--rounds", "3", "--warmup", "0"]
    (tmp_path / "d.yaml").write_text("devices: {board: {address: local}}\n")
    board = ["bench", str(run), "--on", "board", "--devices", str(tmp_path / "d.yaml"), *quick]
    assert main(["bench", str(run), *OWN]) == main(board) == main(["report", str(run)]) == 0
    assert state_of(run, capsys) == "complete"
    # the files that were measured are the same bytes: nothing is to be measured again, but the report is older
    assert main(["export", str(run), "export.target=openvino"]) == 0
    assert "(older than the run: export/export.json has changed; `qkd run" in capsys.readouterr().out
    assert state_of(run, capsys) == "report outdated (export/export.json has changed)"
    assert main(board) == main(["report", str(run)]) == 0
    assert state_of(run, capsys) == "complete"
    # student.onnx is another file: old latencies are not shown beside its size
    assert main(["export", str(run), "export.target=onnxruntime-web"]) == 0
    printed = capsys.readouterr().out
    assert "latencies of local, board belong to an earlier export's files and are left out; `qkd bench" in printed
    assert summarize(run).devices == () and summarize(run).student.median_ms is None
    assert main(board) == 0
    assert "local had measured other files than those of this export; its record is deleted" in capsys.readouterr().err
    assert main(["report", str(run)]) == 2  # the run's own device is this machine
    assert f"run `qkd run {run} --until bench`" in capsys.readouterr().err
    assert main(["bench", str(run), *OWN]) == main(["report", str(run)]) == 0
    assert state_of(run, capsys) == "complete" and len(summarize(run).devices) == 2


def state_of(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `qkd ls runs` says of a run."""
    capsys.readouterr()
    assert main(["ls", "runs", str(run.parent), "--json"]) == 0
    return str(json.loads(capsys.readouterr().out)[0]["state"])


def test_a_run_in_use_is_measured_but_not_recorded(
    exported: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; from pathlib import Path; from qkd.run.folder import RunFolder\n" \
           "run = RunFolder.reopen(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"  # fmt: skip
    (tmp_path / "d.yaml").write_text("devices: {other: {address: local}}\n")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(exported.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None and user.stdout.readline()
        words = ["--on", "other", "--devices", str(tmp_path / "d.yaml"), "--rounds", "3", "--warmup", "0"]
        assert main(["bench", str(exported.path), *words]) == 0
        user.communicate()
    assert "measured, but not recorded in" in capsys.readouterr().err
    assert not (exported.path / "bench" / "other.json").exists()


def test_records_of_files_that_are_no_longer_there_are_dropped(
    exported: RunFolder, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bench(exported, data)
    record = read(folder / "local.json")
    for name in ("same", "stale"):
        other = json.loads(json.dumps(record))
        other["device"] = name
        if name == "stale":
            other["models"]["student"]["sha256"] = "0" * 64
        (folder / f"{name}.json").write_text(json.dumps(other))
    STAGES["bench"](RunFolder(tiny_config(data), exported.path), Progress())
    assert sorted(path.name for path in folder.iterdir()) == ["local.json", "same.json"]
    assert "stale had measured other files than those of this export" in capsys.readouterr().err


def test_another_device_of_the_same_file_name_keeps_its_record(tmp_path: Path) -> None:
    for title in ("a/b", "a-b", "a/b"):
        write_records(tmp_path, [{"device": title, "models": {}}])
    assert len(list(tmp_path.iterdir())) == 2
    assert {read(path)["device"] for path in tmp_path.iterdir()} == {"a/b", "a-b"}


def test_other_settings_neither_complete_nor_replace_the_stage(
    exported: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One round of four images completed the run's own measurement."""
    run = tmp_path / "tiny"
    shutil.copytree(exported.path, run)
    shutil.rmtree(run / "bench", ignore_errors=True)
    (run / "manifests" / "bench.json").unlink(missing_ok=True)
    other = ["bench", str(run), "--threads", "2", "--rounds", "1", "--batch-size", "4", "--affinity", "0"]
    assert main(other) == 0
    title = "local (2 threads, 1 round, warm-up 20, CPUs 0, batch 4)"
    assert (
        f"{title}: measured differently from what the bench section of the run's config says" in capsys.readouterr().err
    )
    with RunFolder.reopen(run) as folder:
        assert folder.why_incomplete("bench") == "not run"
    assert summarize(run).student.median_ms is None, "it does not lead"
    assert [one["device"] for one in summarize(run).devices] == [title]
    assert main(["bench", str(run), *OWN]) == 0
    with RunFolder.reopen(run) as folder:
        assert folder.is_complete("bench")
    own = read(run / "bench" / "local.json")
    assert own["stage"] and own["settings"]["rounds"] == 5
    assert main(other) == 0
    assert read(run / "bench" / "local.json") == own
    with RunFolder.reopen(run) as folder:
        assert folder.is_complete("bench")
    summary = summarize(run)
    assert [one["device"] for one in summary.devices] == ["local", title]
    assert summary.student.median_ms == own["models"]["student"]["median_ms"]


def test_a_record_that_an_older_version_replaced_is_measured_again(
    exported: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command put batch 64 in the place of the run's own record, and nothing would measure that again."""
    run = tmp_path / "tiny"
    shutil.copytree(exported.path, run)
    config = tiny_config(data)
    write_config(run, config)
    with RunFolder(config, run) as folder:
        STAGES["bench"](folder, Silent())
        older = {**read(run / "bench" / "local.json"), "batch_size": 64}
        for key in ("settings", "entry", "stage"):
            older.pop(key)
        write_json(run / "bench" / "local.json", older)
        folder.extend("bench", [run / "bench" / "local.json"])
        assert summarize(run).student.median_ms is None
        run_stages(folder, ["bench"], Progress())
        assert "bench/local.json was measured with other settings than the config's" in capsys.readouterr().err
        assert summarize(run).student.median_ms is not None
        run_stages(folder, ["bench"], Progress())
        assert "already complete" in capsys.readouterr().err


def test_an_option_that_repeats_a_devices_entry_is_no_other_setting() -> None:
    own = BenchConfig(on=("quad",), rounds=5)
    device = Device("ssh://pi@board", name="quad", threads=2)
    for threads, title in ((2, "quad"), (3, "quad (3 threads)")):
        asked = {**{key: own.model_dump(mode="json")[key] for key in SETTINGS}, "threads": threads}
        entry = {**entry_of(device), "threads": None}  # the option stands above it
        record = {"device": "quad", "settings": asked, "entry": entry, "models": {}}
        assert as_recorded(record, own, [device], is_own_sample=True)["device"] == title


def test_a_changed_entry_of_the_devices_file_makes_the_stage_incomplete(
    exported: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("devices: {board: {address: local}, unused: {address: local}}\n")
    folder = bench(exported, data, on=("board",), devices=file)
    run = RunFolder(tiny_config(data, {"bench.on": ("board",), "bench.devices": file}), exported.path)

    def again() -> tuple[int, str]:
        capsys.readouterr()
        run_stages(run, ["bench"], Progress())
        return read(folder / "board.json")["threads"], capsys.readouterr().err

    assert "already complete" in again()[1]
    file.write_text("devices: {board: {address: local}, unused: {address: ssh://pi@board}}\n")
    assert "already complete" in again()[1], "another device's entry"
    file.write_text("devices: {board: {address: local, threads: 2}}\n")
    threads, err = again()
    assert threads == 2 and "bench: threads of device board was None, is 2" in err
    assert "5 rounds of student, teacher interleaved, 2 threads\n" in err
    file.unlink()
    assert "already complete" in again()[1], "it cannot be measured again here"
    file.write_text("devices: {board: {address: local, threads: 1}}\n")
    record = read(folder / "board.json")
    for key in ("entry", "settings", "stage"):  # as older versions wrote it
        del record[key]
    (folder / "board.json").write_text(json.dumps(record))
    run.extend("bench", [folder / "board.json"])
    assert "already complete" in again()[1]


def test_threads_of_each_device_are_said(exported: RunFolder, data: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("devices: {board: {address: local, threads: 2}}\n")
    bench(exported, data, Progress(), on=("local", "board"), devices=file)
    assert "interleaved, 1 thread on local, 2 threads on board" in capsys.readouterr().err


def test_a_device_that_fails_keeps_its_times_and_is_named_until_it_works(
    exported: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("devices: {board: {address: local}}\n")
    changes: dict[str, Any] = {"bench.on": ("local", "board"), "bench.devices": file}
    run = RunFolder(tiny_config(data, changes), exported.path)
    write_config(run.path, run.config)
    folder = bench(exported, data, on=("local", "board"), devices=file)
    good = read(folder / "board.json")
    real = stage.measure_devices

    def failing(devices: Any, *arguments: Any, **more: Any) -> Any:
        found = real(devices, *arguments, **more)
        return tuple(one if one.device.title == "local" else DeviceResult(one.device, failure="gone") for one in found)

    monkeypatch.setattr(stage, "measure_devices", failing)
    STAGES["bench"](run, Silent())
    record = read(folder / "board.json")
    assert record["models"] == good["models"]
    assert record["failure"] == "gone; the times of board are from an earlier measurement"
    capsys.readouterr()
    for _ in range(2):
        run_stages(run, ["bench"], Progress())
        err = capsys.readouterr().err
        assert (
            "already complete" in err
            and "warning: board failed: gone" in err
            and "to try again; it holds earlier times)" in err
        )
    # measured with other settings: its times are not those of the config anymore
    STAGES["bench"](RunFolder(tiny_config(data, {**changes, "bench.rounds": 6}), exported.path), Silent())
    assert read(folder / "board.json")["models"] == {}
    write_config(exported.path, tiny_config(data, changes))
    assert summarize(exported.path).bench == {}, "the config asks for five rounds, not six"
    monkeypatch.setattr(stage, "measure_devices", real)
    alone = tiny_config(data)
    STAGES["bench"](RunFolder(alone, exported.path), Silent())
    write_config(exported.path, alone)
    assert [one["device"] for one in summarize(exported.path).devices] == ["local"]
    capsys.readouterr()
    run_stages(RunFolder(alone, exported.path), ["bench"], Progress())
    assert "warning" not in capsys.readouterr().err


def write_config(run: Path, config: Any) -> None:
    values = read_config(run / "config.yaml")
    (run / "config.yaml").write_text(plain_text({**values, "bench": config.model_dump(mode="json")["bench"]}))


def test_a_record_of_an_older_version_is_left_out_once_its_device_is_not_named(
    exported: RunFolder, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(exported.path, run)
    folder = run / "bench"
    record = read(bench(RunFolder(exported.config, run), data) / "local.json")
    for name in ("local", "added"):
        old = {key: value for key, value in record.items() if key not in ("entry", "settings", "stage")}
        (folder / f"{name}.json").write_text(json.dumps({**old, "device": name}))
    (tmp_path / "d.yaml").write_text("devices: {board: {address: local}}\n")
    config = tiny_config(data, {"bench.on": ("board",), "bench.devices": tmp_path / "d.yaml", "bench.batch_size": 2})
    STAGES["bench"](RunFolder(config, run), Silent())
    write_config(run, config)
    summary = summarize(run)
    assert [one["device"] for one in summary.devices] == ["board", "added"], "what a command added stays"
    assert (folder / "local.json").is_file()
    assert summary.bench["device"] == "board"
