"""What the stages leave in a run folder, with known figures, and how its pages are read."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from qkd.report.page import RunRecord

EVIL = "<script>alert('x')</script>&\"|"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run(path: Path, *, net: str = "resnet8", is_equal: bool = True) -> Path:
    """Write what the stages leave, with known figures."""
    write(path / "teacher" / "result.json", {"role": "teacher", "net": "resnet8", "test_accuracy": 0.99})
    student = {"role": "student", "net": net, "test_accuracy": 0.97, "weight_bits": 2, "act_bits": 4}
    write(path / "student" / "result.json", student)
    if net != "resnet8":
        write(path / "student" / "float" / "result.json", {"role": "float", "net": net, "test_accuracy": 0.98})
    write(path / "export" / "export.json", {
        "teacher": {"size_bytes": 2_500_000},
        "student": {"size_bytes": 98_765, "fall_backs": [f"{EVIL} (silu) in float"]},
        "float": {"size_bytes": 400_000},
    })  # fmt: skip
    write(path / "export" / "parity.json", {
        "passed": is_equal, "images": 360, "runtime_version": "1.31",
        "off": {"top1_agreement": 1.0 if is_equal else 0.99, "differing": 0 if is_equal else 4},
        "on": {"top1_agreement": 0.9999, "differing": 1},
    })  # fmt: skip
    rows = [
        {"name": "conv1", "kind": "conv", "weight_bits": 8, "act_bits": 8, "code_min": -60, "code_max": 63,
         "range_low": -64, "range_high": 63, "parameters": 144, "macs": 9216, "parity_steps": 0},
        {"name": EVIL, "kind": "linear", "weight_bits": 2, "act_bits": 4, "code_min": -1, "code_max": 1,
         "range_low": -2, "range_high": 1, "parameters": 10, "macs": 10, "parity_steps": 2},
    ]  # fmt: skip
    write(path / "export" / "layers.json", {"layers": rows})
    write(path / "bench" / "local.json", {
        "machine": {"cpu": "a processor", "onnxruntime": "1.31"}, "threads": 1, "batch_size": 1,
        "rounds": 5, "warmup": 2,
        "models": {"student": {"median_ms": 0.1234, "p10_ms": 0.1, "p90_ms": 0.2, "size_bytes": 98_765},
                   "teacher": {"median_ms": 0.5, "p10_ms": 0.4, "p90_ms": 0.9, "size_bytes": 2_500_000}},
    })  # fmt: skip
    return path


class Page(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def record() -> RunRecord:
    line = {"phase": "all", "train_loss": 2.0, "train_accuracy": 0.5, "val_accuracy": 0.4}
    lines = [
        {**line, "epoch": epoch, "terms": {"cross_entropy": 1.0 / epoch, "soft_target": 3.0}} for epoch in (1, 2, 3)
    ]
    return RunRecord(
        metrics={"teacher": lines, "student": lines},
        agents={"student": f"file, schedule {EVIL}"},
        schedules={"teacher": {"Rotate": [0.2, 0.2, 0.8]}, "student": {EVIL: [0.5, 0.0, 1.0]}},
        config=f"name: {EVIL}",
        environment={"python": "3", "versions": {"torch": EVIL}},
    )


def make_devices(run: Path) -> Path:
    """Add a device that measured with a sample, and one that failed."""
    row = {"p10_ms": None, "p90_ms": 4.0, "p99_ms": 5.0, "peak_memory_bytes": 60_000_000, "agreement": 1.0}
    write(run / "bench" / "pi.json", {
        "device": "pi", "failure": None, "images": 256, "reference": "teacher", "models": {
            "student": {**row, "median_ms": 2.0, "size_bytes": 98_765, "accuracy": 0.97, "repacked": ["int8"]},
            "teacher": {**row, "median_ms": 8.0, "size_bytes": 2_500_000, "accuracy": 0.99, "notes": ["hot: " + EVIL]},
        },
    })  # fmt: skip
    write(run / "bench" / "board.json", {"device": "board", "failure": f"Connection refused {EVIL}", "models": {}})
    return run
