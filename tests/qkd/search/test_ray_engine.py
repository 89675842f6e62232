"""The Ray engine: the local engine's schedule from two workers, one of them killed; and what it says without Ray."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from qkd.progress import Progress, Silent
from qkd.run.folder import RunFolder
from qkd.search.ray_engine import member_trainable
from qkd.search.role_search import search_agent
from qkd.testing import tiny_config, write_npz_set

HAS_RAY = importlib.util.find_spec("ray") is not None
SEARCH = {"members": 4, "epochs": 6, "interval_epochs": 2, "train_images": 48}


def run_of(folder: Path, name: str, **search: object) -> RunFolder:
    data = folder / "data"
    if not data.exists():
        write_npz_set(data)
    agent = {"policy": "search", "crop_padding": 1, "flip": False}
    changes = {"name": name, "teacher.agent": agent, "search": {**SEARCH, **search}}
    return RunFolder.open(tiny_config(data, changes), folder / "runs")


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"`ray` needs Ray Tune.*pip install 'qkd-toolkit\[ray\]', or use search"):
        member_trainable()
    run = run_of(tmp_path, "without", engine="ray")
    with pytest.raises(ImportError, match="needs Ray Tune"):
        search_agent(run, "teacher", Silent())


def workers_of_ours() -> list[int]:
    """Return the ids of Ray workers that take a turn, among the descendants of this process."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                status = (entry / "stat").read_text()
                command = (entry / "cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(status.rsplit(")", 1)[1].split()[1])
            if b"SearchMember" in command:
                found.append(int(entry.name))

    def is_ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 1)
        return pid == os.getpid()

    return [pid for pid in found if is_ours(pid)]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="Ray Tune is in the extra [ray], which is not installed")
@pytest.mark.filterwarnings("default")  # Ray's own
def test_two_workers_one_of_them_killed_find_the_local_schedule(tmp_path: Path) -> None:
    local, ray = run_of(tmp_path, "local"), run_of(tmp_path, "ray", engine="ray", workers=2)
    search_agent(local, "teacher", Silent())
    killed: list[tuple[int, float]] = []

    def kill_one() -> None:
        until = time.monotonic() + 300
        journal = ray.path / "search" / "teacher" / "journal.json"
        while time.monotonic() < until and not killed:
            workers = workers_of_ours()
            # in the middle: some turns are done, and a worker is at one
            if workers and journal.is_file() and journal.read_text().count('"seconds"') >= 2:
                os.kill(workers[0], signal.SIGKILL)
                killed.append((workers[0], time.monotonic()))
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with (tmp_path / "progress.log").open("w") as stream:  # cannot be pickled, as what the command writes to
        search_agent(ray, "teacher", Progress(stream))
    killer.join()
    assert killed and ray.is_complete("search_teacher")
    for name in ("teacher.population.jsonl", "teacher.schedule.yaml"):
        assert (ray.path / "search" / name).read_text() == (local.path / "search" / name).read_text()
    print(f"\nworker {killed[0][0]} was killed; the schedule is the local engine's")
