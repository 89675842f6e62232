"""Turn an exception into a message for a person and an exit code for a machine.

Exit codes: 0 done, 1 the run or a parity check failed, 2 the user's input is wrong, 130 interrupted.
"""

from __future__ import annotations

import errno
import linecache
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
MOST_FAULTS = 50  # at most this many are listed one by one

OUR_FOLDERS = tuple(Path(__file__).resolve().parent.parent / name for name in ("qkd", "quantizers", "export"))
INPUT_ERRNOS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS, errno.ENAMETOOLONG,
}  # fmt: skip
SYSTEM_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM}  # which other input would not fix


class ConfigError(ValueError):
    """A config that cannot be used; ``faults`` holds every fault, one line each, as does the message."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


def first_of(faults: list[str], most: int = MOST_FAULTS) -> list[str]:
    """Return the first faults, and a line with the number of further ones."""
    rest = len(faults) - most
    return faults if rest <= 0 else [*faults[:most], f"... and {rest:,} more faults like these"]


class UsageError(ValueError):
    """A command that cannot be carried out as given."""


@dataclass(frozen=True)
class Failure:
    """What a failed command reports.

    Args:
        message: Text for stderr; one line for unexpected errors.
        exit_code: 1 or 2.
        is_expected: Whether the message was written for this case, so that no traceback is needed.
        faults: How many faults the message lists, one line each; 1 for a single message, however many lines it has.
    """

    message: str
    exit_code: int
    is_expected: bool
    faults: int = 1


def classify(error: Exception) -> Failure:
    """Return message and exit code of an exception.

    An error that our own code raises on purpose is shown unchanged. A ``ValueError`` or ``TypeError`` among these is
    about the user's input; any other is a failed run, and so is an error caused by a full or failing disk. Errors from
    elsewhere are unexpected.
    """
    if isinstance(error, ConfigError):
        return Failure(str(error), BAD_INPUT, is_expected=True, faults=len(error.faults))
    if isinstance(error, OSError) and error.errno is not None:
        code = BAD_INPUT if error.errno in INPUT_ERRNOS else FAILED
        return Failure(_os_message(error), code, is_expected=True)
    if _is_worded(error):
        is_input = isinstance(error, ValueError | TypeError | OSError) and not _from_the_system(error)
        return Failure(str(error), BAD_INPUT if is_input else FAILED, is_expected=True)
    text = str(error).strip().splitlines()
    return Failure(f"{type(error).__name__}: {text[0] if text else ''}", FAILED, is_expected=False)


def write_traceback(error: BaseException) -> Path:
    """Write the traceback to a new file in the system's temporary folder and return its path."""
    with tempfile.NamedTemporaryFile("w", prefix="qkd-", suffix=".log", delete=False, encoding="utf-8",
                                     errors="backslashreplace") as file:  # fmt: skip
        file.write("".join(traceback.format_exception(error)))
    return Path(file.name)


def _is_worded(error: Exception) -> bool:
    """Return whether a ``raise`` statement of our own packages raised this error."""
    if error.__traceback__ is None:
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(last.filename).resolve()
    if not any(folder in path.parents for folder in OUR_FOLDERS):
        return False
    return linecache.getline(last.filename, last.lineno or 0).lstrip().startswith("raise")


def _from_the_system(error: BaseException) -> bool:
    """Return whether an error was caused by a full disk or the like."""
    cause = error.__cause__
    return cause is not None and (getattr(cause, "errno", None) in SYSTEM_ERRNOS or _from_the_system(cause))


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}"
