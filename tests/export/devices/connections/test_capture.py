"""Foreign programs: bounded in time and output, and printable whatever they write."""

from __future__ import annotations

import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import DeviceError
from export.devices.connections.capture import OUTPUT_LIMIT, capture, printable


def python(text, **options):
    return capture([sys.executable, "-c", text], **{"timeout_s": 30.0, **options})


def test_output_and_exit_code():
    done = python("import sys; print('out'); print('talk', file=sys.stderr); sys.exit(3)")
    assert (done.code, done.stdout, done.stderr) == (3, b"out\n", "talk")


def test_stdin_is_fed_and_may_be_ignored():
    assert python("print(len(input()))", stdin=[b"x" * 10, b"\n"]).stdout == b"10\n"
    assert python("print('deaf')", stdin=[b"x" * (1 << 22)]).stdout == b"deaf\n"


def test_lines_of_stderr_are_heard_as_they_come():
    heard = []
    python("import sys; sys.stderr.write('one\\n\\x1b[2Jtwo\\n\\n'); sys.stderr.write('open end')", say=heard.append)
    assert heard == ["one", "two"]


def test_a_missing_program():
    with pytest.raises(DeviceError, match=r"cannot run /none/ssh: No such file or directory; install it"):
        capture(["/none/ssh"], timeout_s=1.0)


def test_time_is_bounded_and_children_are_killed(tmp_path):
    start = time.monotonic()
    child = "import time,sys; time.sleep(6); open(sys.argv[1], 'w')"
    text = (
        f"import subprocess, sys, time; print('waiting', file=sys.stderr, flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}, {str(tmp_path / 'alive')!r}]); time.sleep(60)"
    )
    with pytest.raises(DeviceError, match=r"no end within 2 s.*last output: waiting"):
        python(text, timeout_s=2.0)
    assert time.monotonic() - start < 8
    time.sleep(0.1)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_bounded(stream):
    start = time.monotonic()
    with pytest.raises(DeviceError, match=f"more than {OUTPUT_LIMIT:,} bytes to {stream}"):
        python(f"import sys\nwhile True: sys.{stream}.write('x' * 65536)")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words", "plain words"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x1bPq#0;2;0;0;0\x1b\\sixel", "sixel"),
        ("\x1b(Bset", "Bset"),
        ("bell\x07 back\x08\x08 cr\rlf\n tab\t", "bell back cr lf tab"),
        ("\x9b31mC1", "31mC1"),
        ("right\u202eleft\u2066", "right left"),
        ("zero\u200bwidth", "zero width"),
        ("grün 東京", "grün 東京"),
        ("\ufffd", "?"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@given(st.binary(max_size=300), st.integers(10, 60))
def test_whatever_is_written_becomes_one_printable_line(raw, limit):
    shown = printable(raw.decode("utf-8", "replace"), limit)
    assert shown.isprintable() and "\n" not in shown and len(shown) <= limit + 5


def test_long_text_keeps_both_ends_and_takes_no_time():
    start = time.monotonic()
    shown = printable("first " + "\x1b]" * 2_000_000 + " last")
    assert time.monotonic() - start < 2 and shown.startswith("first")
    assert printable("a" * 300 + "b" * 300, 100) == "a" * 50 + " ... " + "b" * 50


def test_a_file_that_cannot_be_read_ends_the_program_at_once():
    """A share that is gone in the middle of sending: the program would wait for the rest until its time is up."""

    def blocks():
        yield b"x"
        raise OSError(5, "Input/output error", "model.onnx")

    start = time.monotonic()
    for is_held in (False, True):
        with pytest.raises(OSError, match=r"Input/output error: 'model\.onnx'"):
            python("import sys; sys.stdin.read()", stdin=blocks(), timeout_s=20.0, holds_stdin=is_held)
    assert time.monotonic() - start < 10
