"""Measures one distillation step in plain PyTorch as a user writes it, this toolkit, and stock Brevitas, in turn.

    python benchmarks/train_step.py --rounds 15 --json benchmarks/results/train_step.json
    python benchmarks/train_step.py --precision float32 --memory-format contiguous --rounds 15
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/train_step.py --rounds 15

A step is: the teacher's forward pass without gradient, the student's forward and backward pass with cross-entropy plus
soft targets, and an SGD step. ResNet-20, 32x32, batch 128 by default. ``plain`` and ``stock`` run in float32 and NCHW;
``float`` and ``ours`` in the arithmetic of ``--precision`` and ``--memory-format``: by default what the toolkit's
race chooses. Every round times every variant once, in turn; ratios are medians over the rounds of
(variant / ``plain`` or ``float`` of the same round). ``--clock cpu`` measures the process's own CPU time, which
other load does not affect (with ``--threads 1``). Peak memory is read in a separate process per variant
(``--memory``), as the growth of the resident set over the step.

    python benchmarks/train_step.py --devices 2 --variants float ours_w2a2

compares N processes of one core each, which share every batch, with one process on one core: efficiency is the time of
one over N times that of N (1 is perfect). ``efficiency_own_statistics`` is that without synchronized batch norm, which
waits for the others at every layer (``sync_batch_norm: false``), ``efficiency_apart`` that of N processes that take
their share of a batch but never exchange anything: what the machine allows. ``cpu_efficiency`` is the efficiency in CPU
time, which other load does not affect: it only misses the time that processes wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from stage_runs import environment
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qkd.cli.options.values import output_file, positive
from qkd.nets.build import NETS


def stock_brevitas(model: nn.Module, bits: int) -> nn.Module:
    """Replace layers with Brevitas' own, with its default quantizers; first and last layer have 8 bits."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        width = 8 if name in (layers[0], layers[-1]) else bits
        new: nn.Module | None = None
        if isinstance(module, nn.Conv2d):
            new = qnn.QuantConv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
                module.dilation, module.groups, bias=module.bias is not None,
                weight_quant=Int8WeightPerChannelFloat, weight_bit_width=width,
            )  # fmt: skip
        elif isinstance(module, nn.Linear):
            new = qnn.QuantLinear(
                module.in_features, module.out_features, bias=True, weight_quant=Int8WeightPerChannelFloat,
                weight_bit_width=width,
            )  # fmt: skip
        elif isinstance(module, (nn.ReLU, nn.ReLU6)):
            new = qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits)
        if new is not None:
            setattr(parent, name.rpartition(".")[2], new)
    return model


def build(variant: str, net: str, images: Tensor) -> nn.Module:
    """Return the student of a variant: ``plain``, ``float`` (the same net), ``ours_w4a4``, ``stock_w2a2``, ..."""
    from qkd.nets import build_net
    from quantizers import QuantSpec, calibrate, prepare

    torch.manual_seed(0)
    model = build_net(net, classes=10, channels=images.size(1), image_size=images.size(2)).train()
    if variant in ("plain", "float"):
        return model
    family, code, *rest = variant.split("_")
    bits = int(code[1])
    if family == "stock":
        return stock_brevitas(model, bits).train()
    student = prepare(model, QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=images[:2])
    calibrate(student, [images])
    student.train()
    return torch.compile(student) if rest == ["compiled"] else student  # type: ignore[return-value]


Arithmetic = tuple[str, str]  # precision and memory format, by the toolkit's names
PLAIN: Arithmetic = ("float32", "contiguous")


def arithmetic_of(variant: str, chosen: Arithmetic) -> Arithmetic:
    """Return what a variant runs in: the toolkit's choice, or what PyTorch or Brevitas use by default."""
    return PLAIN if variant == "plain" or variant.startswith("stock") else chosen


def choose(args: argparse.Namespace, images: Tensor) -> tuple[Arithmetic, dict[str, float]]:
    """Return precision and memory format that the toolkit would choose, and milliseconds of its race."""
    from qkd.training.arithmetic.choice import FORMATS, winner
    from qkd.training.arithmetic.native import has_native_bf16
    from qkd.training.arithmetic.race import race

    device = torch.device("cpu")
    precisions = ["float32", *(["bf16"] if has_native_bf16(device) else [])]
    precisions = precisions if args.precision == "auto" else [args.precision]
    formats = FORMATS if args.memory_format == "auto" else (args.memory_format,)
    model = build("ours_w2a2", args.net, images)
    times = race(model, tuple(images.shape), [(one, layout) for one in precisions for layout in formats], device)
    return winner(times), {" ".join(one): round(ms, 1) for one, ms in times.items()}


def make_step(
    variant: str, net: str, images: Tensor, labels: Tensor, arithmetic: Arithmetic = PLAIN
) -> Callable[[], None]:
    """Return a function that does one distillation step of a variant."""
    from qkd.training.arithmetic.folded import FoldedNet
    from qkd.training.arithmetic.race import TORCH_FORMATS

    layout = TORCH_FORMATS[arithmetic[1]]
    teacher: Callable[[Tensor], Tensor] = build("float", net, images).eval()
    student = build(variant, net, images).to(memory_format=layout)
    images = images.contiguous(memory_format=layout)
    if variant.startswith("ours"):
        teacher = FoldedNet(teacher)  # as in the toolkit's distillation step
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    reduced = torch.autocast("cpu", torch.bfloat16, enabled=arithmetic[0] == "bf16")

    def step() -> None:
        with torch.no_grad(), reduced:
            target = teacher(images)
        with reduced:
            logits = student(images).float()
        target = F.softmax(target.float() / 4, dim=1)
        loss = F.cross_entropy(logits, labels) + F.kl_div(F.log_softmax(logits / 4, 1), target, reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def shared_step(variant: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a function that does one process's part of a step, as in the training loop."""
    from qkd.engines.engine import current
    from qkd.training.arithmetic.folded import FoldedNet
    from qkd.training.arithmetic.race import TORCH_FORMATS

    engine, layout = current(), TORCH_FORMATS[args.memory_format]
    images, labels = _data(args)
    part = engine.share(len(images))
    teacher: Callable[[Tensor], Tensor] = build("float", args.net, images).eval()
    student = build(variant, args.net, images).to(memory_format=layout)
    teacher = FoldedNet(teacher) if variant.startswith("ours") else teacher
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    own, targets = images[part].contiguous(memory_format=layout), labels[part]
    reduced = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")

    def step() -> None:
        with torch.no_grad(), reduced:
            target = teacher(own)
        target = F.softmax(target.float() / 4, dim=1)
        with engine.training([student]):
            with reduced:
                logits = student(own).float()
            loss = F.cross_entropy(logits, targets)
            loss = loss + F.kl_div(F.log_softmax(logits / 4, 1), target, reduction="batchmean")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        grads = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
        engine.average([*grads, loss.detach()])
        engine.sums({"images": torch.tensor(len(own)), "right": (logits.argmax(1) == targets).sum()})
        engine.decide(False)  # whether to save
        optimizer.step()

    return step


def take_part(args: argparse.Namespace) -> None:
    """Time a variant's steps as one of several processes, or alone; the first prints wall and CPU milliseconds."""
    from qkd.engines.engine import current
    from qkd.engines.joining import joined

    torch.set_num_threads(1)
    with joined("cpu", synchronizes=not args.own_statistics) as engine:
        step, times = shared_step(args.member, args), []
        for _ in range(args.warmup):
            step()
        cpu = time.process_time()
        for _ in range(args.rounds):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        cpu_ms = torch.tensor((time.process_time() - cpu) * 1e3 / args.rounds)
        total = float(current().sums({"cpu": cpu_ms})["cpu"])
        if engine.is_first:
            print(json.dumps({"step_ms": statistics.median(times), "cpu_ms": total}))


def measure_devices(args: argparse.Namespace) -> dict[str, Any]:
    """Time each variant with one process, and with N that train together, wholly or in part, or apart."""
    results: dict[str, Any] = {}
    # groups, processes in each, and whether batch norm has the statistics of each share
    groups = {
        "one": (1, 1, False), "many": (1, args.devices, False), "own_statistics": (1, args.devices, True),
        "apart": (args.devices, 1, False),
    }  # fmt: skip
    torch.set_num_threads(1)
    args.chosen, args.race_ms = choose(args, _data(args)[0])
    print("the toolkit's arithmetic:", *args.chosen, args.race_ms, file=sys.stderr)
    for variant in args.variants:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
        for name, (count, size, own) in [*groups.items()] * 3:
            words = ["--batch", str(args.batch // count), *(["--own-statistics"] if own else [])]
            found[name].append(_at_once(variant, count, size, args, words))
        times = {
            name: {key: statistics.median(row[key] for row in rows) for key in ("step_ms", "cpu_ms")}
            for name, rows in found.items()
        }
        one = times["one"]
        results[variant] = {
            **{f"{name}_ms": round(row["step_ms"], 1) for name, row in times.items()},
            **{
                "efficiency" if name == "many" else f"efficiency_{name}": round(
                    one["step_ms"] / (args.devices * row["step_ms"]), 3
                )
                for name, row in times.items()
                if name != "one"
            },
            "cpu_efficiency": round(one["cpu_ms"] / times["many"]["cpu_ms"], 3),
        }
    return results


def _at_once(variant: str, count: int, size: int, args: argparse.Namespace, words: list[str]) -> dict[str, float]:
    """Return the mean times of ``count`` trainings of ``size`` processes each, all running at once."""
    with ThreadPoolExecutor(count) as pool:
        rows = list(pool.map(lambda _: _together(variant, size, args, words), range(count)))
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def _together(variant: str, size: int, args: argparse.Namespace, words: list[str]) -> dict[str, float]:
    from qkd.engines.launching import member_environment

    command = [sys.executable, __file__, "--member", variant, "--net", args.net, *words]
    command += ["--size", str(args.size), "--rounds", str(args.rounds), "--warmup", str(args.warmup)]
    precision, memory_format = arithmetic_of(variant, args.chosen)
    command += ["--precision", precision, "--memory-format", memory_format]
    with tempfile.TemporaryDirectory() as folder:
        environments = [member_environment(rank, size, Path(folder), os.environ) for rank in range(size)]
        started = [
            subprocess.Popen(command, env={**one, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
            for one in environments
        ]
        said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{variant} with {size} processes: exit codes {[one.returncode for one in started]}")
    return dict(json.loads(said[0].splitlines()[-1]))


def _data(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
    return images, torch.randint(0, 10, (args.batch,), generator=generator)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all variants in turn and return medians and ratios."""
    images, labels = _data(args)
    args.chosen, args.race_ms = choose(args, images)
    print("the toolkit's arithmetic:", *args.chosen, args.race_ms, file=sys.stderr)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    steps = {
        variant: make_step(variant, args.net, images, labels, arithmetic_of(variant, args.chosen))
        for variant in args.variants
    }
    for step in steps.values():
        for _ in range(args.warmup):
            step()
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for done in range(args.rounds):
        for variant, step in steps.items():
            start = clock()
            step()
            times[variant].append((clock() - start) * 1e3)
        print(f"\rround {done + 1}/{args.rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {variant: _summary(values, times) for variant, values in times.items()}


def _summary(values: list[float], times: dict[str, list[float]]) -> dict[str, float]:
    found = {"median_ms": round(statistics.median(values), 2), "least_ms": round(min(values), 2)}
    for base, name in (("plain", "to_plain"), ("float", "to_float")):
        if base not in times:
            continue
        ratios = sorted(v / b for v, b in zip(values, times[base], strict=True))
        found[f"ratio_{name}"] = round(statistics.median(ratios), 3)
        found[f"least_{name}"] = round(min(values) / min(times[base]), 3)
        if base == "float":
            found["ratio_p10"] = round(ratios[len(ratios) // 10], 3)
            found["ratio_p90"] = round(ratios[-1 - len(ratios) // 10], 3)
    return found


def peak_memory_mb(args: argparse.Namespace) -> float:
    """Return the growth of this process's peak resident set over three steps, in MB."""
    images, labels = _data(args)
    arithmetic = arithmetic_of(args.memory, (args.precision, args.memory_format))
    step = make_step(args.memory, args.net, images, labels, arithmetic)
    if args.memory not in ("plain", "float"):
        # compile the kernels before measuring: the compiler's memory is not the step's
        small = make_step(args.memory, args.net, images[:4], labels[:4], arithmetic)
        small()
        del small
    before = _resident_mb()
    peak = 0.0
    handle = _PeakWatcher()
    with handle:
        for _ in range(3):
            step()
    peak = handle.peak_mb
    return peak - before


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


class _PeakWatcher:
    """Samples the resident set from a thread, since the peak of the setup could hide the growth of ru_maxrss."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._stop = False

    def __enter__(self) -> _PeakWatcher:
        import threading

        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop:
            self.peak_mb = max(self.peak_mb, _resident_mb())
            time.sleep(0.002)

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._thread.join()


def main() -> None:
    """Parse the command line, measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet20", choices=sorted(NETS), metavar="NET", help="of `qkd ls nets`")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="image side in pixels")
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bf16"), default="auto", help="precision of float and ours"
    )
    parser.add_argument("--memory-format", choices=("auto", "contiguous", "channels_last"), default="auto")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's own time")
    default = ["plain", "float", "ours_w4a4", "ours_w2a2", "stock_w4a4", "stock_w2a2"]
    parser.add_argument("--variants", nargs="+", default=default, help="variants; ours_w2a2_compiled also exists")
    parser.add_argument("--memory", help="print the peak memory of one variant and exit")
    parser.add_argument("--no-memory", action="store_true", help="omit the memory measurements")
    parser.add_argument("--devices", type=int, default=1, help="compare this many processes of one core with one")
    parser.add_argument("--member", help=argparse.SUPPRESS)
    parser.add_argument("--own-statistics", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=output_file(".json"))
    args = parser.parse_args()
    if args.member:
        take_part(args)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        print(peak_memory_mb(args))
        return
    is_apart = args.devices > 1
    results = measure_devices(args) if is_apart else measure(args)
    for variant, row in results.items():
        print(f"{variant:22s}", row, flush=True)
    for variant in [] if args.no_memory or is_apart else args.variants:
        command = [sys.executable, __file__, "--memory", variant, "--net", args.net, "--batch", str(args.batch)]
        command += ["--size", str(args.size), "--precision", args.chosen[0], "--memory-format", args.chosen[1]]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        results[variant]["peak_memory_mb"] = round(float(out.stdout.split()[-1]), 1)
    for variant, row in ({} if args.no_memory or is_apart else results).items():
        row["memory_ratio"] = round(row["peak_memory_mb"] / results["float"]["peak_memory_mb"], 3)
        print(f"{variant:22s}", row)
    if args.json:
        record = {
            "what": "one distillation step" + (f" shared by {args.devices} processes of one core" if is_apart else ""),
            "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("json", "memory")},
        }
        args.json.write_text(
            json.dumps(
                {**record, "environment": {**environment(), "threads": torch.get_num_threads()}, "results": results},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
