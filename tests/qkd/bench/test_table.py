"""The table of `qkd bench`."""

from __future__ import annotations

import re

from export import Device, DeviceResult
from qkd.bench.table import BenchTable
from qkd.report.findings.terms import TERMS


def test_columns_are_explained_and_the_float_row_is_named():
    row = {"median_ms": 1.0, "to_float": 0.5, "agreement": 1.0, "input_shape": (4, 3, 8, 8), "threads": 2,
           "affinity": (1, 3), "rounds": 9, "warmup": 2}  # fmt: skip
    result = DeviceResult(Device(name="board", address="ssh://pi@board"))
    text = BenchTable([result], [{"models": {"teacher": row, "student": row}}], "teacher").to_text()
    head, first, second, told, terms = text.splitlines()
    assert told == "Times are for a batch of 4 images, with 2 threads on CPUs 1, 3: 9 rounds, after 2 for warm-up."
    assert {"vs. FP32", "agreement"} <= set(re.split(r"\s{2,}", head))
    assert re.split(r"\s{2,}", first)[:2] == ["board", "teacher (FP32)"] and "student" in second
    assert terms == TERMS["devices"] and "Vs. FP32: median latency divided by that of the FP32 file." in terms
    failed = DeviceResult(Device(name="board", address="ssh://pi@board"), failure="gone")
    assert TERMS["devices"] not in BenchTable([failed], [{"models": {}}]).to_text()
