"""The log file of a run folder: what a command printed, and how it ended."""

from __future__ import annotations

import os
import stat
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qkd.engines.membership import is_first
from qkd.failures import classify
from qkd.foreign.shown import shown
from qkd.progress import Progress

FILE = "run.log"


@contextmanager
def logged(progress: Progress, folder: Path, what: str) -> Iterator[None]:
    """Append what is reported within a block to ``run.log``, and the traceback of an error that ends it.

    A log grows, so it is the one file of a run that is not written as a whole. If it cannot be written, the run
    continues without it.

    Args:
        progress: Its lines are logged.
        folder: The run folder.
        what: Names the block: a command.
    """
    handle = _opened(folder / FILE) if is_first() else None  # of several processes that train together
    if handle is None:
        yield
        return

    def write(text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{stamp}  {line}\n" for line in shown(text).splitlines())
        try:
            os.write(handle, lines.encode("utf-8", "backslashreplace"))
        except OSError:
            return  # the disk is full: the command itself reports it

    progress.tell = write
    write(f"{what} (process {os.getpid()})")
    try:
        yield
    except KeyboardInterrupt:
        write("interrupted")
        raise
    except Exception as error:
        failure = classify(error)
        write(failure.message if failure.is_expected else "".join(traceback.format_exception(error)))
        write(f"failed: {type(error).__name__}")
        raise
    else:
        write("done")
    finally:
        progress.tell = None
        os.close(handle)


def _opened(path: Path) -> int | None:
    """Open a log for appending; None if that fails or the file does not belong to this folder alone."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError:
        return None
    facts = os.fstat(handle)
    if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1:
        return handle
    os.close(handle)
    return None
