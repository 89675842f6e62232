"""Measures students with the low-bit execution provider, next to the same file without it, static int8 and FP32.

    python benchmarks/lowbit.py --json benchmarks/results/lowbit_avx512.json
    python benchmarks/lowbit.py --nets resnet18 --widths w3a3 w2a4 --json benchmarks/results/lowbit_avx512.json --append
    python benchmarks/lowbit.py --nets resnet18 --threads 2 --json benchmarks/results/lowbit_avx512.json --append
    python benchmarks/lowbit.py --nets resnet18 --threads 1 2 --rounds 60 --json benchmarks/results/lowbit_threads.json
    python benchmarks/lowbit.py --int8-isa avx2 --nets resnet18 --widths w2a2 w2a4 w3a3 w4a4 \\
        --json benchmarks/results/lowbit_avx2.json
    python benchmarks/lowbit.py --json benchmarks/results/lowbit_amx.json      # on a processor with AMX
    python benchmarks/lowbit.py --nets resnet18 --rounds 100 --profile
    LOWBIT_ISA=avx2 python benchmarks/lowbit.py --nets resnet18       # other kernels; int8 still uses all it has

``--int8-isa avx2`` measures a processor without AVX-512 and VNNI: our AVX2 kernels, and a copy of the runtime that does
not detect more (`restricted_runtime.py`).

Batch 1. The four variants of a net take turns in one run, so that other load on the machine affects them all; ratios
are of minima and of medians. With one thread, time is the thread's own CPU time; with several, wall time. Nets are
untrained, because weights affect a kernel's time only through where its sums are widened; logits with and without the
provider are still compared on every image.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stage_runs import changed_setup
from torch import nn

from qkd.cli.options.values import output_file, positive

SIZES = {"resnet20": 32}  # pixels; 224 for the others
CLASSES = {"resnet20": 10}
NETS = ("resnet18", "resnet50", "vgg11_bn", "googlenet", "resnet20", "mobilenet_v2")
VARIANTS = ("fp32", "int8", "plain", "provider")
IMAGES, CREATIONS = 8, 5


def build(name: str, size: int) -> nn.Module:
    """Return an untrained net with running statistics, in evaluation mode."""
    from qkd.nets import build_net

    torch.manual_seed(0)
    known = name if name == "resnet20" else f"torchvision/{name}"
    net = build_net(known, classes=CLASSES.get(name, 1000), channels=3, image_size=size).train()
    with torch.no_grad():
        net(torch.randn(8, 3, size, size))
    return net.eval()


def write_files(name: str, size: int, bits: tuple[int, int], flavor: str, folder: Path) -> dict[str, Path]:
    """Write the float file, its static int8 and the student; existing files are kept."""
    from export import export_float, export_int8_baseline, export_onnx
    from quantizers import QuantSpec, calibrate, prepare, settle

    stem = f"{name}-{size}"
    student = f"{stem}-w{bits[0]}a{bits[1]}-{flavor}.onnx"
    paths = {"fp32": folder / f"{stem}.onnx", "int8": folder / f"{stem}-int8.onnx", "student": folder / student}
    if all(path.exists() for path in paths.values()):
        return paths
    net, images = build(name, size), torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(1))
    export_float(net, images[:1], paths["fp32"])
    export_int8_baseline(paths["fp32"], images.numpy(), paths["int8"])
    model = prepare(net, QuantSpec(weight_bits=bits[0], act_bits=bits[1]), example_inputs=images[:1])
    calibrate(model, [images])
    settle(model)
    export_onnx(model.eval(), images[:1], paths["student"], flavor=flavor)
    return paths


def open_session(path: Path, providers: list[str], threads: int) -> Any:
    """Return a session on ``threads`` threads that do not spin."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)


def in_turns(calls: list[Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> npt.NDArray[np.float64]:
    """Return milliseconds ``[calls, rounds]``, after two warm-up rounds."""
    for call in calls * 2:
        call()
    times = np.empty((len(calls), rounds))
    for turn in range(rounds):
        for place, call in enumerate(calls):
            start = clock()
            call()
            times[place, turn] = (clock() - start) * 1e3
    return times


def create(files: dict[str, Path], threads: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Return a session of each variant, and the least milliseconds of CPU time to create one."""
    from export import lowbit

    cpu, ours = ["CPUExecutionProvider"], [lowbit.register(), "CPUExecutionProvider"]
    sessions, created = {}, dict.fromkeys(VARIANTS, float("inf"))
    for _ in range(CREATIONS):
        for variant in VARIANTS:
            path = files.get(variant, files["student"])
            start = time.thread_time()
            sessions[variant] = open_session(path, ours if variant == "provider" else cpu, threads)
            created[variant] = min(created[variant], (time.thread_time() - start) * 1e3)
    return sessions, created


def measure(
    name: str, bits: tuple[int, int], threads: int, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Measure a net at one width."""
    size = options.size or SIZES.get(name, 224)
    sessions, created = create(write_files(name, size, bits, options.flavor, folder), threads)
    images = np.random.default_rng(2).normal(size=(IMAGES, 3, size, size)).astype(np.float32)

    def run(variant: str, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        session = sessions[variant]
        (answer,) = session.run(None, {session.get_inputs()[0].name: image})
        return np.asarray(answer)

    identical = all(
        np.array_equal(run("plain", images[i : i + 1]), run("provider", images[i : i + 1])) for i in range(IMAGES)
    )
    clock = time.thread_time if threads == 1 else time.perf_counter
    calls = [lambda variant=variant: run(variant, images[:1]) for variant in VARIANTS]
    times = in_turns(calls, options.rounds, clock)
    least, median = (
        dict(zip(VARIANTS, times.min(1), strict=True)),
        dict(zip(VARIANTS, np.median(times, 1), strict=True)),
    )
    found = {
        "net": name,
        "size": size,
        "bits": bits,
        "threads": threads,
        "identical": identical,
        "ms": {variant: round(float(least[variant]), 3) for variant in VARIANTS},
        "median_ms": {variant: round(float(median[variant]), 3) for variant in VARIANTS},
        "ratios": {
            other: [round(float(one["provider"] / one[other]), 3) for one in (least, median)] for other in VARIANTS[:3]
        },
        "creation": round(created["provider"] / created["plain"], 2),
    }
    sessions.clear()
    gc.collect()  # profiles are written when the provider's nodes are destroyed
    return found


def read_profile(path: Path) -> list[dict[str, Any]]:
    """Return the operations of all regions of the last session, with times in microseconds."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return [
        {"region": place, "name": op["name"], "kind": op["kind"], "us": round(op["nanoseconds"] / 1e3, 1)}
        for place, line in enumerate(lines)
        for op in line["operations"]
        if op["nanoseconds"] < 2**62  # an operation that was run
    ]


def processor() -> dict[str, Any]:
    """Return a description of the processor."""
    import onnxruntime

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    told = {key.strip(): value.strip() for key, value in lines.items()}
    flags = [
        flag
        for flag in told.get("flags", told.get("Features", "")).split()
        if flag.startswith(("avx", "amx", "fma", "asimd"))
    ]
    return {
        "machine": platform.machine(),
        "model": told.get("model name", "?"),
        "family": [told.get("cpu family", "?"), told.get("model", "?")],
        "flags": flags,
        "onnxruntime": onnxruntime.__version__,
    }


def line_of(row: dict[str, Any]) -> str:
    """Return a net's row in readable form."""
    ratios = "  ".join(f"/{other} {least:.3f} ({median:.3f})" for other, (least, median) in row["ratios"].items())
    what = f"{row['net']:13}w{row['bits'][0]}a{row['bits'][1]} x{row['threads']}{row['ms']['provider']:8.2f} ms"
    same = "identical" if row["identical"] else "DIFFERENT"
    return f"{what}  {ratios}  creation {row['creation']:.2f}  {same}"


TITLES = {
    "resnet18": "ResNet-18", "resnet50": "ResNet-50", "vgg11_bn": "VGG-11", "googlenet": "GoogLeNet",
    "mobilenet_v2": "MobileNetV2", "resnet20": "ResNet-20",
}  # fmt: skip


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the rows of a JSON file as the table of docs/lowbit.md."""
    lines = [
        "| network | to static int8 | to the same file on the CPU provider | to FP32 | session creation |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        what = f"{TITLES[row['net']]}, {row['size']}, W{row['bits'][0]}A{row['bits'][1]}"
        what += "" if row["threads"] == 1 else f", {row['threads']} threads (wall time)"
        times = row["ms"], row["median_ms"]  # not the stored ratios, which are rounded already
        int8, plain, fp32 = ([one["provider"] / one[name] for one in times] for name in ("int8", "plain", "fp32"))
        pairs = [f"{least:.2f} ({median:.2f})" for least, median in (int8, plain)]
        lines.append(f"| {what} | {pairs[0]} | {pairs[1]} | {fp32[0]:.2f} | {row['creation']:.2f} |")
    return "\n".join(lines)


def measured_with(options: argparse.Namespace) -> dict[str, Any]:
    """Return the description of the measurement, with rows to follow."""
    from export import lowbit
    from qkd.run.environment import environment

    made = environment(seed=0)
    return {
        "processor": processor(),
        "commands": [shlex.join(["python", "benchmarks/lowbit.py", *sys.argv[1:]])],
        "date": time.strftime("%Y-%m-%d"),
        "commit": made["commit"],
        "versions": {name: made["packages"].get(name) for name in ("torch", "brevitas", "onnx", "onnxruntime")},
        "kernels": lowbit.availability().kernels,
        "runtime_restricted_to": options.int8_isa,
        "flavor": options.flavor,
        "rows": [],
    }


def with_earlier(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Return results with the commands and rows of an existing JSON file prepended.

    Raises:
        ValueError: If the file was measured with another setup.
    """
    earlier = json.loads(path.read_text())
    setup = ("processor", "versions", "kernels", "runtime_restricted_to", "flavor")
    if why := changed_setup(earlier, results, setup):
        raise ValueError(f"{path}: {why}; give another file")
    return {**results, **{name: [*earlier.get(name, []), *results[name]] for name in ("commands", "rows")}}


def run_restricted(isa: str) -> int:
    """Run this program again with a runtime limited to an instruction set, and return its exit code."""
    from restricted_runtime import restricted_environment

    with tempfile.TemporaryDirectory() as folder:
        environment = restricted_environment(Path(folder)) | {"LOWBIT_ISA": isa, "LOWBIT_RESTRICTED": isa}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


def main() -> None:
    """Measure the nets and write a table, and JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument(
        "--widths", nargs="+", default=["w2a2"], help="bits of weights and activations: w2a2, w4a4, ..."
    )
    parser.add_argument("--flavor", default="ort", choices=["ort", "qcdq"])
    parser.add_argument("--size", type=int, help="image side in pixels (default: 224, 32 for resnet20)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--profile", action="store_true", help="time each operation, to stderr and the JSON")
    parser.add_argument("--folder", type=Path, help="folder that keeps files for the next run")
    parser.add_argument("--int8-isa", choices=["avx2"], help="limit for all measurements: no AVX-512, no VNNI")
    parser.add_argument("--json", type=output_file(".json"))
    parser.add_argument("--append", action="store_true", help="keep the rows in the JSON file")
    options = parser.parse_args()
    if options.int8_isa and "LOWBIT_RESTRICTED" not in os.environ:
        sys.exit(run_restricted(options.int8_isa))
    if options.append and not options.json:
        parser.error("--append keeps the rows of a JSON file and requires --json")
    torch.set_num_threads(1)
    results = measured_with(options)
    if options.append:
        results = with_earlier(options.json, results)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        profile = Path(place) / "profile.jsonl"
        if options.profile:
            os.environ["LOWBIT_PROFILE"] = str(profile)
        for name, width, threads in itertools.product(options.nets, options.widths, options.threads):
            row = measure(name, (int(width[1]), int(width[3])), threads, options, folder)
            print(line_of(row), flush=True)
            if options.profile:
                row["operations"] = read_profile(profile)
                for op in row["operations"]:
                    print(f"    {op['region']:2} {op['kind']:10}{op['us']:9.1f} us  {op['name']}", file=sys.stderr)
            results["rows"].append(row)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
