"""SIGKILL at random moments of every training stage: in the end, the same bits as in a run that was never killed."""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qkd.config import RunConfig
from qkd.config.binding import config_text
from qkd.files import sha256_of
from qkd.run.folder import RunFolder
from qkd.testing import tiny_config, write_npz_set

DRIVER = Path(__file__).with_name("kill_driver.py")
ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = ("teacher/weights.safetensors", "student/float/weights.safetensors", "student/weights.safetensors")
LEAST_KILLS = {"teacher": 6, "search": 3, "student_float": 6, "distill": 9}
CLOCKED = ("seconds", "images_per_second")


def experiment(data: Path, name: str) -> RunConfig:
    """Return a config with a float training, averaged weights, AdamW, a feature loss and frozen batch norm."""
    return tiny_config(
        data,
        {
            "name": name,
            "teacher.train": {"epochs": 4, "lr": 0.05, "checkpoint_every_s": 0, "ema_decay": 0.9},
            "student.init": "float",
            "student.float_train": {"epochs": 4, "lr": 0.05, "checkpoint_every_s": 0, "clip_grad_norm": 1.0},
            "student.train": {
                "epochs": 4, "lr": 0.005, "optimizer": "adamw", "checkpoint_every_s": 0, "ema_decay": 0.9
            },
            "student.view": "own",
            "student.agent": {"policy": "randaugment", "magnitude": 3, "crop_padding": 1},
            "student.terms": [
                {"loss": "cross_entropy", "weight": 0.5},
                {"loss": "soft_target", "weight": 0.5},
                {"loss": "similarity_preserving", "weight": 5, "taps": [["layer3", "layer3"]]},
            ],
        },
    )  # fmt: skip


SHORT = {"teacher.train": {"epochs": 2, "lr": 0.05, "checkpoint_every_s": 0},
         "student.train": {"epochs": 3, "lr": 0.01, "checkpoint_every_s": 0}}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {  # what stands beside the student: trainings before it, and nets within its own
    "ensemble_and_auxiliary": {
        "teacher.members": 2,
        "student.auxiliary": {
            "quant": {"weight_bits": 8, "act_bits": 8},
            "train": {"epochs": 3, "lr": 0.01, "checkpoint_every_s": 0},
            "terms": [{"loss": "cross_entropy"}, {"loss": "soft_target"}],
        },
        "student.terms": [
            {"loss": "cross_entropy"},
            {"loss": "hint", "taps": [["layer2", "layer2"]]},
            {"loss": "information_flow", "decay": 0.7, "taps": [["layer3", "layer3"]]},
        ],
    },
    "low_bit": {
        "student.quant": {"weight_bits": 2, "act_bits": 2},
        "student.low_bit": {
            "transition_rate": 0.02,
            "decay_by_bits": True,
            "dampening": 0.01,
            "oscillation_thresholds": [0.2, 0.1],
            "oscillation_momentum": 0.1,
            "reestimate_batches": 2,
        },
        "student.widths": [{"weight_bits": 4, "act_bits": 4, "epochs": 2}],
        "student.self_distillation": {},
    },
    "peers": {"student.peers": {"nets": [{}, {"weight_bits": 8, "act_bits": 8}], "taps": ["layer2", "layer3"]}},
    "rotations": {
        "student.rotations": {"teacher_branches": {"train": {"epochs": 2, "lr": 0.05, "checkpoint_every_s": 0}}}
    },
    "rotations_online": {"teacher.train": None, "teacher.untrained": True, "student.rotations": {"mode": "online"}},
    "co_study": {
        "student.phases": [
            {"name": "co_study", "epochs": 2, "teacher_terms": [{"loss": "cross_entropy"}, {"loss": "soft_target"}]},
            {"name": "settling", "epochs": 1, "freeze_batch_norm": True},
        ],
    },
    "meta": {
        "student.init": "random",
        "student.phases": [
            {"name": "meta", "epochs": 2, "meta": {"quiz_images": 12}},
            {"name": "settling", "epochs": 1, "freeze_batch_norm": True},
        ],
    },
}


class Driver:
    """The process that forks children on demand."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "QKD_FUSED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._errors = (folder / "stderr.txt").open("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, str(DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=folder,
        )

    def attempt(
        self, config: Path, runs_dir: Path, stages: list[str], *, kill_after_s: float | None = None, die_at: int = 0
    ) -> bool:
        """Return whether a child ended by itself; raise with what it said if it failed."""
        order = {"config": str(config), "runs_dir": str(runs_dir), "stages": stages, "die_at": die_at}
        self._say(json.dumps(order))
        pid = int(self._hear())
        timer = None
        if kill_after_s is not None:
            timer = threading.Timer(kill_after_s, _kill, [pid])
            timer.start()
        status = int(self._hear())
        if timer is not None:
            timer.cancel()
            timer.join()
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return False
        assert os.WEXITSTATUS(status) == 0, self.errors()
        return True

    def errors(self) -> str:
        self._errors.flush()
        self._errors.seek(0)
        return self._errors.read()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.errors()
        return line


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it ended first
        return


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path)
    yield driver
    driver.close()


def write_config(config: RunConfig, folder: Path) -> Path:
    path = folder / f"{config.name}.yaml"
    path.write_text(config_text(config))
    return path


def stage_of(config: RunConfig, runs_dir: Path) -> str:
    """Return the first stage that is not complete."""
    with RunFolder.open(config, runs_dir) as run:
        names = ("teacher", "search", *(("student_float",) if config.student.init == "float" else ()), "distill")
        return next((name for name in names if not run.is_complete(name)), "done")


def steady(run: Path) -> dict[str, Any]:
    """Return everything of a run that no clock has touched."""
    found: dict[str, Any] = {name: sha256_of(run / name) for name in WEIGHTS}
    for folder in ("teacher", "student/float", "student"):
        lines = (run / folder / "metrics.jsonl").read_text().splitlines()
        found[folder] = [_unclocked(json.loads(line)) for line in lines]
        found[f"{folder} result"] = _unclocked(json.loads((run / folder / "result.json").read_text()))
    for path in sorted((run / "search").iterdir()):
        found[path.name] = path.read_text()
    return found


def _unclocked(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in CLOCKED}


@pytest.mark.slow
def test_killed_runs_end_with_the_bits_of_a_run_never_killed(driver: Driver, tmp_path: Path) -> None:
    data = write_npz_set(tmp_path / "data")
    whole = experiment(data, "whole")
    started = time.monotonic()
    assert driver.attempt(write_config(whole, tmp_path), tmp_path / "runs", ["teacher", "search", "distill"])
    whole_s = time.monotonic() - started
    expected = steady(tmp_path / "runs" / "whole")
    rng, kills, round_number = random.Random(1), collections.Counter[str](), 0
    while any(kills[stage] < least for stage, least in LEAST_KILLS.items()):
        round_number += 1
        assert round_number < 20, f"the kills did not reach every stage: {dict(kills)}"
        config = experiment(data, f"killed{round_number}")
        path, attempts = write_config(config, tmp_path), 0
        while (stage := stage_of(config, tmp_path / "runs")) != "done":
            attempts += 1
            assert attempts < 200, "the run does not get on"
            where: dict[str, Any] = {"kill_after_s": rng.uniform(0.03, 0.2) * whole_s}
            if stage == "search" or rng.random() < 0.4:  # a moment between two file operations; search is all of these
                where = {"die_at": rng.randint(1, 30 if stage == "search" else 120)}
            stages = ["distill" if stage == "student_float" else stage]
            if not driver.attempt(path, tmp_path / "runs", stages, **where):
                kills[stage_of(config, tmp_path / "runs")] += 1
        assert steady(tmp_path / "runs" / config.name) == expected, f"after {dict(kills)}"
        leftovers = [path for path in (tmp_path / "runs" / config.name).rglob(".*") if path.name != ".lock"]
        assert leftovers == []
    print(f"\n{sum(kills.values())} kills in {round_number} runs: {dict(kills)}")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_methods_end_with_the_bits_of_a_run_never_killed(method: str, driver: Driver, tmp_path: Path) -> None:
    data = write_npz_set(tmp_path / "data")
    stages, runs = ["teacher", "search", "distill"], tmp_path / "runs"
    whole = tiny_config(data, {**SHORT, **METHODS[method], "name": "whole"})
    assert driver.attempt(write_config(whole, tmp_path), runs, stages)
    killed = tiny_config(data, {**SHORT, **METHODS[method], "name": "killed"})
    path, rng, kills = write_config(killed, tmp_path), random.Random(2), 0
    while not driver.attempt(path, runs, stages, die_at=rng.randint(15, 60)):  # a file operation
        kills += 1
        assert kills < 60, "the run does not get on"
    assert kills >= 2
    assert left_by(runs / "killed") == left_by(runs / "whole")
    print(f"\n{kills} kills")


def left_by(run: Path) -> dict[str, Any]:
    """Return all that a run keeps, of every net in it, without what a clock has touched."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.name == "result.json":
            found[name] = _unclocked(json.loads(path.read_text()))
        elif path.name == "metrics.jsonl":
            found[name] = [_unclocked(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors" and "checkpoint" not in name:
            found[name] = sha256_of(path)
    return found


@pytest.mark.slow
def test_the_command_line_resumes_after_a_kill(tmp_path: Path) -> None:
    data = write_npz_set(tmp_path / "data")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # with the compiled quantizers, as a user has them

    def command(config: RunConfig, stage: str) -> list[str]:
        path = write_config(config, tmp_path)
        return [sys.executable, "-m", "qkd.cli", stage, str(path), "--runs-dir", str(tmp_path / "runs")]

    for stage in ("teacher", "search", "distill"):
        whole = subprocess.run(
            command(experiment(data, "whole"), stage), env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert whole.returncode == 0, whole.stderr
    killed = experiment(data, "killed")
    for stage, folder in (("teacher", "teacher"), ("search", ""), ("distill", "student/float"), ("distill", "student")):
        if folder:
            process = subprocess.Popen(command(killed, stage), env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
            checkpoints = tmp_path / "runs" / "killed" / folder / "checkpoint"
            _wait_for(lambda: len(list(checkpoints.glob("*.json"))) > 1, process)  # noqa: B023 - called at once
            process.kill()
            assert process.wait() == -signal.SIGKILL
        again = (
            subprocess.run(command(killed, stage), env=environment, cwd=tmp_path, capture_output=True, text=True)
            if folder != "student/float"
            else None
        )  # the next kill is the one of the same stage
        assert again is None or again.returncode == 0, again.stderr
        assert again is None or not folder or "resuming from the checkpoint" in again.stderr
    assert steady(tmp_path / "runs" / "killed") == steady(tmp_path / "runs" / "whole")


def _wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until, "no checkpoint appeared"
        time.sleep(0.02)
