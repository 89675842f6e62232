"""Whether this process is one of several that train together, from what its environment says."""

from __future__ import annotations

import os
import sys

MEETING = "QKD_MEETING_FILE"  # where processes that we have started find each other
LOST = 75  # exit code of a process that ends because another has: it has nothing to tell
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


def attend_parent() -> None:
    """End this process when the one that has started it ends: its end of the pipe closes."""
    if is_started_by_us():
        import threading  # no command without others waits for it

        threading.Thread(target=_until_closed, args=(sys.stdin.fileno(),), daemon=True).start()


def _until_closed(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(LOST)
