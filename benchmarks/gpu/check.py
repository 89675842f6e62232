"""Checks on a device what the CPU tests guarantee: same augmentation, same codes, bf16, resuming, captured steps.

    python benchmarks/gpu/check.py --out results/

Every check reports what it found, and none stops the others. The exit code is the number of failed checks.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkd.agents import build_agent
from qkd.config import AgentConfig, DataConfig, TrainConfig
from qkd.nets import build_net
from qkd.progress import Silent
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import Batch, Job, Phase, StepResult, fit, supervised_step
from quantizers import QuantSpec, calibrate, prepare
from quantizers.kernels import fake_quantize, fake_quantize_per_channel, is_fused, set_fused
from quantizers.modes import exact_float32

from images import CropFlip, made_up_images, normalizer  # isort: skip - next to this file
from ladder import WITH_TEACHER  # isort: skip
from lanes import How, Lane, Lanes, least_change, weights_of  # isort: skip
from record import distance, environment, is_equal, write_record  # isort: skip

Found = dict[str, Any]
CPU = torch.device("cpu")
POLICIES = ("crop_flip", "trivial", "randaugment", "pba", "cutmix")
CLOSE = 1e-4  # relative, for float32 sums in another order
FLIPS = 0.05  # relative, for a low-bit net's gradients: a reordered sum moves single activations across a tie
BF16_CLOSE = 0.05  # relative, for a loss whose forward pass keeps 8 bits of mantissa


def check_augmentation(device: torch.device) -> Found:
    """Check that every policy gives the same bytes here as on the CPU."""
    images = torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    labels, unequal = torch.arange(256) % 10, {}
    for policy in POLICIES:
        config = AgentConfig.model_validate({"policy": policy, "cutout": 8})
        agent = build_agent(config, epochs=4, mean=(0.49, 0.48, 0.45))
        here, there = (
            agent.with_labels(images.to(at), labels.to(at), generator=torch.Generator().manual_seed(1), epoch=3)[0]
            for at in (device, CPU)
        )
        unequal[policy] = int((here.cpu() != there).sum())
    return {"ok": not any(unequal.values()), "unequal_bytes": unequal}


def check_kernels(device: torch.device) -> Found:
    """Check both quantizers against the CPU's unfused ones: values bit for bit, gradients up to summation order."""
    found: Found = {"ok": True}
    for name, make in (("tensor", _tensor_case), ("channel", _channel_case)):
        set_fused(enabled=False)
        expected = make(CPU)
        for fused in (False, True):
            set_fused(enabled=fused)
            value, grad_x, grad_s = make(device)
            wrong = int((value.cpu() != expected[0]).sum())
            off = max(distance(grad_x, expected[1]), distance(grad_s, expected[2]))
            found[f"{name}_{'fused' if fused else 'eager'}"] = {"unequal_values": wrong, "gradient_distance": off}
            found["ok"] &= wrong == 0 and off < CLOSE
    found["fused_kernels_in_use"] = is_fused()
    return found


def _tensor_case(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor(0.0137)
    # half of the values are on ties, which reveal a division that is not correctly rounded
    ties = (torch.randint(0, 16, (32, 16, 16, 16), generator=generator) + 0.5) * scale
    x = torch.cat((torch.rand(32, 16, 16, 16, generator=generator) * 0.3 - 0.05, ties)).to(device).requires_grad_()
    scale = scale.to(device).requires_grad_()
    low, high = torch.tensor(0.0, device=device), torch.tensor(15.0, device=device)
    out = fake_quantize(x, scale, low, high, grad_scale=0.01)
    return _with_gradients(out, x, scale)


def _channel_case(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    scale = torch.rand(64, 1, 1, 1, generator=generator) * 0.05 + 0.01
    x = torch.randn(64, 32, 3, 3, generator=generator) * 0.1
    x[::2] = (torch.randint(-8, 8, (32, 32, 3, 3), generator=generator) + 0.5) * scale[::2]
    x, scale = x.to(device).requires_grad_(), scale.to(device).requires_grad_()
    low, high = torch.tensor(-8.0, device=device), torch.tensor(7.0, device=device)
    return _with_gradients(fake_quantize_per_channel(x, scale, low, high, grad_scale=0.01), x, scale)


def _with_gradients(out: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.device)
    (out * weights).sum().backward()
    assert x.grad is not None and scale.grad is not None  # noqa: S101 - both are leaves
    return out.detach(), x.grad, scale.grad


def check_student(device: torch.device) -> Found:
    """Check that a settled student computes the same on the device as on the CPU: codes agree, and so do logits."""
    set_fused(enabled=False)
    student, images = _student(2)
    student.eval()
    expected = student(images)
    moved = copy.deepcopy(student).to(device).eval()
    with torch.no_grad(), exact_float32():
        exact = moved(images.to(device))
    allowed = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        with torch.no_grad():
            loose = moved(images.to(device))
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    return {
        "ok": distance(exact, expected) < CLOSE, "equal": is_equal(exact, expected),
        "distance": distance(exact, expected), "distance_with_tf32": distance(loose, expected),
    }  # fmt: skip


def check_calibration(device: torch.device) -> Found:
    """Check that preparing, calibrating and settling work on the device and give the CPU's scales."""
    set_fused(enabled=False)
    here, _ = _student(4, device)
    there, _ = _student(4)
    scales = {name: value for name, value in there.state_dict().items() if name.endswith("scale")}
    worst = max(distance(here.state_dict()[name], value) for name, value in scales.items())
    return {"ok": worst < 0.01, "scales": len(scales), "worst_distance": worst}


def _student(bits: int, device: torch.device = CPU) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16).to(device)
    net = build_net("resnet8", classes=10, channels=3, image_size=16).to(device).train()
    student = prepare(net, QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=images[:2])
    calibrate(student, [images])
    return student, images


def check_bf16(device: torch.device) -> Found:
    """Check that a step under bfloat16 autocast is close to the float32 one, with finite gradients."""
    set_fused(enabled=False)
    losses, finite = {}, True
    for dtype in (torch.float32, torch.bfloat16):
        student, images = _student(4)
        student, images = student.to(device).train(), images.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = student(images)
        loss = nn.functional.cross_entropy(logits.float(), torch.arange(len(images), device=device) % 10)
        loss.backward()
        finite &= all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)
        losses[str(dtype).removeprefix("torch.")] = float(loss.detach())
    off = abs(losses["bfloat16"] / losses["float32"] - 1)
    return {"ok": finite and off < BF16_CLOSE, "losses": losses, "gradients_finite": finite}


class _Interrupted(Exception):
    pass


def check_resume(device: torch.device) -> Found:
    """Check that training that is interrupted twice ends with the weights of uninterrupted training, bit for bit.

    That can only be judged if two uninterrupted trainings give the same result, which GPU kernels do not guarantee. So
    the check also runs with deterministic algorithms, where it must hold.
    """
    found: Found = {"ok": True}
    for precision in ("float32", "bf16"):
        for kernels in ("default", "deterministic"):
            with deterministic(enabled=kernels == "deterministic"):
                differs, unsteady = _resumed(device, precision)
            verdict = "equal" if not differs else "two whole runs differ, too" if unsteady else "differs"
            found[f"{precision}_{kernels}"] = {
                "verdict": verdict, "tensors_that_differ": differs, "differ_between_two_whole_runs": unsteady
            }  # fmt: skip
            found["ok"] &= verdict == "equal" or (kernels == "default" and bool(unsteady))
    return found


@contextlib.contextmanager
def deterministic(*, enabled: bool) -> Iterator[None]:
    """Make PyTorch use only deterministic kernels within a block, and warn where it has none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    torch.backends.cudnn.benchmark = before[1] and not enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=only_warned)
        torch.backends.cudnn.benchmark = before[1]


def _resumed(device: torch.device, precision: str) -> tuple[list[str], list[str]]:
    """Return tensors that differ between resumed and uninterrupted training, and between two uninterrupted ones."""
    with tempfile.TemporaryDirectory() as folder:
        whole, again, cut = (Path(folder) / name for name in ("whole", "again", "cut"))
        expected = _trained(_job(whole, device, precision))
        repeats = _trained(_job(again, device, precision))
        for at in ((0, 2), (1, 1)):
            try:
                _trained(_job(cut, device, precision, stop_at=at))
            except _Interrupted:
                continue
        resumed = _trained(_job(cut, device, precision))
    differs = [name for name in expected if not is_equal(expected[name], resumed[name])]
    unsteady = [name for name in expected if not is_equal(expected[name], repeats[name])]
    return differs, unsteady


def _trained(job: Job) -> dict[str, Tensor]:
    fit(job, Silent())
    return {name: value.clone() for name, value in job.model.state_dict().items()}


def _job(folder: Path, device: torch.device, precision: str, *, stop_at: tuple[int, int] | None = None) -> Job:
    torch.manual_seed(0)
    net = TinyNet(dropout=0.2).to(device)
    splits = synthetic_splits(train=72, val=18)
    splits.train.to(device)
    splits.val.to(device)
    config = TrainConfig.model_validate({"epochs": 2, "lr": 0.1, "checkpoint_every_s": 0, "precision": precision})
    inner = supervised_step(net, label_smoothing=0.0)

    def step(batch: Batch) -> StepResult:
        if (batch.epoch, batch.step) == stop_at:
            raise _Interrupted
        return inner(batch)

    folder.mkdir(exist_ok=True)
    agent = build_agent(AgentConfig(policy="crop_flip", crop_padding=1), epochs=2, mean=splits.mean)
    data = DataConfig(name="npz", path=Path("unused"), batch_size=16, eval_batch_size=20)
    return Job(
        role="teacher", model=net, config=config, data=data, splits=splits, agent=agent,
        phases=(Phase("supervised", 2, step),), seed=0, device=device, folder=folder,
    )  # fmt: skip


def check_lanes(device: torch.device, *, compiled: bool) -> Found:
    """Check that two lanes with graphs (and compiled, if requested) train like each alone and eager, up to rounding."""
    set_fused(enabled=False)
    images = made_up_images(96, side=16).to(device)
    losses: dict[str, list[float]] = {}
    changes: list[tuple[str, float]] = []
    for name, how, seeds in (
        ("fast", How(bf16=False, compiled=compiled), (0, 1)),
        ("alone_0", How(bf16=False, compiled=False, graphs=False), (0,)),
        ("alone_1", How(bf16=False, compiled=False, graphs=False), (1,)),
    ):
        with exact_float32():
            lanes = Lanes(_some_lanes(images, seeds), WITH_TEACHER, normalizer(images), how)
            before = [weights_of(lane.student) for lane in lanes.lanes]
            lanes.prepare()
            totals = [lanes.epoch(lambda step: 0.01) for _ in range(2)][-1]
            lanes.close()
        losses[name] = [one.loss for one in totals]
        changes += [least_change(lane.student, its) for lane, its in zip(lanes.lanes, before, strict=True)]
    off = [abs(a / losses[f"alone_{seed}"][0] - 1) for seed, a in enumerate(losses["fast"])]
    least = min(changes, key=lambda item: item[1])
    return {
        "ok": max(off) < 0.02 and least[1] > 0, "losses": losses, "relative_difference": off,
        "least_weight_change": {"layer": least[0], "relative": least[1]},
    }  # fmt: skip


def check_gradients(device: torch.device) -> Found:
    """Check that every parameter of a 2-bit student with a teacher has the same gradient compiled as eager."""
    set_fused(enabled=False)
    images, found = made_up_images(96, side=16).to(device), {}
    for compiled in (False, True):
        how = How(bf16=False, compiled=compiled, graphs=False)
        with exact_float32():
            lanes = Lanes(_some_lanes(images, (0,), bits=2), WITH_TEACHER, normalizer(images), how)
            found[compiled] = lanes.gradients()
        count = sum(1 for _ in lanes.student.parameters())
    off = {name: distance(found[True][name], value) for name, value in found[False].items() if name in found[True]}
    worst = max(off, key=lambda name: off[name])
    missing = count - len(off)
    return {
        "ok": off[worst] < FLIPS and not missing, "parameters": count, "without_gradient": missing,
        "worst": {"parameter": worst, "distance": off[worst]},
    }  # fmt: skip


def _some_lanes(images: Any, seeds: tuple[int, ...], *, bits: int = 4) -> list[Lane]:
    device = images.pixels.device
    data, lanes = CropFlip(images), []
    for seed in seeds:
        torch.manual_seed(seed)
        teacher = build_net("resnet8", classes=10, channels=3, image_size=16).to(device).eval().requires_grad_(False)
        student = _student(bits)[0].to(device).train()
        lanes.append(Lane(student, teacher, data, 32, seed, TrainConfig(epochs=1, lr=0.01)))
    return lanes


def checks(*, compiled: bool) -> Iterator[tuple[str, Callable[[torch.device], Found]]]:
    """Yield name and function of every check."""
    yield "augmentation_equals_cpu", check_augmentation
    yield "quantizers_equal_cpu", check_kernels
    yield "settled_student_equals_cpu", check_student
    yield "calibration_on_device", check_calibration
    yield "bf16_autocast", check_bf16
    yield "resume_bit_for_bit", check_resume
    yield "captured_steps_train_alike", lambda device: check_lanes(device, compiled=False)
    if compiled:
        yield "compiled_gradients_equal_eager", check_gradients
        yield "compiled_steps_train_alike", lambda device: check_lanes(device, compiled=True)


def main() -> int:
    """Run every check, print one line for each, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="omit checks that compile whole steps")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic() needs it before cuBLAS starts
    device, results = torch.device(args.device), {}
    record = {"what": "checks on a device", "environment": environment(device), "checks": results}
    for name, function in checks(compiled=not args.eager):
        start = time.perf_counter()
        try:
            found = function(device)
        except Exception as error:
            traceback.print_exc()
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        results[name] = {**found, "seconds": round(time.perf_counter() - start, 2)}
        print(f"{'ok  ' if found['ok'] else 'FAIL'} {name}: {results[name]}", flush=True)
        write_record(args.out / "gpu_checks.json", record)
    return sum(not found["ok"] for found in results.values())


if __name__ == "__main__":
    sys.exit(main())
