r"""Control characters are written out (``\x1b``) before a terminal gets them."""

from __future__ import annotations

import io
import sys

import pytest

from qkd.cli import main
from qkd.foreign import CleanStream, clean_output, raw_stream, shown, shown_line
from qkd.progress import Progress

NASTY = "\x1b[2J\x1b]0;owned\x07 \x9b31m \x00 \r \u202e \udc80 \x7f"


def test_control_characters_are_written_out_once() -> None:
    assert shown("a\x1b[31m\tb\n\x9b\u202e\ud800") == "a\\x1b[31m\tb\n\\x9b\\u202e\\ud800"
    assert shown(shown(NASTY)) == shown(NASTY) and shown("äöü 日本 ✓ \\x1b") == "äöü 日本 ✓ \\x1b"
    assert shown_line("a\nb\x1b") == "a\\x0ab\\x1b" and len(shown_line("x" * 10_000)) == 200


def test_a_clean_stream_writes_what_its_encoding_has() -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    stream = CleanStream(raw)
    assert stream.write("ä\x1b") == 2 and stream.encoding == "ascii" and raw_stream(stream) is raw  # type: ignore[arg-type]
    stream.writelines(iter(["\ud800\n"]))
    assert raw.buffer.getvalue() == b"\\xe4\\x1b\\ud800\n"  # type: ignore[attr-defined]


def test_all_that_a_command_prints_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    with clean_output(), clean_output():
        print(NASTY, NASTY, file=sys.stderr)
        print(NASTY)
    assert not isinstance(sys.stdout, CleanStream)
    for argv in (["validate", f"no{NASTY.replace(chr(0), '')}.yaml"], ["validate", "digits/w2a2", f"a{NASTY}=1"],
                 ["cost", f"{NASTY.replace(chr(0), '')}.onnx"]):  # fmt: skip
        assert main(argv) == 2
    with pytest.raises(SystemExit) as caught:
        main([NASTY])
    assert caught.value.code == 2
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "\\x1b[2J" in text or text is said.out
        assert not any(letter in text for letter in NASTY.replace(" ", "") if not letter.isprintable())


def test_progress_is_clean_whatever_it_is_given() -> None:
    stream = io.StringIO()
    progress = Progress(stream, interval_s=0)
    progress.say(NASTY)
    progress.warn(NASTY)
    progress.stage(NASTY, NASTY)
    with progress.track(2, NASTY, "images") as tracker:
        tracker.update(1, loss=NASTY)
    progress.board().show(NASTY, is_news=True)
    assert "\x1b" not in stream.getvalue() and stream.getvalue().count("\\x1b[2J") >= 6
