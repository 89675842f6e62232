"""A device behind a real ssh server, added to a finished run: measured, recorded, in its next report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qkd.cli import main

pytestmark = pytest.mark.slow


def test_a_device_is_added_to_a_finished_run(
    ssh_server, here, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["name=done", "--runs-dir", str(tmp_path)]
    assert main(["run", "digits/smoke", *words]) == 0
    run = tmp_path / "done"
    trained = {path: path.stat().st_mtime_ns for path in run.glob("*/weights.safetensors")}
    assert len(trained) == 2
    options = list(ssh_server.device().ssh_options)
    device = {"address": "ssh://board", "python": here, "ssh_options": options}
    (tmp_path / "devices.yaml").write_text(json.dumps({"devices": {"board": device}}))
    capsys.readouterr()
    named = ["--on", "board", "--devices", str(tmp_path / "devices.yaml"), "--rounds", "5"]
    assert main(["bench", str(run), *named]) == 0
    record = json.loads((run / "bench" / "board.json").read_text())
    assert record["address"] == "ssh://board" and record["models"]["student"]["agreement"] == 1.0
    assert sorted(record) == sorted(json.loads((run / "bench" / "local.json").read_text()))
    for target in ([str(run)], ["digits/smoke", *words]):  # a run folder, or its config
        capsys.readouterr()
        (run / "report.md").unlink()
        assert main(["report", *target]) == 0
        assert "teacher" not in capsys.readouterr().err
        assert "board" in (run / "report.md").read_text() and "board" in (run / "report.html").read_text()
    assert main(["run", "digits/smoke", *words]) == 0
    assert capsys.readouterr().err.count("already complete") == 6
    assert {path: path.stat().st_mtime_ns for path in run.glob("*/weights.safetensors")} == trained
    assert ssh_server.left() == []
