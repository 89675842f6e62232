"""Progress: plain lines in a log, a bar on a terminal, silence on demand."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from qkd.progress import Board, LiveBoard, PlainBoard, Progress, Silent, Tracker, duration, format_values


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("qkd.progress.time.monotonic", lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05"), (-3, "0 s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_values_have_four_digits() -> None:
    assert format_values({"loss": 0.123456, "lr": 1e-5, "step": 7}) == "loss 0.1235, lr 1e-05, step 7"


def test_plain_lines_come_at_intervals_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with Progress(stream, interval_s=5.0).track(50, "epoch 1", "steps") as tracker:
        for _ in range(50):
            clock.now += 0.25
            tracker.update(1, loss=0.5)
    assert stream.getvalue().splitlines() == [
        "  epoch 1: 20/50 steps, 4 steps/s, 8 s left, loss 0.5",
        "  epoch 1: 40/50 steps, 4 steps/s, 2 s left, loss 0.5",
        "  epoch 1: 50/50 steps, 4 steps/s, 12 s, loss 0.5",
    ]


def test_the_closing_line_is_not_written_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    with Progress(stream, interval_s=5.0).track(50, "epoch 1", "steps") as tracker:
        clock.now += 6
        tracker.update(50, loss=0.5)
        tracker.update(0, loss=0.5)
    assert stream.getvalue().count("50/50") == 1


def test_an_interrupted_tracker_still_says_where_it_was() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(stream).track(3, "work", "parts") as tracker:
        tracker.update(1)
        raise KeyboardInterrupt
    assert "work: 1/3 parts" in stream.getvalue()


def test_a_terminal_gets_a_bar_with_rate() -> None:
    stream = Terminal()
    with Progress(stream).track(4, "epoch 1", "steps") as tracker:
        for _ in range(4):
            tracker.update(1, loss=0.25)
    text = stream.getvalue()
    assert "epoch 1" in text and "4/4" in text and "steps/s" in text and "loss 0.25" in text


def test_talk_goes_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.stage("teacher", "already complete")
    progress.stage("search")
    progress.say("hello")
    progress.warn("careful")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["== teacher: already complete", "== search", "  hello", "  warning: careful"]


def test_silent_says_nothing() -> None:
    stream = io.StringIO()
    progress = Silent(stream)
    progress.say("x")
    progress.warn("x")
    progress.stage("x")
    with progress.track(1, "x", "y") as tracker:
        tracker.update(1, loss=1.0)
        assert type(tracker) is Tracker
    assert stream.getvalue() == ""


def test_a_board_on_a_terminal_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkd.progress.shutil.get_terminal_size", lambda: (20, 10))
    stream = Terminal()
    progress = Progress(stream)
    board = progress.board()
    board.show("round 1", ["a", "b" * 40])
    first = stream.getvalue()
    assert "\x1b[3A" not in first and "b" * 17 in first and "b" * 18 not in first  # cut: every line takes one
    board.show("round 2", ["a"])
    assert stream.getvalue()[len(first) :].startswith("\x1b[3A\x1b[2K  round 2\n")  # over all three lines
    progress.say("a line of talk")
    board.show("round 3")
    assert stream.getvalue().endswith("a line of talk\n\x1b[2K  round 3\n\x1b[J")  # below it, not over it


def test_a_board_in_a_log_writes_news_and_now_and_then_a_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    board = Progress(stream, interval_s=5.0).board()
    for second in range(12):
        clock.now = 100.0 + second
        board.show(f"turn {second}", ["a table"], is_news=second == 1)
    assert stream.getvalue().splitlines() == ["  turn 1", "  turn 6", "  turn 11"]
    Silent(stream).board().show("nothing", is_news=True)
    assert "nothing" not in stream.getvalue()


@pytest.mark.parametrize("make", [lambda stream: PlainBoard(stream, 0.0), LiveBoard], ids=["plain", "live"])
def test_a_board_can_be_pickled_without_its_stream(make: Callable[[TextIO], Board], tmp_path: Path) -> None:
    """Ray pickles the scheduler of a search, which has the board; a file opened for writing cannot be pickled."""
    with (tmp_path / "log.txt").open("w") as stream:
        copied = pickle.loads(pickle.dumps(make(stream)))  # noqa: S301 - our own
        copied.show("1 of 2", is_news=True)
    assert type(copied) is Board and not (tmp_path / "log.txt").read_text()
