"""Progress on stderr: a bar with rate and time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from qkd.foreign.shown import raw_stream, shown, shown_line

PLAIN_INTERVAL_S = 5.0  # a log file needs an occasional line, not one per step


def duration(seconds: float) -> str:
    """Format seconds for people: ``8 s``, ``2:05``, ``1:02:05``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_values(values: dict[str, object]) -> str:
    """Return ``name value`` pairs on one line; floats have four significant digits."""
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in values.items())  # fmt: skip


class Tracker:
    """Counts the work done within :meth:`Progress.track`; the base class shows nothing."""

    def line(self, text: str) -> None:
        """Write a separate line, e.g. for a finished epoch."""

    def update(self, n: int = 1, **values: object) -> None:
        """Count ``n`` more units; ``values`` (loss, accuracy, ...) are shown next to the count."""

    def close(self) -> None:
        """Show the final state; called when the ``with`` block ends."""


class PlainTracker(Tracker):
    """Writes a line every few seconds: share, rate, time left and the latest values."""

    def __init__(self, stream: TextIO, total: int, label: str, unit: str, interval_s: float) -> None:
        self._stream, self._total, self._label, self._unit = stream, total, label, unit
        self._interval_s = interval_s
        self._done = 0
        self._values: dict[str, object] = {}
        self._written: tuple[int, dict[str, object]] | None = None  # by the last line
        self._start = self._last = time.monotonic()

    def update(self, n: int = 1, **values: object) -> None:
        """Count ``n`` units and write a line if the last one is at least a few seconds old."""
        self._done += n
        self._values.update(values)
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            self._write(now)

    def line(self, text: str) -> None:
        """Write a line immediately."""
        print("  " + shown(text), file=self._stream, flush=True)

    def close(self) -> None:
        """Write the closing line, unless the last one says the same."""
        if self._written != (self._done, self._values):
            self._write(time.monotonic())

    def _write(self, now: float) -> None:
        self._written = (self._done, dict(self._values))
        elapsed = now - self._start
        rate = self._done / elapsed if elapsed > 0 else 0.0
        parts = [f"{self._label}: {self._done}/{self._total} {self._unit}", f"{rate:.4g} {self._unit}/s"]
        if self._done < self._total and rate > 0:
            parts.append(f"{duration((self._total - self._done) / rate)} left")
        else:
            parts.append(duration(elapsed))
        if self._values:
            parts.append(format_values(self._values))
        print("  " + shown(", ".join(parts)), file=self._stream, flush=True)


class BarTracker(Tracker):
    """Draws a tqdm bar with rate and time left."""

    def __init__(self, stream: TextIO, total: int, label: str, unit: str) -> None:
        from tqdm import tqdm  # only a terminal needs it

        title, stream = f"  {shown_line(label)}", raw_stream(stream)
        self._bar = tqdm(total=total, desc=title, unit=f" {unit}", file=stream, dynamic_ncols=True, leave=True)

    def update(self, n: int = 1, **values: object) -> None:
        """Advance the bar by ``n`` units and show ``values`` after it."""
        if values:
            self._bar.set_postfix_str(shown_line(format_values(values)), refresh=False)
        self._bar.update(n)

    def line(self, text: str) -> None:
        """Write a line above the bar."""
        self._bar.write("  " + shown_line(text), file=self._bar.fp)

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.close()


class Board:
    """Holds a table within :meth:`Progress.board`; the base class shows nothing."""

    def show(self, headline: str, rows: Sequence[str] = (), *, is_news: bool = False) -> None:
        """Show a headline and, if there is room for a table, its rows.

        Args:
            headline: A one-line summary.
            rows: Lines of the table, its heading first.
            is_news: Whether to log the headline even if the last one is recent.
        """

    def leave(self) -> None:
        """Leave the table on the screen; the next one is drawn below it."""

    def __reduce__(self) -> tuple[type[Board], tuple[()]]:
        """A pickled board shows nothing: a stream belongs to its process (Ray pickles the scheduler, which has one)."""
        return Board, ()


class PlainBoard(Board):
    """Writes headlines: news immediately, others every few seconds."""

    def __init__(self, stream: TextIO, interval_s: float) -> None:
        self._stream, self._interval_s = stream, interval_s
        self._last = time.monotonic()

    def show(self, headline: str, rows: Sequence[str] = (), *, is_news: bool = False) -> None:
        """Write the headline if it is news or the last one is at least a few seconds old."""
        now = time.monotonic()
        if is_news or now - self._last >= self._interval_s:
            self._last = now
            print(f"  {shown(headline)}", file=self._stream, flush=True)


class LiveBoard(Board):
    """Draws the table in place on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = raw_stream(stream)
        self._height = 0

    def show(self, headline: str, rows: Sequence[str] = (), *, is_news: bool = False) -> None:
        """Draw over the previous table; lines are truncated to the terminal's width so that they do not wrap."""
        columns, lines_at_most = shutil.get_terminal_size()
        lines = [f"  {shown_line(line, columns)}"[: columns - 1] for line in (headline, *rows)][: lines_at_most - 1]
        up = f"\x1b[{self._height}A" if self._height else ""
        print(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J", end="", file=self._stream, flush=True)
        self._height = len(lines)

    def leave(self) -> None:
        """Draw the next table below the current one."""
        self._height = 0


class Progress:
    """Reports progress to the user.

    Args:
        stream: Where to write; default: the current ``sys.stderr``.
        interval_s: Minimum seconds between two plain lines of a tracker.
    """

    def __init__(self, stream: TextIO | None = None, *, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s = interval_s
        self._board = Board()
        self.tell: Callable[[str], None] | None = None  # also gets every line, e.g. the log of a run

    def stage(self, name: str, note: str = "") -> None:
        """Announce a stage, with a note such as ``already complete``."""
        self._print(f"== {name}" + (f": {note}" if note else ""))

    def say(self, text: str) -> None:
        """Write a line of information."""
        self._print(f"  {text}")

    def warn(self, text: str) -> None:
        """Write a warning."""
        self._print(f"  warning: {text}")

    @contextmanager
    def track(self, total: int, label: str, unit: str) -> Iterator[Tracker]:
        """Count work: ``with progress.track(10, "epoch 1", "steps") as tracker: tracker.update(1, loss=0.3)``.

        Args:
            total: Total units of work.
            label: What is being done.
            unit: What is counted, in the plural.
        """
        tracker = self._tracker(total, label, unit)
        try:
            yield tracker
        finally:
            tracker.close()

    def epoch(self, tracker: Tracker, text: str) -> None:
        """Write the line for a finished epoch, whatever else is shown."""
        tracker.line(text)
        self._tell(text)

    def board(self) -> Board:
        """Return a board: a table that is drawn in place on a terminal, headlines elsewhere."""
        live = self._stream.isatty()
        self._board = LiveBoard(self._stream) if live else PlainBoard(self._stream, self._interval_s)
        return self._board

    def _tracker(self, total: int, label: str, unit: str) -> Tracker:
        if self._stream.isatty():
            return BarTracker(self._stream, total, label, unit)
        return PlainTracker(self._stream, total, label, unit, self._interval_s)

    def _print(self, text: str) -> None:
        self._board.leave()
        print(shown(text), file=self._stream, flush=True)
        self._tell(text)

    def _tell(self, text: str) -> None:
        if self.tell is not None:
            self.tell(text)


class Silent(Progress):
    """Prints nothing; for tests and for callers with their own output."""

    def board(self) -> Board:
        """Return a board that shows nothing."""
        return Board()

    def _tracker(self, total: int, label: str, unit: str) -> Tracker:
        return Tracker()

    def _print(self, text: str) -> None:
        """Print nothing, but still pass the line to a log."""
        self._tell(text)
