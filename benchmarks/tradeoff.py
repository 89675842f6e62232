"""Measures accuracy and latency of one net in FP32, int8, W4A4 and W2A2, and draws the picture in the README.

    python benchmarks/tradeoff.py train data.name=npz data.path=FOLDER     # the runs, from configs/fashion-mnist/
    python benchmarks/tradeoff.py measure                                  # -> benchmarks/results/tradeoff.json
    python benchmarks/tradeoff.py draw                                     # -> docs/tradeoff.svg, from that file alone

`train` runs configs/fashion-mnist/w2a2.yaml and, with the same teacher, w4a4.yaml up to their exported files; words
`key.path=value` are passed on to both. Existing runs are not trained again. `measure` scores every file on the whole
test set and times it: batch 1, one thread, all files interleaved in random order, medians of CPU time. First, outputs
with the low-bit provider are compared with those without it; they must be identical on every test image.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stage_runs import environment, public, run_stages

from qkd.cli.options.values import output_file, positive

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tradeoff.json"
PICTURE = ROOT / "docs" / "tradeoff.svg"
WIDTHS = ("w4a4", "w2a2")
CPU = ["CPUExecutionProvider"]
FP32, INT8 = "FP32 (teacher)", "int8 (onnxruntime, static)"
COLORS = {FP32: "#8a8f98", INT8: "#c2571a", "W4A4": "#2f6fb4", "W2A2": "#1d7a53"}
SCORED_AT_ONCE = 500  # images


def train(runs: Path, words: list[str]) -> None:
    """Train the teacher and both students and export them; complete runs are skipped."""
    runs.mkdir(parents=True, exist_ok=True)
    for bits in reversed(WIDTHS):
        own = [] if bits == "w2a2" else [f"teacher.run={runs / 'w2a2'}"]
        config = ROOT / "configs" / "fashion-mnist" / f"{bits}.yaml"
        why = run_stages(str(config), bits, [*words, *own], runs, until="export")
        if why:
            raise SystemExit(f"{bits}: {why}")
    (runs / "words.json").write_text(json.dumps(public(words)))


def measure(runs: Path, rounds: int) -> dict[str, Any]:
    """Return one row per file, and another for each that the low-bit provider runs part of."""
    images = _images(runs / "w2a2")
    with tempfile.TemporaryDirectory() as place:
        files = _files(runs, images["train"], Path(place))
        sessions = {name: _session(path, CPU) for name, path in files.items()}
        provided = _provided(files)
        rows = {name: {"bytes": path.stat().st_size} for name, path in files.items()}
        outputs = {name: _outputs(session, images["test"]) for name, session in sessions.items()}
        for name, session in provided.items():
            if not np.array_equal(outputs[name], _outputs(session, images["test"])):
                raise SystemExit(f"{name}: outputs differ with the low-bit provider")
            rows[f"{name}, low-bit provider"] = dict(rows[name])
            outputs[f"{name}, low-bit provider"] = outputs[name]
            sessions[f"{name}, low-bit provider"] = session
        times = _interleaved(sessions, images["test"][:1], rounds)
    for name, row in rows.items():
        row["accuracy"] = round(float((outputs[name].argmax(1) == images["labels"]).mean()), 4)
        row["median_ms"] = round(float(np.median(times[name])), 4)
        row["min_ms"] = round(float(times[name].min()), 4)
    return {
        "what": "ResNet-20 on Fashion-MNIST: accuracy on all test images; latency at batch 1, one thread",
        "commands": ["python benchmarks/tradeoff.py train", "python benchmarks/tradeoff.py measure"],
        "overrides": json.loads((runs / "words.json").read_text()), "images": len(images["labels"]),
        "rounds": rounds, "rows": rows, "environment": environment(),
    }  # fmt: skip


def _images(run: Path) -> dict[str, Any]:
    """Return normalized test images with labels, and training images to calibrate int8 with."""
    import qkd
    from qkd.data import normalize

    splits = qkd.load_run(run).images()
    test, labels = splits.test.batch(torch.arange(len(splits.test)), "cpu")
    chosen, _ = splits.train.batch(torch.arange(256), "cpu")
    found = {
        name: normalize(part, splits.mean, splits.std).numpy() for name, part in (("test", test), ("train", chosen))
    }
    return {**found, "labels": labels.numpy()}


def _files(runs: Path, calibration: Any, folder: Path) -> dict[str, Path]:
    from export import export_int8_baseline

    teacher = runs / "w2a2" / "export" / "teacher.onnx"
    export_int8_baseline(teacher, calibration, folder / "int8.onnx")
    students = {bits.upper(): runs / bits / "export" / "student.onnx" for bits in WIDTHS}
    return {FP32: teacher, INT8: folder / "int8.onnx", **students}


def _provided(files: Mapping[str, Path]) -> dict[str, Any]:
    """Return sessions of students with the provider if it helps on this processor."""
    from export import lowbit

    if not lowbit.availability().is_offered:
        return {}
    return {"W2A2": _session(files["W2A2"], lowbit.providers())}


def _session(path: Path, providers: list[str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)


def _outputs(session: Any, images: Any) -> Any:
    name = session.get_inputs()[0].name
    parts = [images[start : start + SCORED_AT_ONCE] for start in range(0, len(images), SCORED_AT_ONCE)]
    return np.concatenate([session.run(None, {name: part})[0] for part in parts])


def _interleaved(sessions: Mapping[str, Any], image: Any, rounds: int) -> dict[str, Any]:
    """Return milliseconds of CPU time for each session; each round has a random order."""
    names = list(sessions)
    feeds = {name: {sessions[name].get_inputs()[0].name: image} for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-5, rounds):
        for place in np.random.default_rng(number + 5).permutation(len(names)):
            start = time.thread_time()
            sessions[names[place]].run(None, feeds[names[place]])
            if number >= 0:
                times[names[place]].append(1e3 * (time.thread_time() - start))
    return {name: np.array(taken) for name, taken in times.items()}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write the picture: accuracy against latency, one dot per row, with the area showing the file size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "qkd", "font.family": "sans-serif", "font.size": 11}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(7.6, 3.9), facecolor="white")
        for name, row in found["rows"].items():
            _dot(axes, name, row)
        slowest = max(row["median_ms"] for row in found["rows"].values())
        scores = [100 * row["accuracy"] for row in found["rows"].values()]
        axes.set(xlim=(0, 1.12 * slowest), ylim=(min(scores) - 1.2, max(scores) + 1.2))
        axes.set_xlabel("latency of one image in ms (batch 1, one thread)  ← better")
        axes.set_ylabel("test accuracy in %  better →")
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        cpu = found["environment"]["cpu"]
        axes.set_title(f"ResNet-20 on Fashion-MNIST, {cpu}; area of a dot: size of the file", fontsize=11)
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n")


def _dot(axes: Any, name: str, row: Mapping[str, Any]) -> None:
    base = name.partition(", low-bit")[0]
    x, y = row["median_ms"], 100 * row["accuracy"]
    is_plain_twin = base == "W2A2" and name == base  # the same file without the provider
    face = "none" if is_plain_twin else COLORS[base]
    axes.scatter([x], [y], s=row["bytes"] / 1500, facecolors=face, edgecolors=COLORS[base], linewidths=1.6)
    words = f"{name}\n{row['bytes'] / 1000:,.0f} kB, {x:.2f} ms"
    side = "right" if base in (FP32, INT8) else "left"
    above = base == "W4A4" or "provider" in name
    axes.annotate(
        words, (x, y), (-18 if side == "right" else 12, 8 if above else -26), textcoords="offset points", ha=side,
        fontsize=9, color=COLORS[base],
    )  # fmt: skip


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "measure", "draw"])
    parser.add_argument("words", nargs="*", help="train: key.path=value for both runs")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/tradeoff"))
    parser.add_argument("--json", type=output_file(".json"), default=RESULT)
    parser.add_argument("--svg", type=Path, default=PICTURE)
    parser.add_argument("--rounds", type=positive, default=1000)
    options = parser.parse_intermixed_args()
    if options.part == "train":
        train(options.runs_dir, options.words)
    elif options.part == "measure":
        options.json.write_text(json.dumps(measure(options.runs_dir, options.rounds), indent=1) + "\n")
    else:
        draw(json.loads(options.json.read_text()), options.svg)


if __name__ == "__main__":
    main()
