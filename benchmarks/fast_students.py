"""Trains students of the preset `fast` and default ones, and measures both with the low-bit execution provider.

    python benchmarks/fast_students.py accuracy --json benchmarks/results/fast_students.json \
        data.name=npz data.path=FOLDER
    python benchmarks/fast_students.py latency --json benchmarks/results/fast_students.json
    python benchmarks/fast_students.py tables --json benchmarks/results/fast_students.json     # those of the docs

`accuracy` distills W2A2 students of ResNet-20 on Fashion-MNIST: one teacher, then one student per variant and seed,
each from that teacher's weights. Every student reads the test images once, at the end of its last epoch. Words
`key.path=value` are passed on to every run; existing runs are not trained again.

`latency` measures untrained students of each shape, all variants of a shape interleaved on one thread, next to FP32 and
static int8: weights affect a kernel's time only through where its sums are widened. First, the outputs of a student
with the provider are compared with those without it. `LOWBIT_ISA=avx2` measures other kernels. Each part keeps the
other part's results in the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stage_runs import environment, environment_of, public, run_stages, runs_in, spread

from qkd.cli.options.values import output_file, positive

CPU = "CPUExecutionProvider"
ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "fashion-mnist" / "w2a2.yaml"
BUDGET = ("data.train_limit=10000", "teacher.train.epochs=6", "student.train.epochs=2")
# Differences from QuantSpec(weight_bits=2, act_bits=2).
VARIANTS: dict[str, dict[str, int]] = {
    "default": {},
    "sums of 4 bits": {"sum_bits": 4},
    "sums of 2 bits": {"sum_bits": 2},
    "first layer of 4 bits": {"first_bits": 4},
    "sums and first layer of 4 bits": {"sum_bits": 4, "first_bits": 4},
    "sums and first layer of 2 bits": {"sum_bits": 2, "first_bits": 2},
}
TRAINED = ("default", "sums of 2 bits", "sums of 4 bits")
SHAPES = {  # title -> net, classes, channels, pixels
    "ResNet-20, 28x28x1": ("resnet20", 10, 1, 28),
    "ResNet-20, 32x32x3": ("resnet20", 10, 3, 32),
    "ResNet-18 for 32x32x3": ("resnet18_cifar", 10, 3, 32),
    "ResNet-18, 224x224x3": ("torchvision/resnet18", 1000, 3, 224),
}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train the teacher and all students, and return their accuracies."""
    folder: Path = options.runs_dir
    folder.mkdir(parents=True, exist_ok=True)
    words = [*BUDGET, *options.words]
    why = run_stages(str(CONFIG), "teacher", ["seed=0", *words], folder, until="teacher")
    if why:
        return {"failed": why}
    rows = [_student(name, seed, folder, words) for seed in options.seeds for name in options.variants]
    teacher = _accuracy(folder / "teacher" / "teacher")
    summary = {
        name: spread([row["accuracy"] for row in rows if row["variant"] == name and "accuracy" in row])
        for name in options.variants
    }
    return {
        "config": str(CONFIG.relative_to(ROOT)), "overrides": public(words), "teacher_accuracy": teacher,
        "summary": summary, "rows": rows, "environment": environment_of(runs_in(folder)),
    }  # fmt: skip


def _student(name: str, seed: int, folder: Path, words: list[str]) -> dict[str, Any]:
    title = f"{name.replace(' ', '-')}-seed{seed}"
    quant = [f"student.quant.{key}={value}" for key, value in VARIANTS[name].items()]
    own = [f"seed={seed}", f"teacher.run={folder / 'teacher'}", *words, *quant]
    why = run_stages(str(CONFIG), title, own, folder, until="distill")
    row = {"variant": name, "seed": seed}
    if why:
        return {**row, "failed": why}
    found = {**row, "accuracy": _accuracy(folder / title / "student")}
    print(f"{name}, seed {seed}: {found['accuracy']:.4f}", flush=True)
    return found


def _accuracy(folder: Path) -> float:
    return float(json.loads((folder / "result.json").read_text())["test_accuracy"])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the variants of every shape."""
    from export import lowbit

    torch.set_num_threads(1)
    lowbit.register()
    rows = [row for title in options.shapes for row in _measure_shape(title, options.rounds)]
    found = {"kernels": lowbit.availability().kernels, "rounds": options.rounds, "rows": rows}
    return {**found, "environment": environment()}


def _measure_shape(title: str, rounds: int) -> list[dict[str, Any]]:
    from export import lowbit

    with tempfile.TemporaryDirectory() as place:
        files = _write(title, Path(place))
        sessions = {name: _session(path, [CPU]) for name, path in files.items()}
        under = {name: _session(files[name], lowbit.providers()) for name in VARIANTS}
        _, _, channels, pixels = SHAPES[title]
        image = np.random.default_rng(2).normal(size=(1, channels, pixels, pixels)).astype(np.float32)
        for name, session in under.items():
            if not np.array_equal(_run(session, image), _run(sessions[name], image)):
                raise SystemExit(f"{title}, {name}: outputs differ with the provider")
        measured = {"FP32": sessions["FP32"], "static int8": sessions["static int8"], **under}
        times = _interleaved(list(measured.values()), image, rounds)
        sizes = {name: files[name].stat().st_size for name in measured}
    int8 = times[list(measured).index("static int8")]
    rows = []
    for name, taken in zip(measured, times, strict=True):
        row = {"shape": title, "variant": name, "ms": round(float(taken.min()), 4), "bytes": sizes[name]}
        row |= {"median_ms": round(float(np.median(taken)), 4), "to_int8": round(float(taken.min() / int8.min()), 3)}
        rows.append({**row, "median_to_int8": round(float(np.median(taken) / np.median(int8)), 3)})
        print(" ".join(f"{value}" for value in rows[-1].values()), flush=True)
    return rows


def _write(title: str, folder: Path) -> dict[str, Path]:
    """Write FP32, static int8 and every variant of an untrained net."""
    from export import export_float, export_int8_baseline, export_onnx
    from qkd.nets import build_net
    from quantizers import QuantSpec, calibrate, prepare, settle

    name, classes, channels, size = SHAPES[title]
    torch.manual_seed(0)
    images = torch.randn(8, channels, size, size)
    net = build_net(name, classes=classes, channels=channels, image_size=size).train()
    with torch.no_grad():
        net(images)  # running statistics
    files = {"FP32": folder / "fp32.onnx", "static int8": folder / "int8.onnx"}
    export_float(net.eval(), images[:1], files["FP32"])
    export_int8_baseline(files["FP32"], images.numpy(), files["static int8"])
    for number, (variant, changes) in enumerate(VARIANTS.items()):
        student = prepare(net, QuantSpec(**{"weight_bits": 2, "act_bits": 2, **changes}), images[:1])
        calibrate(student, [images])
        settle(student)
        files[variant] = export_onnx(student.eval(), images[:1], folder / f"{number}.onnx").path
    return files


def _session(path: Path, providers: list[str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)


def _run(session: Any, image: Any) -> Any:
    return session.run(None, {session.get_inputs()[0].name: image})[0]


def _interleaved(sessions: list[Any], image: Any, rounds: int) -> Any:
    """Return milliseconds of processor time ``[sessions, rounds]``.

    Each round has a random order: a session that always ran after FP32 would always find its weights out of the cache.
    """
    feeds = [{session.get_inputs()[0].name: image} for session in sessions]
    times = np.empty((len(sessions), rounds))
    for number in range(-2, rounds):
        for place in np.random.default_rng(number + 2).permutation(len(sessions)):
            start = time.thread_time()
            sessions[place].run(None, feeds[place])
            times[place, max(number, 0)] = (time.thread_time() - start) * 1e3
    return times


def latency_table(found: dict[str, Any]) -> str:
    """Return the latencies as Markdown: medians relative to static int8, minima in parentheses.

    Args:
        found: The part ``latency`` of a result file.
    """
    shapes = list(dict.fromkeys(row["shape"] for row in found["rows"]))
    cells = {(row["variant"], row["shape"]): row for row in found["rows"]}
    lines = [["variant", *shapes], ["---"] * (len(shapes) + 1)]
    for name in ("FP32", *VARIANTS):
        rows = [cells[name, shape] for shape in shapes]
        int8 = [cells["static int8", shape] for shape in shapes]  # from times: stored ratios are rounded already
        ratios = [[row[key] / one[key] for key in ("median_ms", "ms")] for row, one in zip(rows, int8, strict=True)]
        figures = [f"{median:.2f} ({least:.2f})" for median, least in ratios]
        lines.append(["preset `fast`" if name == "default" else name, *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(found: dict[str, Any]) -> str:
    """Return the accuracies as Markdown: mean and standard deviation over the seeds, and each seed's accuracy.

    Args:
        found: The part ``accuracy`` of a result file.
    """
    lines = ["| variant | accuracy | seed by seed |", "|---|---|---|"]
    for name, summary in found["summary"].items():
        each = ", ".join(f"{row['accuracy']:.2%}" for row in found["rows"] if row["variant"] == name)
        title = "preset `fast`" if name == "default" else name
        lines.append(f"| {title} | {100 * summary['mean']:.1f} ± {100 * summary['stdev']:.1f} % | {each} |")
    return "\n".join(lines)


def main() -> None:
    """Run one part and add it to the file, or print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["accuracy", "latency", "tables"])
    parser.add_argument("words", nargs="*", help="key.path=value for every training")
    parser.add_argument("--json", type=output_file(".json"))
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/fast-students"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(TRAINED), choices=list(VARIANTS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=positive, default=100)
    options = parser.parse_intermixed_args()
    if options.part == "tables":
        known = json.loads(options.json.read_text())
        parts = {"latency": latency_table, "accuracy": accuracy_table}
        print("\n\n".join(table(known[part]) for part, table in parts.items() if part in known))
        return
    found = train(options) if options.part == "accuracy" else measure(options)
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps({**known, options.part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
