"""Whether this process is one of several that train together, according to its environment."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import NoReturn

MEETING = "QKD_MEETING_FILE"  # where processes that we start find each other
TRAINING_TIMEOUT = timedelta(minutes=30)  # between two steps: another process may be writing a checkpoint
LOST = 75  # exit code of a process that ends because another one has, and has nothing to report
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them


def is_started_by_us() -> bool:
    """Return whether this process is one of a training that ``--devices`` has started."""
    return MEETING in os.environ


def is_member() -> bool:
    """Return whether this process is one of several, started by ``--devices`` or by ``torchrun``."""
    is_launched = is_started_by_us() or all(name in os.environ for name in _NAMES)
    return is_launched and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Return whether this process is by itself, or the first of several."""
    return not is_member() or os.environ["RANK"] == "0"


def end_process(code: int) -> NoReturn:
    """End this process with an exit code; one of several ends immediately, since its transport threads may hang.

    Args:
        code: 0 for success.

    Raises:
        SystemExit: With the code, if it is the only process.
    """
    if not is_member():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def attend_parent() -> None:
    """End this process when its parent ends, which closes the parent's end of the pipe."""
    if is_started_by_us():
        import threading  # not needed by commands with one process

        threading.Thread(target=_until_closed, args=(sys.stdin.fileno(),), daemon=True).start()


def _until_closed(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(LOST)
