"""Which measurements stand for a run, under what conditions, and which of two runs can be compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import beside
import pytest

from qkd.cli import main
from qkd.report import render_page, render_text, summarize
from qkd.report.comparing.comparison import compare_runs, render_comparison, runs_below

_files = beside.load(Path(__file__).with_name("run_files.py"))
BENCH = {
    "on": ["local"],
    "threads": 1,
    "rounds": 5,
    "warmup": 2,
    "providers": ["auto"],
    "affinity": [],
    "batch_size": 1,
}


def make(path: Path, *, bench: Any = BENCH, **changes: Any) -> Path:
    """Write a run whose config has a bench section, and change the record of this machine."""
    run: Path = _files.make_run(path)
    _files.write(run / "config.yaml", {"bench": bench})
    return add(run, "local", **changes)


def add(run: Path, device: str, *, times: float = 1.0, **changes: Any) -> Path:
    record = json.loads((run / "bench" / "local.json").read_text())
    record = {
        "device": device,
        "address": device,
        "settings": {key: value for key, value in BENCH.items() if key != "on"},
        "stage": True,
        **record,
        **changes,
    }
    models = {name: {**row, "median_ms": times * row["median_ms"]} for name, row in record["models"].items()}
    _files.write(run / "bench" / f"{device}.json", {**record, "device": device, "models": models})
    return run


def test_only_a_record_that_the_config_makes_leads(tmp_path: Path) -> None:
    """One that was left over gave the headline, the closing table and the comparison their latency."""
    run = add(make(tmp_path / "a", stage=False), "board", times=3.0, stage=True)
    assert summarize(run).bench["device"] == "local"
    assert [one["device"] for one in summarize(run).devices] == ["local"], "the stage does not make `board` anymore"
    _files.write(run / "config.yaml", {"bench": {**BENCH, "on": ["board", "local"]}})
    summary = summarize(run)
    assert summary.bench["device"] == "board" and summary.student.median_ms == pytest.approx(0.3702)
    assert [one["device"] for one in summary.devices] == ["board", "local"]
    assert "4.1 x faster (board), " in summary.verdict and "latency (median, board)" in summary.to_text()
    text = render_text(summary)
    assert "latency (median, board)" in text and "4.1 x faster (board)" in render_page(summary, _files.record())
    assert compare_runs([run]).rows[0].device == "board"
    for change in ({"batch_size": 64}, {"threads": 2}, {"rounds": 6}, {"providers": ["cpu"]}, {"affinity": [0]}):
        _files.write(run / "config.yaml", {"bench": {**BENCH, **change}})
        summary = summarize(run)
        assert summary.bench == {} and summary.student.median_ms is None and "faster" not in summary.verdict
    _files.write(run / "config.yaml", {"bench": {**BENCH, "providers": ["cpu"]}})
    add(run, "local", settings={**BENCH, "providers": ["CPUExecutionProvider"]})
    assert summarize(run).bench["device"] == "local", "another spelling"


def test_records_of_older_versions_lead_where_batch_and_threads_fit(tmp_path: Path) -> None:
    old = {"settings": None, "stage": False, "batch_size": 64, "threads": 2}
    for section, leads in (({}, False), ({"batch_size": 64}, False), ({"batch_size": 64, "threads": 2}, True)):
        run = make(tmp_path / str(len(section)), bench={**BENCH, **section}, **old)
        assert bool(summarize(run).bench) is leads
    run = add(make(tmp_path / "named"), "pi", **{**old, "address": "ssh://pi@board"})
    _files.write(run / "config.yaml", {"bench": {**BENCH, "on": ["pi"], "batch_size": 64}})
    assert summarize(run).bench["device"] == "pi", "it may have threads of its own"
    assert "(pi, batch 64)" in summarize(run).verdict
    (run / "config.yaml").unlink()
    assert summarize(run).bench["device"] == "local", "no config says which"


def test_a_failure_of_a_device_that_is_not_named_anymore_is_left_out(tmp_path: Path) -> None:
    run = make(tmp_path / "a")
    for device, more in (("new", {"stage": True}), ("old", {}), ("added", {"stage": False})):
        _files.write(run / "bench" / f"{device}.json", {"device": device, "failure": "gone", "models": {}, **more})
    assert [one["device"] for one in summarize(run).devices] == ["local", "added"]


def test_conditions_are_told_for_each_device_that_differs(tmp_path: Path) -> None:
    run = make(tmp_path / "a")
    add(run, "same", stage=False)
    assert render_text(summarize(run)).count("rounds of all files") == 1, "all alike"
    machine = {"cpu": "another processor", "onnxruntime": "1.20"}
    add(run, "board", stage=False, machine=machine, threads=2, batch_size=64, rounds=7, affinity=[0, 1])
    told = (
        "local: a processor, 1 thread, batch 1, 5 rounds of all files, interleaved, after 2 of warm-up, ONNX Runtime "
        "1.31.",
        "board: another processor, 2 threads on CPUs 0, 1, batch 64, 7 rounds of all files, interleaved, after 2 of "
        "warm-up, ONNX Runtime 1.20.",
    )
    words = " ".join(_files.Page(render_page(summarize(run), _files.record())).words)
    text = render_text(summarize(run))
    for sentence in told:
        assert sentence in text and f"Latency: {sentence}" in words


def test_latencies_that_were_not_measured_alike_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, same = make(tmp_path / "first"), make(tmp_path / "same")
    assert "measured on" not in compare_runs([first, same]).to_text()
    section = {**BENCH, "batch_size": 64}
    other = make(tmp_path / "other", bench=section, batch_size=64, settings=section)
    table = compare_runs([first, same, other])
    latency = {one.run: one for one in table.differences if one.figure.startswith("latency")}
    assert latency["same"].verdict == "within noise"
    assert latency["other"].verdict == "not comparable: batch 1 and 64" and latency["other"].difference is None
    text = table.to_text()
    assert "measured on" in text and "local, batch 64, 1 thread" in text
    page = render_comparison(table)
    assert "accuracy against latency (not measured alike)" in page and "(local, batch 64, 1 thread)" in page
    assert main(["compare", str(first), str(other), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["device"], row["batch_size"], row["threads"]) for row in rows] == [("local", 1, 1), ("local", 64, 1)]
    apart = add(make(tmp_path / "apart"), "board", threads=4)
    (apart / "bench" / "local.json").unlink()
    _files.write(apart / "config.yaml", {"bench": {**BENCH, "on": ["board"]}})
    (found,) = [one for one in compare_runs([first, apart]).differences if one.figure == "latency"]
    assert found.verdict == "not comparable: device local and board; threads 1 and 4"


def test_a_damaged_config_is_said(tmp_path: Path) -> None:
    make(tmp_path / "fine")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "config.yaml").write_bytes(b"\xff\x00" + os.urandom(300))
    make(tmp_path / "list")
    (tmp_path / "list" / "config.yaml").write_text("- 1\n")
    states = {row.run: row for row in runs_below(tmp_path).rows}
    assert states["fine"].state == "measured"
    assert all(states[name].state.startswith("config.yaml is damaged (") for name in ("noise", "list"))
    assert states["list"].accuracy == 0.97, "its figures can be read"
