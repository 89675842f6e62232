"""Trains a ladder within a time budget: ResNet-20 in float, then its 2- and 4-bit students, on a real image set.

    python benchmarks/gpu/ladder.py --set cifar10 --data FOLDER --budget-s 480 --out results/
    python benchmarks/gpu/ladder.py --set fashion-mnist --data FOLDER --budget-s 240 --out results/
    python benchmarks/gpu/ladder.py --made-up 1024 --most-epochs 1 --out /tmp/warm    # compiles, for a later call

Every rung trains all seeds in parallel. A short timing at its start determines how many epochs fit its share of the
budget; the learning rate follows a cosine of that length. A student starts from its seed's float net and learns from
it; its last epochs train the deployed arithmetic in float32. The test set is read once per training, at its end, and
the training images are scored once more then, without augmentation. The record is written after every epoch, the
weights after every rung.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qkd.config import TrainConfig
from qkd.nets import build_net
from quantizers import QuantSpec, calibrate, freeze_batch_norm, prepare, settle
from quantizers.kernels import set_fused
from quantizers.modes import exact_float32

from images import CropFlip, Images, made_up_images, normalizer, read_images  # isort: skip - next to this file
from lanes import How, Lane, Lanes, Terms, least_change, logit_table, weights_of  # isort: skip
from record import environment, write_record  # isort: skip

FLOAT, LARGE = "fp", "large"  # rungs that others start from and learn from
CALIBRATION_IMAGES = 512
RESERVE = 0.96  # fraction of a rung's time that is planned: clocks drift, and writing files takes time
SETTLING = 0.02  # fraction of a student's epochs on the deployed arithmetic, in float32
WARM_UP = 0.05  # fraction of the epochs in which the rate rises


@dataclass(frozen=True)
class Rung:
    """A training of the ladder.

    Args:
        name: ``fp``, ``w2a2``, ...
        share: Share of the budget, relative to the other rungs.
        lr: Peak learning rate at a batch of 128; larger batches take proportionally more.
        weight_decay: Weight decay of weights; scales have none.
        bits: Bits of weights and activations; None trains the float net.
        most_epochs: Upper limit of epochs, whatever the time.
        teacher: What a student learns from: ``fp`` for its seed's float net, ``large`` for the logits of the rung of
            that name, which all seeds share, None for labels alone.
        net: Defaults to the ladder's net.
        step_size_bound: Largest relative change of a student's learned step size in one step, as in recipes.
    """

    name: str
    share: float
    lr: float
    weight_decay: float
    bits: int | None
    most_epochs: int
    teacher: str | None = None
    net: str | None = None
    step_size_bound: float = 0.1


@dataclass(frozen=True)
class ImageSet:
    """A data set, and the rungs trained on it.

    Args:
        channels: Channels of an image.
        side: Height and width in pixels.
        padding: Pixels around an image for random crops.
        rungs: Rungs in order.
    """

    channels: int
    side: int
    padding: int
    rungs: tuple[Rung, ...]


# Weight decay at 2 bits is a quarter: Esser et al., Learned Step Size Quantization, 2020, section 3.1.
SETS = {
    "cifar10": ImageSet(3, 32, 4, (
        Rung("large", 0.2, 0.1, 5e-4, None, 30, net='resnet18_cifar{"width": 0.75}'),
        Rung("fp", 0.3, 0.1, 5e-4, None, 200),
        Rung("w4a4", 0.2, 0.04, 5e-4, 4, 40, "large"),
        Rung("w2a2", 0.4, 0.04, 1.25e-4, 2, 400, "large"),
    )),
    "fashion-mnist": ImageSet(1, 28, 2, (
        Rung("fp", 0.30, 0.1, 5e-4, None, 60),
        Rung("w4a4", 0.17, 0.04, 5e-4, 4, 20, "fp"),
        Rung("w2a2", 0.29, 0.04, 1.25e-4, 2, 40, "fp"),
        Rung("w2a2-labels", 0.24, 0.04, 1.25e-4, 2, 40),
    )),
}  # fmt: skip
WITH_TEACHER = Terms(labels=0.1, teacher=0.9, temperature=4.0)
MACHINERY = (  # the next is tried if the previous one fails
    How(),
    How(compiled=False),
    How(graphs=False),
    How(compiled=False, graphs=False, bf16=False),
)


@dataclass
class Setting:
    """What all rungs share."""

    net: str
    images: ImageSet
    train: Images
    test: Images | None
    batch_size: int
    seeds: tuple[int, ...]
    out: Path
    deadline: float
    most_epochs: int
    how: Sequence[How]
    record: dict[str, Any] = field(default_factory=dict)
    table: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Return the device that trains the nets."""
        return self.train.pixels.device

    @property
    def left_s(self) -> float:
        """Return the seconds until the budget is used up."""
        return self.deadline - time.monotonic()

    def write(self) -> None:
        """Write the current record."""
        write_record(self.out / f"gpu_ladder_{self.record['set']}.json", self.record)


def rate(progress: float, peak: float) -> float:
    """Return the learning rate at a fraction 0..1 of training: a linear rise, then half a cosine to zero."""
    if progress < WARM_UP:
        return peak * (progress + 1e-3) / WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def train_rung(rung: Rung, setting: Setting, floats: Sequence[nn.Module], seconds: float) -> list[nn.Module]:
    """Train all seeds of a rung within ``seconds``, and write the results; return the nets in eval mode."""
    end = time.monotonic() + seconds
    row: dict[str, Any] = {"rung": asdict(rung), "seconds_planned": round(seconds, 1), "epochs": []}
    setting.record["rungs"].append(row)
    data = CropFlip(setting.train, padding=setting.images.padding)
    nets = [_start(rung, setting, seed, floats) for seed in _seeds(rung, setting)]
    for net in nets:
        _require_trainable(net, rung)
    before = [weights_of(net) for net in nets]
    lanes, step_s = _ready(rung, setting, nets, floats, data, row)
    epoch_s = step_s * lanes.lanes[0].steps
    settling, total = _plan(rung, setting, RESERVE * (end - time.monotonic()), epoch_s)
    row.update(epochs_planned=total, epochs_settling=settling, settled_epochs_per_s=round(1 / epoch_s, 3))
    _epochs(lanes, rung, setting, row, range(total - settling), total, end)
    lanes.close()
    _record_changes(nets, before, row)
    if settling:
        for net in nets:
            freeze_batch_norm(net)
        with exact_float32():
            how = replace(setting.how[-1], graphs=setting.how[0].graphs)
            lanes = _lanes(rung, setting, nets, floats, data, how, offset=1000)
            row["settling_prepare_s"] = round(lanes.prepare(), 2)
            _epochs(lanes, rung, setting, row, range(total - settling, total), total, math.inf)
            lanes.close()
    for net in nets:
        net.eval()
        if rung.bits:
            settle(net.cpu())
            net.to(setting.device)
    row["train_accuracy"] = [score(net, setting, setting.train) for net in nets]
    row["test_accuracy"] = None if setting.test is None else [score(net, setting, setting.test) for net in nets]
    row["seconds"] = round(seconds - (end - time.monotonic()), 1)
    setting.write()
    print(
        f"{rung.name}: {len(row['epochs'])} epochs, accuracy {row['train_accuracy']}, {row['test_accuracy']}",
        flush=True,
    )
    return nets


def _seeds(rung: Rung, setting: Setting) -> tuple[int, ...]:
    return setting.seeds if rung.name != LARGE else setting.seeds[:1]


def _require_trainable(net: nn.Module, rung: Rung) -> None:
    """Refuse a net with frozen parameters, which would train poorly without an error.

    Raises:
        RuntimeError: If any parameter is frozen.
    """
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise RuntimeError(
            f"{rung.name}: {len(frozen)} parameters are frozen, including {frozen[0]}; call requires_grad_()"
        )


def _record_changes(nets: Sequence[nn.Module], before: Sequence[dict[str, Tensor]], row: dict[str, Any]) -> None:
    """Record the layer of each net that changed least; if the change is zero, nothing was trained."""
    least = [least_change(net, weights) for net, weights in zip(nets, before, strict=True)]
    row["least_weight_change"] = [{"layer": name, "relative": change} for name, change in least]
    if any(change == 0.0 for _, change in least):
        row["defect"] = "weights of a layer did not change"
        print(f"{row['rung']['name']}: weights did not change: {least}", flush=True)


def _start(rung: Rung, setting: Setting, seed: int, floats: Sequence[nn.Module]) -> nn.Module:
    pixels = setting.train.pixels
    if rung.bits is None:
        torch.manual_seed(seed)
        net = build_net(rung.net or setting.net, classes=10, channels=pixels.shape[1], image_size=pixels.shape[-1])
        return net.to(setting.device).train()
    factor, shift = normalizer(setting.train)
    images = (pixels[:CALIBRATION_IMAGES].float() * factor - shift).cpu()
    spec = QuantSpec(weight_bits=rung.bits, act_bits=rung.bits)
    # the teacher's weights are frozen, and prepare would keep them frozen
    own = copy.deepcopy(floats[setting.seeds.index(seed)]).cpu().requires_grad_().train()
    student = prepare(own, spec, example_inputs=images[:2])
    calibrate(student, list(images.split(256)))
    return student.to(setting.device).train()


def _lanes(
    rung: Rung, setting: Setting, nets: Sequence[nn.Module], floats: Sequence[nn.Module], data: CropFlip, how: How,
    *, offset: int = 0,
) -> Lanes:  # fmt: skip
    config = TrainConfig(epochs=1, lr=rung.lr, weight_decay=rung.weight_decay)
    teachers = floats if rung.teacher == FLOAT else [None] * len(nets)
    table = setting.table if rung.teacher == LARGE else None
    if rung.teacher == LARGE and table is None:
        raise RuntimeError(f"{rung.name} learns from the logits of the rung {LARGE}; add it to --rungs")
    bound = rung.step_size_bound if rung.bits else None
    lanes = [
        Lane(net, teacher, data, setting.batch_size, seed + offset, config, table, bound)
        for net, teacher, seed in zip(nets, teachers, _seeds(rung, setting), strict=True)
    ]
    return Lanes(lanes, WITH_TEACHER if rung.teacher else Terms(), normalizer(setting.train), how)


def _ready(
    rung: Rung, setting: Setting, nets: Sequence[nn.Module], floats: Sequence[nn.Module], data: CropFlip,
    row: dict[str, Any],
) -> tuple[Lanes, float]:  # fmt: skip
    """Return prepared lanes and the seconds per step, with the first machinery that works."""
    for how in setting.how:
        try:
            lanes = _lanes(rung, setting, nets, floats, data, how)
            row["prepare_s"] = round(lanes.prepare(), 2)
            step_s = lanes.step_seconds(least_s=min(3.0, 0.02 * setting.left_s))
        except Exception as error:
            if how is setting.how[-1]:
                raise
            row.setdefault("fell_back", []).append(f"{how.describe()}: {type(error).__name__}: {error}"[:1500])
            traceback.print_exc()
            for net in nets:
                net.zero_grad(set_to_none=True)
            continue
        row.update(how=how.describe(), step_ms=round(1e3 * step_s, 4))
        return lanes, step_s
    raise AssertionError("unreachable")


def _plan(rung: Rung, setting: Setting, seconds: float, epoch_s: float) -> tuple[int, int]:
    """Return (epochs of settling, total epochs) that fit; an epoch of settling counts as four."""
    most = min(rung.most_epochs, setting.most_epochs)
    if rung.bits is None:
        return 0, max(1, min(most, int(seconds / epoch_s)))
    total = max(2, min(most, int(seconds / (epoch_s * (1 + 3 * SETTLING)))))
    return max(1, round(total * SETTLING)), total


def _epochs(
    lanes: Lanes, rung: Rung, setting: Setting, row: dict[str, Any], epochs: range, total: int, end: float
) -> None:
    peak, steps = rung.lr * setting.batch_size / 128, lanes.lanes[0].steps
    for epoch in epochs:
        start = time.monotonic()
        if start > end or setting.left_s < 0:
            row["cut_short"] = f"time was up before epoch {epoch + 1} of {total}"
            return
        totals = lanes.epoch(lambda step, epoch=epoch: rate((epoch + step / steps) / total, peak))  # type: ignore[misc]
        seconds = time.monotonic() - start
        row["epochs"].append(
            {
                "epoch": epoch + 1, "seconds": round(seconds, 4), "epochs_per_s": round(len(lanes.lanes) / seconds, 3),
                "lr": rate((epoch + 1) / total, peak), "train_loss": [round(one.loss, 5) for one in totals],
                "train_accuracy": [round(one.accuracy, 5) for one in totals],
            }
        )  # fmt: skip
        setting.write()
        if not all(math.isfinite(one.loss) for one in totals):
            row["cut_short"] = f"the loss is not finite after epoch {epoch + 1} of {total}"
            return
        if epoch % 10 == 0 or epoch == total - 1:
            shown = ", ".join(f"{one.loss:.3f}/{one.accuracy:.4f}" for one in totals)
            print(f"{rung.name} {epoch + 1}/{total}: {shown}, {len(lanes.lanes) / seconds:.2f} epochs/s", flush=True)


@torch.no_grad()
def score(net: nn.Module, setting: Setting, images: Images) -> float:
    """Return the accuracy on images, in float32 and on the deployed arithmetic."""
    factor, shift = normalizer(setting.train)
    right = torch.zeros((), dtype=torch.int64, device=setting.device)
    with exact_float32():
        for pixels, labels in zip(images.pixels.split(1000), images.labels.split(1000), strict=True):
            right += (net(pixels.float() * factor - shift).argmax(1) == labels).sum()
    return int(right) / len(images.labels)


def save_weights(nets: dict[str, Sequence[nn.Module]], setting: Setting) -> None:
    """Write all nets of the ladder so far into one file, with names prefixed by rung and seed."""
    tensors: dict[str, Tensor] = {}
    for name, of_rung in nets.items():
        for seed, net in zip(setting.seeds, of_rung if name != LARGE else (), strict=False):
            tensors.update(
                {f"{name}.{seed}.{key}": value.cpu().contiguous() for key, value in net.state_dict().items()}
            )
    # shared scales are stored twice, under both names
    save_file(
        {key: value.clone() for key, value in tensors.items()},
        setting.out / f"gpu_ladder_{setting.record['set']}.safetensors",
    )


def read_net(rung: Rung, name: str, state: dict[str, Tensor], pixels: Tensor) -> nn.Module:
    """Return a ladder's net with its weights, in eval mode, a student on the deployed arithmetic.

    Args:
        rung: The rung that trained it.
        name: Name of the float net.
        state: Its weights.
        pixels: Images of the shape that it takes.
    """
    net = build_net(name, classes=10, channels=pixels.shape[1], image_size=pixels.shape[-1])
    if rung.bits is not None:
        spec = QuantSpec(weight_bits=rung.bits, act_bits=rung.bits)
        net = prepare(net, spec, example_inputs=pixels[:2].float().cpu())
    net.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    net.eval()
    if rung.bits is not None:
        settle(net)
    return net


def states_of(tensors: dict[str, Tensor], rung: str, seeds: Sequence[int]) -> list[dict[str, Tensor]]:
    """Return the weights of each seed of a rung, as :func:`save_weights` wrote them."""
    prefixes = [f"{rung}.{seed}." for seed in seeds]
    return [
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for prefix in prefixes
    ]


def read_floats(file: Path, setting: Setting) -> list[nn.Module]:
    """Return the float nets from an earlier ladder's weights."""
    rung = next(rung for rung in setting.images.rungs if rung.name == FLOAT)
    states = states_of(load_file(file), FLOAT, setting.seeds)
    nets = [read_net(rung, setting.net, state, setting.train.pixels) for state in states]
    return [net.to(setting.device).requires_grad_(False) for net in nets]


def run(setting: Setting, rungs: Sequence[Rung], floats: Sequence[nn.Module]) -> None:
    """Train the rungs in order, each within its share of the remaining time.

    Args:
        setting: What they share.
        rungs: The rungs to train.
        floats: Nets of an earlier ladder that students start from; empty if this one trains its own.
    """
    nets: dict[str, Sequence[nn.Module]] = {FLOAT: floats} if floats else {}
    for index, rung in enumerate(rungs):
        share = rung.share / sum(one.share for one in rungs[index:])
        reserve = 6.0 if setting.device.type == "cuda" else 0.0
        nets[rung.name] = train_rung(rung, setting, nets.get("fp", ()), max(1.0, share * (setting.left_s - reserve)))
        for net in nets[rung.name]:
            net.requires_grad_(rung.bits is not None)
        if rung.name == LARGE:
            weights = {key: value.to(torch.bfloat16).cpu() for key, value in nets[LARGE][0].state_dict().items()}
            save_file(weights, setting.out / f"gpu_ladder_{setting.record['set']}_large.safetensors")
            setting.table = _table(nets[LARGE][0], setting)
        save_weights(nets, setting)


def _table(teacher: nn.Module, setting: Setting) -> Tensor:
    start = time.monotonic()
    data = CropFlip(setting.train, padding=setting.images.padding)
    table = logit_table(teacher, data, normalizer(setting.train), setting.how[0])
    share = float((table[: len(data)].argmax(1) == setting.train.labels).float().mean())
    setting.record["table"] = {"seconds": round(time.monotonic() - start, 1), "accuracy_of_first_view": share}
    print(f"logits of {len(table):,} views: {setting.record['table']}", flush=True)
    return table


def main() -> None:
    """Parse the command line, read the images, run the ladder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(SETS), default="cifar10", help="determines rungs and crops")
    parser.add_argument("--data", type=Path, help="folder of the set's train and test .npz or .packed.npz")
    parser.add_argument("--made-up", type=int, metavar="N", help="N made-up images of the set's shape: only compiles")
    parser.add_argument("--tiny", action="store_true", help="made-up images and a small net, to test the program")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=480.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--rungs", nargs="+", help="rungs of the set (default: all)")
    parser.add_argument("--floats", type=Path, help="weights of an earlier ladder, to reuse its float nets")
    parser.add_argument("--no-test", action="store_true", help="do not read the test set; score.py does that later")
    parser.add_argument("--most-epochs", type=int, help="limit for every rung (default: as many as fit)")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget_s
    torch.backends.cudnn.benchmark = True
    set_fused(enabled=False)  # the whole step is compiled or captured: single kernels are not worth the wait
    device = torch.device(args.device)
    if args.tiny:
        args.net, args.batch, args.seeds, args.most_epochs = "resnet8", 32, args.seeds[:2], args.most_epochs or 3
        train, test = made_up_images(96, side=16), made_up_images(64, side=16, seed=1)
    elif args.made_up:
        one = SETS[args.set]
        train, test = (made_up_images(args.made_up, side=one.side, channels=one.channels, seed=at) for at in (0, 1))
    elif args.data is None:
        parser.error("one of --data, --made-up and --tiny is required")
    else:
        train, test = read_images(args.data, "train"), None if args.no_test else read_images(args.data, "test")
    how = [one for one in MACHINERY if not (args.eager and one.compiled)]
    record = {
        "what": "float net, then students that start from it; test set read once a training, at its end",
        "set": args.set, "images": "real" if args.data else "made up",
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("out", "data")},
        "environment": environment(device), "terms": asdict(WITH_TEACHER), "rungs": [],
    }  # fmt: skip
    setting = Setting(
        args.net, SETS[args.set], train.to(device), test and test.to(device), args.batch,
        tuple(args.seeds), args.out, deadline, args.most_epochs or 10**6, how, record,
    )  # fmt: skip
    setting.write()
    rungs = [rung for rung in setting.images.rungs if args.rungs is None or rung.name in args.rungs]
    floats = read_floats(args.floats, setting) if args.floats else []
    run(setting, [rung for rung in rungs if not (floats and rung.name == FLOAT)], floats)
    record["seconds"] = round(args.budget_s - setting.left_s, 1)
    setting.write()


if __name__ == "__main__":
    main()
