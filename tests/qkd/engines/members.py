"""What two processes do together for `test_group.py`, and one process: `members.py OUT FOLDER CHECK...`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.agents import build_agent, load_schedule
from qkd.config import AgentConfig, DataConfig, RunConfig, TermConfig, TrainConfig
from qkd.engines.engine import FirstFailedError, current
from qkd.engines.joining import joined
from qkd.files import may_write, write_safetensors
from qkd.progress import Silent
from qkd.run.folder import RunFolder
from qkd.seeding import global_stream
from qkd.stages import STAGES
from qkd.terms.combine import clipped_backward
from qkd.terms.loss_table import LOSSES
from qkd.terms.weighting import Outputs, build_terms
from qkd.testing import TinyNet, synthetic_splits, tiny_config
from qkd.training import Batch, Job, Phase, StepResult, TrainingError, accuracy, fit, supervised_step
from quantizers import QuantSpec, calibrate, freeze_batch_norm, prepare, set_fused

Found = dict[str, Tensor]
CPU = torch.device("cpu")
DATA = DataConfig(name="npz", path=Path("unused"), batch_size=16, eval_batch_size=20)
TAPS = [["layer3", "layer3"]]
SOFT = [{"loss": "cross_entropy"}, {"loss": "soft_target"}]
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"student.agent": {"policy": "cutmix", "crop_padding": 1}},
    "views": {"student.view": "own", "student.agent": {"policy": "randaugment", "crop_padding": 1}},
    "relations": {
        "student.terms": [
            {"loss": "cross_entropy"},
            {"loss": "hint", "taps": TAPS},
            {"loss": "similarity_preserving", "weight": 5, "taps": TAPS},
        ],
        "student.view": "clean",
    },
    "clipped": {
        "student.terms": SOFT,
        "student.phases": [{"name": "clipped", "epochs": 1, "combine": "clipped"}],
        "student.train": {"epochs": 1, "lr": 0.01},
    },
    "peers": {"student.peers": {"nets": [{}, {"weight_bits": 8, "act_bits": 8}], "taps": ["layer2"]}},
    "rotations": {"student.rotations": {"teacher_branches": {"train": {"epochs": 1, "lr": 0.05}}}},
    "rotations_online": {"teacher.train": None, "teacher.untrained": True, "student.rotations": {"mode": "online"}},
    "ensemble_and_auxiliary": {
        "teacher.members": 2,
        "student.terms": SOFT,
        "student.auxiliary": {"train": {"epochs": 1, "lr": 0.01}, "terms": SOFT},
    },
    "co_study": {
        "student.phases": [
            {"name": "co_study", "epochs": 1, "teacher_terms": SOFT},
            {"name": "settling", "epochs": 1, "freeze_batch_norm": True},
        ]
    },
    "search": {
        "teacher.agent": {"policy": "search", "crop_padding": 1},
        "student.agent": {"policy": "teacher"},
        "search": {"members": 2, "epochs": 2, "interval_epochs": 1, "train_images": 32, "val_images": 12},
    },
}


def tensors(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def mine(rows: Tensor) -> Tensor:
    return rows[current().share(len(rows))]


def averaged(values: Found) -> Found:
    current().average(list(values.values()))
    return values


def gradients(net: nn.Module) -> Found:
    return {name: one.grad for name, one in net.named_parameters() if one.grad is not None}


def job(folder: Path, **train: Any) -> Job:
    with global_stream(0, "init"):
        net = TinyNet()
    config = TrainConfig.model_validate({"epochs": 2, "lr": 0.1, **train})
    splits = synthetic_splits(train=72, val=18)  # 4 full batches, and 8 images that are left over
    agent = build_agent(AgentConfig(policy="cutmix", crop_padding=1), epochs=2, mean=splits.mean)
    phases = (Phase("supervised", 2, supervised_step(net)),)
    folder.mkdir(parents=True, exist_ok=True)
    return Job("teacher", net, config, DATA, splits, agent, phases, 0, CPU, folder)


def trained(folder: Path, **train: Any) -> Found:
    made = job(folder, **train)
    rows = fit(made, Silent()).rows
    facts = {
        f"row/{index}/{name}": torch.tensor(row[name])
        for index, row in enumerate(rows)
        for name in ("train_loss", "train_accuracy", "val_accuracy")
    }
    return {**{name: one.clone() for name, one in made.model.state_dict().items()}, **facts}


def float_training(folder: Path) -> Found:
    return trained(folder / "float", clip_grad_norm=1.0, ema_decay=0.9, checkpoint_every_s=0)


def resumed_training(folder: Path) -> Found:
    """Stop after the first epoch's second step, as a kill would, and continue from the checkpoint."""
    made, steps = job(folder / "resumed", checkpoint_every_s=0), 0

    def step(batch: Batch) -> StepResult:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return supervised_step(made.model)(batch)

    stopped = replace(made, phases=(Phase("supervised", 2, step),))
    try:
        fit(stopped, Silent())
    except KeyboardInterrupt:
        current().wait()
    return trained(folder / "resumed", checkpoint_every_s=0)


def unbroken_training(folder: Path) -> Found:
    return trained(folder / "unbroken", checkpoint_every_s=0)


def training_apart(folder: Path) -> Found:
    """Train with batch norm over each process's own share."""
    engine = current()
    engine.synchronizes = False
    try:
        return trained(folder / "apart")
    finally:
        engine.synchronizes = True


def broken_training(folder: Path) -> Found:
    """Let the loss of one process's images be broken: all say so, in the same words."""
    made = job(folder / "broken")
    plain = supervised_step(made.model)

    def step(batch: Batch) -> StepResult:
        result = plain(batch)
        assert batch.samples is not None
        loss = result.loss * (float("nan") if 7 in batch.samples else 1.0)
        return StepResult(loss, {"cross_entropy": loss}, result.logits)

    try:
        fit(replace(made, phases=(Phase("broken", 2, step),)), Silent())
    except TrainingError as error:
        said = current().texts(str(error))
        assert set(said) == {str(error)} and "term cross_entropy nan" in str(error), said
        return {"epoch": torch.tensor(error.epoch), "step": torch.tensor(error.step)}
    raise AssertionError("it has trained on")


def batch_norms(_: Path) -> Found:
    found: Found = {}
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        "2d": (nn.BatchNorm2d(3), tensors(8, 3, 5, 5) * 4 + 100),
        "channels last": (nn.BatchNorm2d(3), tensors(8, 3, 5, 5).contiguous(memory_format=torch.channels_last)),
        "1d": (nn.BatchNorm1d(6, momentum=None), tensors(8, 6)),
        "pixel": (nn.BatchNorm2d(3), tensors(8, 3, 1, 1) * 4 + 100),
        "untracked": (nn.BatchNorm2d(3), tensors(8, 3, 5, 5).contiguous(memory_format=torch.channels_last)),
        "plain": (nn.BatchNorm2d(3, affine=False, track_running_stats=False), tensors(8, 3, 2, 2)),
    }
    layers["untracked"][0].track_running_stats = False
    for name, (layer, x) in layers.items():
        own = mine(x).clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.no_grad():
            for one in layer.parameters():
                one += 0.5
        with current().training([layer]):
            for _ in range(2):
                out = layer(own)
            (out.square() * mine(tensors(*x.shape, seed=1))).mean().backward()
        assert "forward" not in vars(layer)
        assert current().size == 1 or current()._wires is not None, "small sums take their own way"  # type: ignore[attr-defined]
        found[f"{name}/out"] = current().whole(out.detach())
        assert own.grad is not None
        found[f"{name}/by x"] = current().whole(own.grad) / current().size
        grads = {key: value.clone() for key, value in gradients(layer).items()}
        found |= {f"{name}/by {key}": value for key, value in averaged(grads).items()}
        found |= {f"{name}/{key}": value for key, value in layer.named_buffers()}
    return found


def every_loss(_: Path) -> Found:
    """Return each loss's gradients by the student's logits and features, and those of its module."""
    found: Found = {}
    labels, logits, taught = torch.arange(8) % 4, tensors(8, 4), tensors(8, 4, seed=1)
    stages = {"a": tensors(8, 3, 4, 4, seed=2), "b": tensors(8, 5, 2, 2, seed=3)}
    lessons = {name: tensors(*value.shape, seed=9 + len(name)) + value.flip(1) for name, value in stages.items()}
    for loss, entry in LOSSES.items():
        if entry.name == "graph_attention_loss" or entry.taught_by:
            continue  # their modules have batch norm and attention of random weights: in the methods' tests
        taps = [["a", "a"], ["b", "b"]] if entry.needs_taps else []
        terms = build_terms([TermConfig.model_validate({"loss": loss, "taps": taps})])
        own = {name: mine(value).clone().requires_grad_() for name, value in {"logits": logits, **stages}.items()}
        given = Outputs(
            own["logits"], mine(labels), mine(taught), {name: own[name] for name in stages},
            {name: mine(value) for name, value in lessons.items()}, tensors(4, 6, seed=5),
        )  # fmt: skip
        value, _ = terms(given)
        value.backward()
        found[f"{loss}/value"] = averaged({"": value.detach().clone()})[""]
        for name, one in own.items():
            if one.grad is not None:
                found[f"{loss}/{name}"] = current().whole(one.grad) / current().size
    return found


def clipped(_: Path) -> Found:
    with global_stream(0, "init"):
        net = TinyNet()
    images, labels = mine(tensors(8, 1, 8, 8)), mine(torch.arange(8) % 4)
    with current().training([net]):
        logits = net(images)
        task = functional.cross_entropy(logits, labels)
        clipped_backward(task, 20 * logits.square().mean(), lambda loss: loss, net.parameters(), epoch=1)
    return gradients(net)


def frozen_student(_: Path) -> Found:
    """Return the gradients of a low-bit student on the deployed arithmetic."""
    with global_stream(0, "init"):
        net = TinyNet()
    images, labels = tensors(16, 1, 8, 8), torch.arange(16) % 4
    student = prepare(net, QuantSpec(weight_bits=4, act_bits=4), images[:1])
    calibrate(student, [images])
    student.train()
    freeze_batch_norm(student)
    with current().training([student]):
        functional.cross_entropy(student(mine(images)), mine(labels)).backward()
    return averaged(gradients(student))


def talk(folder: Path) -> Found:
    """Return what is the same in all processes, whoever says it."""
    engine = current()
    assert engine.decide(engine.is_first) and not engine.decide(not engine.is_first)
    assert engine.first(lambda: ["said", 1]) == ["said", 1]
    assert engine.texts(f"text {engine.rank}") == [f"text {rank}" for rank in range(engine.size)]
    assert engine.in_turn(lambda: engine.rank) == engine.rank
    assert may_write() == engine.is_first
    try:
        engine.first(lambda: json.loads("no JSON"))
    except FirstFailedError:
        assert not engine.is_first
    except ValueError:
        assert engine.is_first
    with global_stream(0, "init"):
        net = TinyNet()
    nn.init.constant_(net.head.bias, engine.rank + 1.0)
    net.stem.get_buffer("1.num_batches_tracked").add_(engine.rank)
    engine.copy_first([net])
    splits = synthetic_splits(val=50)
    right = accuracy(net, splits.val, splits, DATA, CPU)
    sums = engine.sums({"one": torch.tensor(1.0) / engine.size, "two": torch.tensor(2) / engine.size})
    return {
        **sums,
        "bias": net.head.bias.detach(),
        "batches": net.stem[1].num_batches_tracked,
        "right": torch.tensor(right),
    }  # type: ignore[union-attr,dict-item]


def found_schedule(run: RunFolder) -> Tensor:
    """Return a number that stands for the schedule that the teacher's search has found."""
    segments = repr(load_schedule(run.path / "search" / "teacher.schedule.yaml").segments)
    return torch.tensor(int(hashlib.sha256(segments.encode()).hexdigest()[:8], 16))


def method(name: str) -> Callable[[Path], Found]:
    def run(folder: Path) -> Found:
        config: RunConfig = tiny_config(folder / "data", {"name": name, "data.eval_batch_size": 20, **METHODS[name]})
        with current().in_turn(lambda: RunFolder.open(config, folder)) as run:
            for stage in ("teacher", "search", "distill"):
                STAGES[stage](run, Silent())
                current().wait()
            assert current().first(lambda: run.why_incomplete("distill")) == ""
        rows = [json.loads(line) for line in (run.path / "student" / "metrics.jsonl").read_text().splitlines()]
        losses = {
            name: torch.tensor(rows[place]["train_loss"]) for name, place in (("first loss", 0), ("last loss", -1))
        }
        return losses | ({"schedule": found_schedule(run)} if name == "search" else {})

    return run


CHECKS: dict[str, Callable[[Path], Found]] = {
    "float": float_training,
    "resumed": resumed_training,
    "unbroken": unbroken_training,
    "apart": training_apart,
    "batch norms": batch_norms,
    "broken": broken_training,
    "losses": every_loss,
    "clipped": clipped,
    "frozen student": frozen_student,
    "talk": talk,
    **{f"method {name}": method(name) for name in METHODS},
}


def results(folder: Path, names: list[str]) -> Found:
    set_fused(enabled=False)
    torch.set_num_threads(1)
    return {
        f"{check}|{name}": value.detach().clone() for check in names for name, value in CHECKS[check](folder).items()
    }


if __name__ == "__main__":
    out, place, *wanted = sys.argv[1:]
    with joined("cpu") as engine:
        found = results(Path(place), wanted)
        digest = json.dumps({name: value.double().sum().item() for name, value in found.items()})
        for rank, said in enumerate(engine.texts(digest)):  # who only reads has no other way to tell
            if engine.is_first:
                Path(out).with_suffix(f".{rank}.json").write_text(said)
        write_safetensors(Path(out), found)
