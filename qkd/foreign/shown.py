"""Show text from files, devices and command lines with control characters escaped, such as ``\\x1b``.

Everything the toolkit prints passes through here once: `clean_output` wraps every command. Code that draws on the
terminal itself (bars, boards) gets the :func:`raw_stream` and cleans its own text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# C0 but for tab and newline, DEL, C1 (a terminal may take 0x9b for ESC [), line and paragraph separators, what turns
# the direction of writing, and halves of surrogate pairs, which no encoding takes
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile("[\t\n]")


def shown(text: str) -> str:
    r"""Return text with control characters escaped as ``\x1b``, ``\u202e``; tabs and newlines are kept.

    Args:
        text: Any.

    Returns:
        The text without control characters but tab and newline.
    """
    return _CONTROL.sub(_written_out, text)


def shown_line(text: str, limit: int = 200) -> str:
    r"""Return text as one line, with newlines escaped, too.

    Args:
        text: Any.
        limit: Maximum length in characters, at least 3.

    Returns:
        The line; if it was longer, it ends with ``...``.
    """
    line = _BREAKS.sub(_written_out, shown(text[: limit + 1]))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _written_out(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


class CleanStream:
    """A text stream that escapes control characters, and characters that its encoding lacks.

    Args:
        stream: Where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream

    def write(self, text: str) -> int:
        """Write text, cleaned; return how many characters were given."""
        clean, encoding = shown(text), getattr(self.raw, "encoding", None)
        if encoding:
            clean = clean.encode(encoding, "backslashreplace").decode(encoding)
        self.raw.write(clean)
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """Write several texts, cleaned."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw_stream(stream: TextIO) -> TextIO:
    """Return the stream behind a clean one, for what moves the cursor.

    Args:
        stream: Clean or not.

    Returns:
        The stream behind it; a stream that is not clean is returned unchanged.
    """
    return stream.raw if isinstance(stream, CleanStream) else stream


@contextmanager
def clean_output() -> Iterator[None]:
    """Let only clean text through stdout and stderr while the context is open.

    Yields:
        Nothing.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", CleanStream(raw_stream(stream))) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
