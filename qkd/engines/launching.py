"""Start the processes of a training on this machine, watch them, and report once how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from qkd.engines.membership import LOST, MEETING
from qkd.machine import usable_cpus

POLL_S = 0.1
# `python -m` and `-c` put the working folder first on the path, where a file named like a standard module would be run
START = (
    "import sys; sys.path[:] = filter(None, sys.path); from qkd.cli.entry import main; "
    "from qkd.engines.membership import end_process; end_process(main())"
)
GRACE_S = 10.0  # for the others to exit on their own after one has failed; they write nothing in that time


def launch(arguments: Sequence[str], devices: int) -> int:
    """Start ``qkd`` with these arguments once per device, and wait for all; if one fails, all are stopped.

    Args:
        arguments: Command line arguments, without the program name.
        devices: Number of devices, at least 2.

    Returns:
        The exit code: 0, or that of the process that failed; 1 if one was killed.

    Raises:
        KeyboardInterrupt: If it is interrupted, after the others have ended.
    """
    with tempfile.TemporaryDirectory(prefix="qkd-devices-") as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(1, devices)]
        started = [_start(arguments, rank, devices, Path(folder)) for rank in range(devices)]
        try:
            code = _watch(started, logs)
        except KeyboardInterrupt:  # the terminal has sent it to the others, too
            _wait(started, GRACE_S)
            raise
        finally:
            _stop(started, 0.0)
    return code


def member_environment(rank: int, devices: int, folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process.

    Args:
        rank: Rank of the process, from 0.
        devices: Number of processes.
        folder: The folder where they meet.
        environment: Environment of the parent process; its ``OMP_NUM_THREADS`` is kept, if set.
    """
    size = str(devices)
    return {
        "OMP_NUM_THREADS": str(max(1, usable_cpus() // devices)),  # otherwise each would take all cores
        **environment,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        MEETING: str(folder / "meeting"),
    }


def _start(arguments: Sequence[str], rank: int, devices: int, folder: Path) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(filter(None, sys.path))  # where this process finds its modules, and nowhere else
    environment = member_environment(rank, devices, folder, {**os.environ, "PYTHONPATH": paths})
    command = [sys.executable, "-c", START, *arguments]
    if rank == 0:
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    with (folder / f"{rank}.log").open("wb") as log:  # the first one prints; the other outputs are read at the end
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)


def _watch(started: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> int:
    """Wait until all have ended or one has failed; then let the others end, stop them, and report why."""
    while any(process.poll() is None for process in started) and not any(process.returncode for process in started):
        time.sleep(POLL_S)
    if not any(process.returncode for process in started):
        return 0
    _wait(started, GRACE_S)
    codes = [process.returncode for process in started]  # before we stop any; None means still running
    _stop(started, GRACE_S)
    return _tell(codes, logs, sys.stderr)


def _tell(codes: Sequence[int | None], logs: Sequence[Path], stream: IO[str]) -> int:
    """Report what the failed process has not reported itself, and return the exit code.

    Args:
        codes: Exit codes by rank, negative for a signal; None for one that was still running.
        logs: The output of processes 1, 2, ...
        stream: Where to write.
    """
    told = [(rank, code) for rank, code in enumerate(codes) if code is not None and 0 < code != LOST]
    killed = [(rank, -code) for rank, code in enumerate(codes) if code is not None and code < 0]
    if killed:
        rank, number = killed[0]
        print(
            f"qkd: process {rank} of {len(codes)} was killed by {_signal_name(number)}, so all were stopped; nothing "
            f"is lost, and the same command resumes from the last checkpoint",
            file=stream,
        )
        return 1
    if not told:
        print(f"qkd: the processes lost contact (exit codes {list(codes)}); all were stopped", file=stream)
        return 1
    for rank, _ in told:
        if rank:
            stream.write(logs[rank - 1].read_text(encoding="utf-8", errors="replace"))
    return told[0][1]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _wait(started: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        time.sleep(POLL_S)


def _stop(started: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for process in started:
            if process.poll() is None:
                stop(process)
        _wait(started, seconds)
    for process in started:
        if process.stdin is not None:
            process.stdin.close()
        process.wait()
