"""Figures with their units."""

from __future__ import annotations

import pytest

from qkd.units import bytes_text, counted, megabytes, milliseconds, percent, times_as_many


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (counted(1, "thread"), "1 thread"),
        (counted(0, "thread"), "0 threads"),
        (counted(1024, "image"), "1,024 images"),
        (counted("?", "round"), "? rounds"),
        (counted(1, "batch", "batches"), "1 batch"),
        (counted(2, "batch", "batches"), "2 batches"),
        (times_as_many(1.0), "just as many"),
        (times_as_many(1.001), "just as many"),
        (times_as_many(2.784), "2.78 times as many"),
        (percent(0.99999), "99.99 %"),
        (percent(1.0), "100.00 %"),
        (percent(None), "-"),
        (megabytes(999_949), "999.9 kB"),
        (megabytes(1_000_000), "1.00 MB"),
        (bytes_text(9_999), "9,999 B"),
        (bytes_text(10_000), "10.0 kB"),
        (milliseconds(0.070812), "0.0708 ms"),
        (milliseconds(None), "-"),
    ],
)
def test_figures(shown: str, text: str) -> None:
    assert shown == text
