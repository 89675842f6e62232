"""Shows what single optimizer steps do to learned 2-bit step sizes, free and bounded (`low_bit.step_size_bound`).

    python benchmarks/step_sizes.py                          # digits, ResNet-8, minutes of one core
    python benchmarks/step_sizes.py --data FOLDER --limit 4096 --epochs 8 --lr 0.04 0.16   # with train.npz, test.npz

A ResNet-8 is trained in float; its W2A2 student starts from it and learns from it (soft targets), once per bound, peak
rate and seed. Per training: the largest relative change of a step size in one step; how many epochs had more than twice
the loss of the previous one; the last loss; and the test accuracy, read once at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stage_runs import environment, spread
from torch import Tensor, nn

from qkd.cli.options.values import output_file, positive
from qkd.config import DataConfig, LowBitConfig, TrainConfig
from qkd.data import Splits, load_splits, normalize
from qkd.losses.logits import cross_entropy_loss, soft_target_loss
from qkd.nets import build_net
from qkd.training.evaluate import accuracy
from qkd.training.job import Moment
from qkd.training.low_bit.rules import step_rules
from qkd.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from quantizers import QuantSpec, Student, calibrate, prepare, quantizer_scales

NET = "resnet8"
RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Images:
    """The normalized training images, and their data set."""

    data: DataConfig
    splits: Splits
    pixels: Tensor
    labels: Tensor

    @staticmethod
    def read(data: DataConfig) -> Images:
        """Read a data set."""
        splits = load_splits(data, seed=0)
        pixels, labels = splits.train.batch(torch.arange(len(splits.train)), "cpu")
        return Images(data, splits, normalize(pixels, splits.mean, splits.std), labels)

    def score(self, net: nn.Module) -> float:
        """Return the accuracy on the test images."""
        return float(accuracy(net, self.splits.test, self.splits, self.data, torch.device("cpu")) or 0.0)


def train(
    net: nn.Module, teacher: nn.Module | None, config: TrainConfig, bound: float | None, images: Images, seed: int
) -> Row:
    """Train a net from labels, or from the teacher alone if given; return what its step sizes did."""
    scales = list(quantizer_scales(net)) if isinstance(net, Student) else []
    optimizer = build_optimizer(net, config, scales)
    rules = step_rules(net, LowBitConfig(step_size_bound=bound), optimizer) if scales else ()
    generator, size = torch.Generator().manual_seed(seed), images.data.batch_size
    steps, losses, largest = len(images.labels) // size, list[float](), 0.0
    net.train()
    for epoch in range(config.epochs):
        total = 0.0
        for step, places in enumerate(torch.randperm(len(images.labels), generator=generator).split(size)[:steps]):
            number = epoch * steps + step
            rate = learning_rate(config, number, steps)
            set_learning_rate(optimizer, rate)
            logits = net(images.pixels[places])
            loss = cross_entropy_loss(logits, images.labels[places]) if teacher is None else _distilled(
                logits, teacher, images.pixels[places])  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            moment = Moment(rate / config.lr, config.lr, number / (steps * config.epochs), steps * config.epochs)
            before = [scale.detach().abs() for scale in scales]
            for rule in rules:
                rule.before(moment)
            optimizer.step()
            for rule in rules:
                rule.after(moment)
            largest = max(largest, _largest_change(scales, before))
            total += float(loss.detach())
        losses.append(total / steps)
    jumps = sum(now > 2 * then for then, now in zip(losses, losses[1:], strict=False))
    return {"largest_change": largest, "epochs_with_a_jump": jumps, "last_loss": losses[-1], "losses": losses}


def _distilled(logits: Tensor, teacher: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        target = teacher(pixels)
    return soft_target_loss(logits, target, temperature=4.0)


def _largest_change(scales: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Return the largest relative change of a step size; 0 if there are none."""
    with torch.no_grad():
        parts = [((now.abs() - then).abs() / then).max() for now, then in zip(scales, before, strict=True)]
    return float(torch.stack(parts).max()) if parts else 0.0


def rows_of(args: argparse.Namespace, images: Images) -> list[Row]:
    """Train everything; return one row per rate and bound."""
    found: dict[tuple[float, float | None], list[Row]] = {}
    shape = images.splits.image_shape
    for seed in args.seeds:
        torch.manual_seed(seed)
        teacher = build_net(NET, classes=len(images.splits.classes), channels=shape[0], image_size=shape[1:])
        train(teacher, None, TrainConfig(epochs=args.epochs, lr=0.1), None, images, seed)
        teacher.eval().requires_grad_(False)
        for rate in args.lr:
            for bound in (None, args.bound):
                own = copy.deepcopy(teacher).requires_grad_().train()
                student = prepare(own, QuantSpec(weight_bits=2, act_bits=2), images.pixels[:2])
                calibrate(student, list(images.pixels[:512].split(256)))
                config = TrainConfig(epochs=args.epochs, lr=rate, weight_decay=1.25e-4, warmup_epochs=0.5)
                row = {"seed": seed, **train(student, teacher, config, bound, images, seed)}
                row["test_accuracy"] = images.score(student)
                print(
                    f"rate {rate}, bound {bound}: { ({key: row[key] for key in row if key != 'losses'}) }", flush=True
                )
                found.setdefault((rate, bound), []).append(row)
    return [
        {
            "lr": rate, "bound": bound, "largest_change": max(row["largest_change"] for row in rows),
            "epochs_with_a_jump": sum(row["epochs_with_a_jump"] for row in rows),
            "test_accuracy": spread([row["test_accuracy"] for row in rows]), "trainings": rows,
        }
        for (rate, bound), rows in found.items()
    ]  # fmt: skip


def main() -> None:
    """Parse the arguments, train, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.npz and test.npz (default: digits)")
    parser.add_argument("--limit", type=int, help="training images (default: all)")
    parser.add_argument("--epochs", type=positive, default=12)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.04, 0.16], help="peak rates")
    parser.add_argument("--bound", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--json", type=output_file(".json"), help="default: results/step_sizes_DATA.json next to this file"
    )
    args = parser.parse_args()
    where = {"name": "digits"} if args.data is None else {"name": "npz", "path": args.data}
    data = DataConfig.model_validate({**where, "val_fraction": 0, "train_limit": args.limit, "batch_size": 128})
    images = Images.read(data)
    name = "digits" if args.data is None else args.data.resolve().name
    facts = {
        "what": __doc__.splitlines()[0], "net": NET, "data": name, "images": len(images.labels), "epochs": args.epochs,
        "environment": environment(),
    }  # fmt: skip
    rows = rows_of(args, images)
    assert all(math.isfinite(row["largest_change"]) for row in rows)  # noqa: S101 - otherwise nothing was measured
    out = args.json or RESULTS / f"step_sizes_{name}.json"
    out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
