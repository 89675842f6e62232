"""Untrusted input: bounded file reads, and text sanitized before it reaches a terminal."""

from qkd.foreign.near import LONGEST_NAME, nearest
from qkd.foreign.opening import UnreadableFileError, is_regular, open_regular, read_regular, read_text
from qkd.foreign.shown import CleanStream, clean_output, raw_stream, shown, shown_line

__all__ = [
    "LONGEST_NAME",
    "CleanStream",
    "UnreadableFileError",
    "clean_output",
    "is_regular",
    "nearest",
    "open_regular",
    "raw_stream",
    "read_regular",
    "read_text",
    "shown",
    "shown_line",
]
