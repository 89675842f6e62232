"""A killed process stops all with one error; started again, also by torchrun, they end with an unbroken run's bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qkd.config import RunConfig
from qkd.config.binding import config_text
from qkd.files import read_json, sha256_of
from qkd.testing import tiny_config, write_npz_set

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.2", "-m")
FILES = ("teacher/weights.safetensors", "student/weights.safetensors")


def experiment(folder: Path, name: str, **changes: object) -> RunConfig:
    return tiny_config(
        folder / "data",
        {
            "name": name,
            "teacher.train": {"epochs": 3, "lr": 0.05, "checkpoint_every_s": 0, "ema_decay": 0.9},
            "student.train": {"epochs": 3, "lr": 0.01, "checkpoint_every_s": 0},
            **changes,
        },
    )


def start(folder: Path, config: RunConfig, *launcher: str, devices: int = 0) -> subprocess.Popen[str]:
    path = folder / f"{config.name}.yaml"
    path.write_text(config_text(config))
    command = [sys.executable, "-m", *launcher, "qkd", "run", str(path), "--runs-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QKD_FUSED": "0", "OMP_NUM_THREADS": "1"}
    with (folder / f"{config.name}.log").open("w") as log:
        return subprocess.Popen(
            [*command, "--until", "distill", *(["--devices", str(devices)] if devices else [])],
            cwd=folder, env=environment, stdout=log, stderr=log, text=True,
        )  # fmt: skip


def log_of(folder: Path, config: RunConfig) -> str:
    return (folder / f"{config.name}.log").read_text()


def bits(folder: Path, config: RunConfig) -> list[str]:
    return [sha256_of(folder / config.name / file) for file in FILES]


def members_of(config: RunConfig) -> dict[int, int]:
    """Return rank -> process id of the processes that train a config."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().split(b"\0")
            environment = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [one for one in environment if one.startswith(b"RANK=")]
        if (
            ranks
            and any(one.endswith(f"/{config.name}.yaml".encode()) for one in command)
            and b"torch.distributed.run" not in command
        ):
            found[int(ranks[0][5:])] = int(place.name)
    return found


def wait_for(what: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def start_training(
    folder: Path, config: RunConfig, *launcher: str, devices: int = 0, role: str = "teacher"
) -> subprocess.Popen[str]:
    """Start a run, and return once a role of it trains: it has checkpoints after the first."""
    process = start(folder, config, *launcher, devices=devices)
    wait_for(lambda: len(list((folder / config.name / role / "checkpoint").glob("*.json"))) > 1)
    return process


def interrupt(folder: Path, config: RunConfig, number: signal.Signals = signal.SIGTERM) -> None:
    """Train on two devices for a while, send a signal to the process that started them, and see that they end, too."""
    process = start_training(folder, config, devices=2)
    process.send_signal(number)
    process.wait(60)
    wait_for(lambda: members_of(config) == {}, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    write_npz_set(folder / "data", train=128)
    return folder


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> list[str]:
    config = experiment(folder, "unbroken")
    assert start(folder, config, devices=2).wait(600) == 0, log_of(folder, config)
    return bits(folder, config)


@pytest.mark.parametrize(("role", "rank"), [("teacher", 1), ("student", 0)])
def test_a_kill_stops_all_and_the_same_command_resumes(folder: Path, unbroken: list[str], role: str, rank: int) -> None:
    config = experiment(folder, f"killed-{role}")
    process = start_training(folder, config, devices=2, role=role)
    os.kill(members_of(config)[rank], signal.SIGKILL)
    assert process.wait(60) == 1
    errors = [line for line in log_of(folder, config).splitlines() if line.startswith("qkd: ")]
    assert len(errors) == 1 and f"process {rank} of 2 was killed by SIGKILL, so all were stopped" in errors[0]
    assert members_of(config) == {}
    process = start(folder, config, devices=2)
    assert process.wait(600) == 0, log_of(folder, config)
    assert f"{role}: resuming from the checkpoint" in log_of(folder, config)
    assert bits(folder, config) == unbroken


def test_torchrun_starts_killed_processes_again(folder: Path, unbroken: list[str]) -> None:
    config = experiment(folder, "elastic")
    process = start_training(folder, config, *TORCHRUN)
    os.kill(members_of(config)[1], signal.SIGKILL)
    assert process.wait(600) == 0, log_of(folder, config)
    assert bits(folder, config) == unbroken


def test_processes_end_with_the_one_that_started_them(folder: Path) -> None:
    interrupt(folder, experiment(folder, "orphans"), signal.SIGKILL)


def test_an_interruption_is_said_once(folder: Path) -> None:
    config = experiment(folder, "interrupted")
    process = start_training(folder, config, devices=2)
    for one in (process.pid, *members_of(config).values()):  # as a terminal does
        os.kill(one, signal.SIGINT)
    assert process.wait(60) == 130
    assert log_of(folder, config).count("qkd: interrupted; the same command resumes") == 1


def test_another_number_of_devices_resumes_with_a_warning_or_is_refused(folder: Path) -> None:
    config = experiment(folder, "other")
    interrupt(folder, config)
    assert start(folder, config).wait(600) == 0, log_of(folder, config)
    assert "teacher: devices: 2 then, 1 now; results may now differ in the last bits" in log_of(folder, config)
    apart = experiment(folder, "other-apart", sync_batch_norm=False)
    interrupt(folder, apart)
    assert start(folder, apart).wait(600) == 2
    assert "parts of a batch with separate batch-norm statistics: 2 then, 1 now" in log_of(folder, apart)


def test_a_fault_is_said_once(folder: Path) -> None:
    config = experiment(folder, "uneven", **{"data.batch_size": 15})
    assert start(folder, config, devices=2).wait(600) == 2
    assert log_of(folder, config).count("a batch of 15 images cannot be divided evenly among 2 devices") == 1
    gone = experiment(folder, "gone", **{"teacher.weights": str(folder / "gone.safetensors")})
    assert start(folder, gone, devices=2).wait(600) == 2
    assert log_of(folder, gone).count("gone.safetensors") == 1


def test_the_first_process_alone_writes(folder: Path, unbroken: list[str]) -> None:
    manifest = read_json(folder / "unbroken" / "manifests" / "distill.json")
    assert manifest["files"]["student/weights.safetensors"] == unbroken[1]
    assert not list((folder / "unbroken").rglob(".*unfinished*"))
