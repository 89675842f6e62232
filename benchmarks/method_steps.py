"""Measures one training step of every distillation method against plain distillation, interleaved in one run.

    python benchmarks/method_steps.py --rounds 15

The pair, the batch and the methods are those of ``methods.py``. A step is everything from the batch to the updated
weights: forward passes, loss, gradients, the optimizer; for a method with phases, their mean, weighted by epochs. Each
round runs every method once, in turn; the ratio is the median over the rounds of (method / plain distillation of the
same round). Memory is what a step keeps for its backward pass: the storages that autograd saves, counted once each, so
it is exact and the same on every run. Methods that clip gradients are also measured with plain sums (``NAME+sum``).
Extra ``key.path=value`` words are passed to every config (where the images are). Writes OUT for ``methods.py --steps``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from methods import KD, METHODS, OF_ANOTHER_PAIR, ROOT, merged
from stage_runs import environment, public
from torch import Tensor, nn

from qkd.cli.options.values import output_file, positive
from qkd.config import RunConfig
from qkd.config.binding import apply_overrides, bind
from qkd.data import Splits, load_splits, normalize
from qkd.files.yaml_text import parse_yaml
from qkd.methods.auxiliary.training import auxiliary_config
from qkd.methods.ensemble.average import EnsembleTeacher
from qkd.methods.rotations.branches import branches_file, fresh_branches, save_branches
from qkd.nets import build_net
from qkd.roles.learner import phases_of, student_images
from qkd.roles.nets import prepare_student
from qkd.roles.phases import distillation
from qkd.run.folder import RunFolder
from qkd.training import Batch, Phase, build_optimizer
from quantizers import Student, calibrate, quantizer_scales

CPU = torch.device("cpu")
UNCLIPPED = "+sum"  # suffix of a row's name: the same method with summed gradients, with one backward pass fewer


class Method:
    """A method's phases, ready to step, built like in its stage but from random weights."""

    def __init__(self, config: RunConfig, splits: Splits, batch: Batch) -> None:
        torch.manual_seed(0)
        self.format = (
            torch.channels_last if config.student.train.memory_format == "channels_last" else torch.contiguous_format
        )
        self.batch = replace(batch, images=batch.images.to(memory_format=self.format))
        splits = student_images(config, splits)
        guide = self._teacher(config, splits)
        student = self._low_bit(config, splits)
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(config, Path(folder))
            path = None if config.student.rotations is None else branches_file(run)
            if path is not None:  # what a run has trained before its student
                path.parent.mkdir(parents=True)
                save_branches(path, fresh_branches(config, guide, splits, "teacher"), config, splits)
            made = distillation(
                config, phases_of(config.student), student, guide, None,
                net=_net(config.student_net, splits), splits=splits, run=run,
            )  # fmt: skip
        for other in made.low_bit:
            calibrate(other, [batch.images])
        self.student = student
        self.phases = made.phases
        joined = [partner for partner in made.partners if partner.optimizer is None]
        self.optimizer = build_optimizer(student, config.student.train, quantizer_scales(student), joined)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4  # small updates, so that no step is degenerate

    def _teacher(self, config: RunConfig, splits: Splits) -> nn.Module:
        count = config.teacher.members
        nets = [_net(config.teacher.net, splits) for _ in range(count)]
        guide = nets[0] if count == 1 else EnsembleTeacher(nets, config.teacher.ensemble)
        if config.student.auxiliary is not None:
            own = auxiliary_config(config)
            is_float = config.student.auxiliary.quant is None
            guide = _net(own.student_net, splits) if is_float else self._low_bit(own, splits)
        return guide.to(memory_format=self.format).eval().requires_grad_(False)

    def _low_bit(self, config: RunConfig, splits: Splits) -> Student:
        net = _net(config.student_net, splits)
        student = prepare_student(config, net, splits.image_shape)
        calibrate(student, [self.batch.images])
        return student.to(memory_format=self.format)

    def step(self, phase: Phase, batch: Batch) -> None:
        """Take one step."""
        self.optimizer.zero_grad(set_to_none=True)
        phase.backward(batch, phase.step(batch), lambda loss: loss)
        self.optimizer.step()

    def timed(self) -> float:
        """Return the seconds of a step, the mean over the phases weighted by their epochs."""
        total, first = 0.0, 0
        for phase in self.phases:
            batch = replace(self.batch, epoch=first + phase.epochs - 1)
            first += phase.epochs
            with self._within(phase):
                started = time.perf_counter()
                self.step(phase, batch)
                total += phase.epochs * (time.perf_counter() - started)
        return total / first

    @contextmanager
    def _within(self, phase: Phase) -> Iterator[None]:
        self.student.train()
        phase.enter()
        with phase.hold():
            yield

    def kept_bytes(self) -> int:
        """Return the bytes a forward pass keeps for its backward pass, in the phase that keeps the most."""
        return max(self._kept_bytes(phase) for phase in self.phases)

    def _kept_bytes(self, phase: Phase) -> int:
        seen: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        epochs = sum(one.epochs for one in self.phases[: self.phases.index(phase) + 1])
        batch = replace(self.batch, epoch=epochs - 1)
        with self._within(phase), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self.step(phase, batch)
        return sum(seen.values())


def _net(name: str, splits: Splits) -> nn.Module:
    return build_net(name, classes=len(splits.classes), channels=splits.channels, image_size=splits.image_size)


def first_batch(splits: Splits, size: int) -> Batch:
    """Return the first training images, without augmentation, as a batch."""
    places = torch.arange(size)
    raw, labels = splits.train.batch(places, "cpu")
    return Batch(normalize(raw, splits.mean, splits.std), labels, raw, 0, 0, places)


def build_all(args: argparse.Namespace) -> tuple[dict[str, Method], dict[str, str]]:
    """Return name -> method, and name -> why it could not be built."""
    base = parse_yaml(args.config.read_text())
    data = bind(apply_overrides(base, args.overrides)).data
    splits = load_splits(data, seed=0)
    batch = first_batch(splits, args.batch or data.batch_size)
    made: dict[str, Method] = {}
    failed: dict[str, str] = {}
    for bits in args.bits:
        for name in args.methods:
            values = merged(base, parse_yaml((METHODS / f"{name}.yaml").read_text()))
            widths = [f"student.quant.{kind}_bits={bits}" for kind in ("weight", "act")]
            try:
                for suffix, one in {"": values, **unclipped(values)}.items():
                    config = bind(apply_overrides(one, [*args.overrides, *widths]))
                    made[f"{name}{suffix}-w{bits}a{bits}"] = Method(config, splits, batch)
            except (ValueError, RuntimeError) as error:
                failed[f"{name}-w{bits}a{bits}"] = str(error)
    return made, failed


def unclipped(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the config with plain sums, by suffix, if its phases clip gradients, to measure what clipping costs."""
    phases = values["student"].get("phases", [])
    if all(phase.get("combine", "sum") == "sum" for phase in phases):
        return {}
    plain = [{key: value for key, value in phase.items() if key != "combine"} for phase in phases]
    return {UNCLIPPED: {**values, "student": {**values["student"], "phases": plain}}}


def measure(made: dict[str, Method], rounds: int, of: Callable[[str], str]) -> dict[str, dict[str, float]]:
    """Return name -> time and memory, and both relative to plain distillation of the same width."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 2):  # the first two warm up: they compile kernels and allocate memory
        print(f"round {number + 1} of {rounds + 2}, the first two warm up", file=sys.stderr, flush=True)
        for name, method in made.items():
            found = method.timed()
            if number >= 2:
                seconds[name].append(found)
    kept = {name: method.kept_bytes() for name, method in made.items()}
    rows = {}
    for name, values in seconds.items():
        ratios = [own / plain for own, plain in zip(values, seconds[of(name)], strict=True)]
        rows[name] = {
            "step_ms": round(1000 * statistics.median(values), 2),
            "time_ratio": round(statistics.median(ratios), 3),
            "time_ratio_p10": round(sorted(ratios)[len(ratios) // 10], 3),
            "time_ratio_p90": round(sorted(ratios)[(9 * len(ratios)) // 10], 3),
            "kept_mb": round(kept[name] / 1e6, 2),
            "memory_ratio": round(kept[name] / kept[of(name)], 3),
        }
    return rows


def main() -> None:
    """Parse the command line, measure, print, write."""
    known = sorted(path.stem for path in METHODS.glob("*.yaml") if path.stem not in OF_ANOTHER_PAIR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every config")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "fashion-mnist" / "methods.yaml")
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--batch", type=int, help="images per step (default: the config's)")
    parser.add_argument(
        "--out", type=output_file(".json"), default=ROOT / "benchmarks" / "results" / "method_steps.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if KD not in args.methods:
        args.methods = [KD, *args.methods]
    made, failed = build_all(args)
    rows: dict[str, Any] = dict(measure(made, args.rounds, lambda name: f"{KD}-{name.rsplit('-', 1)[1]}"))
    rows |= {name: {"failed": why} for name, why in failed.items()}
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("time_ratio", 0)):
        print(f"{name:36s}", row)
    record = {
        "what": "one training step per method, relative to plain distillation in the same round; one thread",
        "overrides": public(args.overrides), "rounds": args.rounds, "environment": environment(), "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
