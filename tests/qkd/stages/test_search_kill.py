"""SIGKILL at random moments of both searches: in the end, the same files as of a run that was never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qkd.config import RunConfig
from qkd.config.binding import config_text
from qkd.run.folder import RunFolder
from qkd.testing import tiny_config, write_npz_set

DRIVER = Path(__file__).with_name("kill_driver.py")
ROOT = Path(__file__).resolve().parents[3]
STAGES = ["teacher", "search"]
FILES = [f"search/{role}.{kind}" for role in ("teacher", "student") for kind in ("schedule.yaml", "population.jsonl")]
LEAST_KILLS = 12


def experiment(data: Path, name: str) -> RunConfig:
    agent = {"policy": "search", "crop_padding": 1, "flip": False}
    search = {"members": 4, "epochs": 7, "interval_epochs": 2, "train_images": 48}
    return tiny_config(data, {"name": name, "teacher.agent": agent, "student.agent": dict(agent), "search": search})


class Driver:
    """The process that forks children on demand; each is killed after a while, or lives."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "QKD_FUSED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._errors = folder / "stderr.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment, cwd=folder,
            )  # fmt: skip

    def attempt(self, config: Path, runs_dir: Path, *, kill_after_s: float | None = None, die_at: int = 0) -> bool:
        """Return whether a child ended by itself."""
        order = {"config": str(config), "runs_dir": str(runs_dir), "stages": STAGES, "die_at": die_at}
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        timer = threading.Timer(3600 if kill_after_s is None else kill_after_s, os.kill, [pid, signal.SIGKILL])
        timer.start()
        status = int(process.stdout.readline())
        timer.cancel()
        timer.join()
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return False
        assert os.WEXITSTATUS(status) == 0, self._errors.read_text()
        return True

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.mark.slow
def test_killed_searches_find_what_a_search_never_killed_finds(tmp_path: Path) -> None:
    data, runs = write_npz_set(tmp_path / "data"), tmp_path / "runs"
    driver = Driver(tmp_path)

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(config_text(experiment(data, name)))
        return path

    def contents(name: str) -> dict[str, Any]:
        return {file: (runs / name / file).read_text() for file in FILES}

    try:
        started = time.monotonic()
        assert driver.attempt(write("whole"), runs)
        whole_s, rng, kills, number = time.monotonic() - started, random.Random(2), 0, 0
        reached: set[str] = set()
        while kills < LEAST_KILLS or not {"search_teacher", "search_student"} <= reached:
            number += 1
            path = write(f"killed{number}")
            while True:
                by_clock = {"kill_after_s": rng.uniform(0.1, 0.4) * whole_s}
                if driver.attempt(path, runs, **(by_clock if rng.random() < 0.5 else {"die_at": rng.randint(5, 150)})):
                    break
                kills += 1
                assert kills < 300, "the search does not get on"
                with RunFolder.open(experiment(data, f"killed{number}"), runs) as run:
                    stages = ("search_teacher", "teacher", "search_student")
                    reached.add(next((stage for stage in stages if not run.is_complete(stage)), "search"))
            assert contents(f"killed{number}") == contents("whole"), f"after {kills} kills"
            assert not list((runs / f"killed{number}").rglob("*member*"))
        print(f"\n{kills} kills in {number} runs, while {sorted(reached)} ran")
    finally:
        driver.close()
