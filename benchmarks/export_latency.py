"""Measures exported students against full precision, onnxruntime's static int8 and Brevitas' own QCDQ export.

    python benchmarks/export_latency.py --json benchmarks/results/export_latency.json
    python benchmarks/export_latency.py --nets resnet18 --rounds 100 --profile

Batch 1, one thread, all variants of a net interleaved in one run (`export.measure_interleaved`). Nets are untrained:
weights do not change a kernel's time, and parity is checked on them anyway. Variants:

    fp32        PyTorch's exporter, batch norm folded by ONNX Runtime
    int8        onnxruntime's quantize_static: QDQ, per-channel weights
    brevitas    the W4A4 net of Brevitas' own layers, by its export_onnx_qcdq (omitted without onnxoptimizer)
    w4a4, w2a2  this toolkit, first and last layer 8 bit
    ...-last4   the same with a 4-bit last layer (file size)
    ...-gemm    the same with linear layers as Gemm instead of MatMulNBits, where that makes a difference
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from stage_runs import changed_setup, environment
from train_step import stock_brevitas

from qkd.cli.options.values import output_file, positive

SIZES = {"resnet20": 32}  # pixels; 224 for the others
CLASSES = {"resnet20": 10}
NETS = ("resnet18", "resnet50", "mobilenet_v2", "googlenet", "resnet20", "alexnet", "vgg11_bn", "squeezenet1_1")
BITS = {"w4a4": 4, "w2a2": 2}
SETUP = ("cpu", "cpu_flags", "torch", "brevitas", "onnxruntime", "commit", "flags")  # the same for all nets of a file
BREVITAS_NETS = ("resnet18", "resnet50", "mobilenet_v2", "resnet20")


def build(name: str, seed: int = 0) -> nn.Module:
    """Return an untrained net with running statistics, in evaluation mode."""
    from qkd.nets import build_net

    torch.manual_seed(seed)
    size, classes = SIZES.get(name, 224), CLASSES.get(name, 1000)
    known = name if name == "resnet20" else f"torchvision/{name}"
    net = build_net(known, classes=classes, channels=3, image_size=size).train()
    with torch.no_grad():
        net(torch.randn(4, 3, size, size))
    return net.eval()


def images_of(name: str) -> Tensor:
    """Return a few images of the net's size."""
    size = SIZES.get(name, 224)
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def write_files(name: str, folder: Path, *, with_brevitas: bool) -> dict[str, dict[str, Any]]:
    """Write every variant of a net that does not exist yet; return the facts about each."""
    from export import export_float, export_int8_baseline

    facts: dict[str, dict[str, Any]] = {}
    images = images_of(name)
    net = build(name)
    makers: dict[str, Callable[[Path], dict[str, Any]]] = {
        "fp32": lambda path: {"operators": export_float(net, images[:1], path).operators},
        "int8": lambda path: _int8(export_int8_baseline, folder / f"{name}.fp32.onnx", images, path),
    }
    if with_brevitas and name in BREVITAS_NETS:
        makers["brevitas"] = lambda path: _brevitas(build(name), images, path)
    for variant in makers:
        facts[variant] = _made(folder / f"{name}.{variant}.onnx", makers[variant])
    for code, bits in BITS.items():
        facts |= _students(name, net, code, bits, images, folder)
    return facts


def _made(path: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    start = time.perf_counter()
    known = make(path)
    path.with_name(path.name + ".data").unlink(missing_ok=True)  # a leftover: `_brevitas` checks that it does not exist
    size = path.stat().st_size
    print(f"  {path.name}: {size / 1e6:.2f} MB, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return {**known, "path": str(path), "size_bytes": size}


def _int8(export: Callable[..., Path], source: Path, images: Tensor, path: Path) -> dict[str, Any]:
    export(source, images.numpy(), path)
    return {}


def _brevitas(net: nn.Module, images: Tensor, path: Path) -> dict[str, Any]:
    from brevitas.export import export_onnx_qcdq

    student = stock_brevitas(net, 4).train()
    with torch.no_grad():
        student(images)  # activation scales
        export_onnx_qcdq(student.eval(), args=images[:1], export_path=str(path), dynamo=True, opset_version=18)
    model = onnx.load(path, load_external_data=False)
    if any(entry.data_location == onnx.TensorProto.EXTERNAL for entry in model.graph.initializer):
        raise RuntimeError(f"{path}: the weights are stored in another file, so its size says nothing")
    return {"operators": dict(collections.Counter(node.op_type for node in model.graph.node))}


def _students(
    name: str, net: nn.Module, code: str, bits: int, images: Tensor, folder: Path
) -> dict[str, dict[str, Any]]:
    from export import export_onnx
    from quantizers import QuantSpec, calibrate, prepare

    facts: dict[str, dict[str, Any]] = {}
    for ending, last in (("", 8), ("-last4", 4)):
        if ending and name != "resnet18":
            continue
        student = prepare(net, QuantSpec(weight_bits=bits, act_bits=bits, last_bits=last), example_inputs=images[:1])
        calibrate(student, [images])

        def write(path: Path, linear: str, student: Any = student) -> dict[str, Any]:
            exported = export_onnx(student, images[:1], path, linear=linear)  # type: ignore[arg-type]
            layers = collections.Counter(layer.kernel for layer in exported.layers)
            known = {"operators": exported.operators, "layer_kernels": dict(layers), "warnings": exported.warnings}
            return {**known, "parity": _parity(student, path, images)}

        facts[code + ending] = _made(folder / f"{name}.{code}{ending}.onnx", lambda path: write(path, "auto"))
        if "MatMulNBits" in facts[code + ending]["layer_kernels"]:
            target = folder / f"{name}.{code}{ending}-gemm.onnx"
            facts[f"{code}{ending}-gemm"] = _made(target, lambda path: write(path, "gemm"))
        del student
        gc.collect()
    return facts


def _parity(student: nn.Module, path: Path, images: Tensor) -> dict[str, Any]:
    from export import check_parity

    report = check_parity(student, path, [images], layer_images=2)
    return {
        "passed": report.passed,
        "top1_off": report.off.top1_agreement,
        "top1_on": report.on.top1_agreement,
        "largest_logit_steps_on": report.on.max_steps,
        "layer_codes": sum(layer.values for layer in report.layers),
        "differing_off": sum(layer.differing for layer in report.layers),
        "differing_on": sum(layer.differing_on for layer in report.layers),
    }


def profile(path: str, rounds: int) -> dict[str, float]:
    """Return microseconds per inference in each operator, without the slowest tenth."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = 1, True, 4
    options.profile_file_prefix = str(Path(path).with_suffix(".profile"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    image = torch.randn(1, *entry.shape[1:], generator=torch.Generator().manual_seed(0)).numpy()
    for _ in range(rounds):
        session.run(None, {entry.name: image})
    log = Path(session.end_profiling())
    events = json.loads(log.read_text())
    log.unlink()
    nodes: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"])
    totals: dict[str, float] = collections.defaultdict(float)
    for (operator, _), durations in nodes.items():
        kept = sorted(durations)[: max(1, len(durations) * 9 // 10)]
        totals[operator] += sum(kept) / len(kept)
    return {name: round(value, 1) for name, value in sorted(totals.items(), key=lambda item: -item[1])}


def measure(name: str, facts: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Time every variant of a net, interleaved; return one row per variant, and the machine."""
    from export import measure_interleaved

    rounds = args.rounds * (10 if name in SIZES else 1)
    reports = measure_interleaved(
        {variant: entry["path"] for variant, entry in facts.items()}, threads=1, rounds=rounds, warmup=args.warmup
    )
    rows: dict[str, Any] = {}
    for variant, report in reports.items():
        known = asdict(report)
        row = {key: known[key] for key in ("median_ms", "p10_ms", "p90_ms", "min_ms", "load_ms", "peak_memory_bytes")}
        for peer in ("fp32", "int8", "brevitas"):
            if peer in reports:
                row[f"over_{peer}"] = round(report.median_ms / reports[peer].median_ms, 3)
        row["fp32_size_over"] = round(facts["fp32"]["size_bytes"] / facts[variant]["size_bytes"], 2)
        rows[variant] = {**row, **{key: value for key, value in facts[variant].items() if key != "path"}}
    if args.profile:
        for variant in ("int8", "w4a4", "w2a2"):
            rows[variant]["operators_us"] = profile(facts[variant]["path"], max(10, args.rounds // 2))
    machine = next(iter(reports.values())).machine
    return {"rounds": rounds, "machine": machine, "variants": rows}


def table(name: str, result: dict[str, Any]) -> str:
    """Return the rows of a net as text."""
    lines = [f"{name}: {result['rounds']} rounds"]
    for variant, row in result["variants"].items():
        ratios = "".join(
            f"  /{peer} {row[f'over_{peer}']:.3f}" for peer in ("fp32", "int8", "brevitas") if f"over_{peer}" in row
        )
        size = f"{row['size_bytes'] / 1e6:8.2f} MB (1/{row['fp32_size_over']})"
        lines.append(f"  {variant:12s} {row['median_ms']:9.3f} ms{ratios}  {size}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, write the files, measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument(
        "--rounds", type=positive, default=60, help="timed inferences per variant (ten times that for 32x32)"
    )
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("/tmp/qkd-export-latency"), help="folder of the files")
    parser.add_argument("--no-brevitas", action="store_true", help="omit Brevitas' own export")
    parser.add_argument("--profile", action="store_true", help="also measure the time of each operator")
    parser.add_argument("--json", type=output_file(".json"))
    parser.add_argument("--reuse", action="store_true", help="measure the files that an earlier call left in --work")
    parser.add_argument("--update", action="store_true", help="keep the JSON file's other nets, of the same setup")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    if args.update and args.json and args.json.exists():
        earlier = json.loads(args.json.read_text())
        if why := changed_setup(earlier.get("setup", {}), setup_of(args), SETUP):
            parser.error(f"--update: {args.json}: {why}; give another --json")
        results = earlier["nets"]
    for name in args.nets:
        known = args.work / f"{name}.facts.json"
        if args.reuse and known.exists():
            facts = json.loads(known.read_text())
        else:
            facts = write_files(name, args.work, with_brevitas=not args.no_brevitas)
            known.write_text(json.dumps(facts))
        gc.collect()
        results[name] = measure(name, facts, args)
        print(table(name, results[name]), flush=True)
        if args.json:
            _write(args.json, results, args)


def setup_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what all nets of a file have in common."""
    return {**environment(), "flags": _flags(args)}


def _flags(args: argparse.Namespace) -> str:
    return f"--rounds {args.rounds}" + " --profile" * args.profile + " --no-brevitas" * args.no_brevitas


def _write(path: Path, results: dict[str, Any], args: argparse.Namespace) -> None:
    record = {
        "what": "latency of exported nets, batch 1, one thread, variants of a net interleaved; ratios of medians",
        "command": f"python benchmarks/export_latency.py --nets {' '.join(results)} {_flags(args)}",
        "setup": setup_of(args),
        "nets": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
