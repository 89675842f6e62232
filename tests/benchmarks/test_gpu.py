"""The program for a GPU, on the CPU: lanes do not touch each other, epochs show every image, plans fit their time."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qkd.config import TrainConfig
from qkd.nets import build_net
from quantizers import QuantSpec, calibrate, prepare, quantizer_scales
from quantizers.kernels import is_fused, set_fused

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
NAMES = ("images", "lanes", "record", "ladder")


@pytest.fixture(scope="module")
def gpu() -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.pop(0)
        for name in NAMES:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def unfused() -> Iterator[None]:
    before = is_fused()
    set_fused(enabled=False)
    yield
    set_fused(enabled=before)


def lanes_of(gpu: dict[str, Any], seeds: tuple[int, ...], *, bits: int | None, bound: float | None = 0.1) -> Any:
    images = gpu["images"].made_up_images(64, side=8)
    data = gpu["images"].CropFlip(images, padding=1)
    factor, shift = normal = gpu["images"].normalizer(images)
    lanes = []
    for seed in seeds:
        torch.manual_seed(seed)
        net = build_net("resnet8", classes=10, channels=3, image_size=8).train()
        teacher = None
        if bits:
            pixels = images.pixels[:16].float() * factor - shift
            student = prepare(net, QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=pixels[:2])
            calibrate(student, [pixels])
            net, teacher = student.train(), net.eval().requires_grad_(False)
        lanes.append(gpu["lanes"].Lane(net, teacher, data, 16, seed, TrainConfig(epochs=1, lr=0.1), bound=bound))
    how = gpu["lanes"].How(bf16=False, compiled=False, graphs=False)
    terms = gpu["lanes"].Terms(0.5, 0.5) if bits else gpu["lanes"].Terms()
    return gpu["lanes"].Lanes(lanes, terms, normal, how)


@pytest.mark.parametrize("bits", [None, 4])
def test_lanes_trained_together_equal_each_alone(gpu: dict[str, Any], bits: int | None) -> None:
    together = lanes_of(gpu, (0, 1), bits=bits)
    together.prepare()
    found = together.epoch(lambda step: 0.05)
    together.close()
    for index in (0, 1):
        alone = lanes_of(gpu, (index,), bits=bits)
        alone.prepare()
        assert alone.epoch(lambda step: 0.05) == [found[index]]
        alone.close()
        mine, its = alone.lanes[0].student.state_dict(), together.lanes[index].student.state_dict()
        assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_no_step_changes_a_step_size_by_more_than_the_bound(gpu: dict[str, Any]) -> None:
    """At a rate at which free ones are multiplied; the second lane trains with its own, not those of the first."""
    most = {}
    for bound in (None, 0.05):
        lanes = lanes_of(gpu, (0, 1), bits=2, bound=bound)
        lanes.prepare()
        lanes.close()  # every net has its own memory again
        scales = [list(quantizer_scales(lane.student)) for lane in lanes.lanes]
        before = [[scale.detach().clone() for scale in own] for own in scales]
        lanes.epoch(lambda step: 0.5 if step == 0 else 0.0)  # four steps, of which one moves
        lanes.close()
        most[bound] = [
            max(float((now.detach() / then - 1).abs().max()) for now, then in zip(own, old, strict=True))
            for own, old in zip(scales, before, strict=True)
        ]
    assert min(most[None]) > 0.1 and max(most[0.05]) <= 0.05 + 1e-6 and min(most[0.05]) > 0.04


def test_preparing_and_timing_train_nothing_and_an_epoch_does(gpu: dict[str, Any]) -> None:
    lanes = lanes_of(gpu, (0, 1), bits=2)
    before = [{k: v.clone() for k, v in lane.student.state_dict().items()} for lane in lanes.lanes]
    lanes.prepare()
    assert lanes.step_seconds(least_s=0.0) > 0
    lanes.close()
    for lane, state in zip(lanes.lanes, before, strict=True):
        assert all(torch.equal(state[k], v) for k, v in lane.student.state_dict().items())
    lanes.epoch(lambda step: 0.05)
    lanes.close()
    for lane, state in zip(lanes.lanes, before, strict=True):
        moved = {k for k, v in lane.student.state_dict().items() if not torch.equal(state[k], v)}
        assert {"conv1.weight", "fc.weight", "conv1.bn.running_mean"} <= moved


def test_a_student_of_a_frozen_teacher_trains_whole(gpu: dict[str, Any]) -> None:
    ladder, images = gpu["ladder"], gpu["images"].made_up_images(64, side=8)
    how = gpu["lanes"].How(bf16=False, compiled=False, graphs=False)
    setting = ladder.Setting(
        "resnet8", ladder.SETS["cifar10"], images, images, 16, (0,), Path("unused"), 0.0, 10**6, [how]
    )
    rung = next(rung for rung in ladder.SETS["fashion-mnist"].rungs if rung.bits == 2)
    torch.manual_seed(0)
    teacher = build_net("resnet8", classes=10, channels=3, image_size=8).eval().requires_grad_(False)
    student = ladder._start(rung, setting, 0, [teacher])
    ladder._require_trainable(student, rung)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = gpu["lanes"].weights_of(student)
    assert len(before) > 7 and all("scale" not in name for name in before)
    lanes = ladder._lanes(rung, setting, [student], [teacher], gpu["images"].CropFlip(images), how)
    lanes.prepare()
    assert gpu["lanes"].least_change(student, before)[1] == 0.0  # what a training that changes nothing looks like
    row: dict[str, Any] = {"rung": {"name": "w2a2"}}
    ladder._record_changes([student], [before], row)
    assert "did not change" in row["defect"]
    lanes.epoch(lambda step: 0.02)
    lanes.close()
    row = {"rung": {"name": "w2a2"}}
    ladder._record_changes([student], [before], row)
    assert "defect" not in row and row["least_weight_change"][0]["relative"] > 1e-4


def test_a_rung_refuses_frozen_parameters(gpu: dict[str, Any]) -> None:
    net = build_net("resnet8", classes=10, channels=3, image_size=8)
    net.conv1.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"w2a2: 1 parameters are frozen, including conv1.weight"):
        gpu["ladder"]._require_trainable(net, gpu["ladder"].SETS["fashion-mnist"].rungs[2])


def test_gradients_of_the_first_lane_are_those_of_its_loss(gpu: dict[str, Any]) -> None:
    lanes = lanes_of(gpu, (0,), bits=4)
    found = lanes.gradients()
    assert set(found) == {name for name, _ in lanes.student.named_parameters()}
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert float(found["conv1.weight"].norm()) > 0 and all(p.grad is None for p in lanes.student.parameters())


def test_an_epoch_shows_every_image_once_with_its_label(gpu: dict[str, Any]) -> None:
    images = gpu["images"].made_up_images(40, side=8)
    data = gpu["images"].CropFlip(images, padding=2)
    pixels, labels, places = data.epoch(torch.Generator().manual_seed(3), 40)
    assert pixels.shape == images.pixels.shape and pixels.dtype == torch.uint8
    padded = data.padded
    crops = torch.stack([padded[:, :, r : r + 8, c : c + 8] for r in range(5) for c in range(5)], 1)
    crops = torch.cat((crops, crops.flip(-1)), 1)  # [image, 50 crops, channels, height, width]
    sources = [[bool((crops[i] == shown).flatten(1).all(1).any()) for i in range(40)].index(True) for shown in pixels]
    assert sorted(sources) == list(range(40))
    assert torch.equal(images.labels[torch.tensor(sources)], labels)
    assert torch.equal(torch.cat([data.view(index) for index in range(data.views)])[places], pixels)


def test_a_table_holds_the_logits_of_the_very_views_that_a_step_shows(gpu: dict[str, Any]) -> None:
    images, lanes = gpu["images"].made_up_images(40, side=8), gpu["lanes"]
    data, normal = gpu["images"].CropFlip(images, padding=1), gpu["images"].normalizer(images)
    torch.manual_seed(0)
    teacher = build_net("resnet8", classes=10, channels=3, image_size=8).eval()
    table = lanes.logit_table(teacher, data, normal, lanes.How(bf16=False, compiled=False), batch=16)
    assert table.shape == (data.views * 40, 10) and data.views == 18
    pixels, _, places = data.epoch(torch.Generator().manual_seed(3), 32)
    with torch.no_grad():
        logits = teacher(pixels.float() * normal[0] - normal[1])
    assert torch.allclose(table[places].float(), logits, rtol=0.01, atol=0.01)


def test_a_lane_with_a_table_has_the_loss_of_one_with_the_teacher(gpu: dict[str, Any]) -> None:
    images, lanes = gpu["images"].made_up_images(32, side=8), gpu["lanes"]
    data, normal = gpu["images"].CropFlip(images, padding=1), gpu["images"].normalizer(images)
    torch.manual_seed(0)
    teacher, how = build_net("resnet8", classes=10, channels=3, image_size=8).eval(), lanes.How(False, False, False)
    table = lanes.logit_table(teacher, data, normal, how).float()
    found = []
    for its_teacher, its_table in ((teacher, None), (None, table)):
        torch.manual_seed(1)
        student = build_net("resnet8", classes=10, channels=3, image_size=8)
        lane = lanes.Lane(student, its_teacher, data, 16, 0, TrainConfig(epochs=1, lr=0.01), its_table)
        one = lanes.Lanes([lane], gpu["ladder"].WITH_TEACHER, normal, how)
        one.prepare()
        found.append(one.epoch(lambda step: 0.01)[0].loss)
    assert found[1] == pytest.approx(found[0], rel=0.01) and found[0] > 0


def test_padding_is_of_the_mean_color_and_a_shorter_epoch_is_shorter(gpu: dict[str, Any]) -> None:
    images = gpu["images"].made_up_images(20, side=8)
    data = gpu["images"].CropFlip(images, padding=2)
    assert torch.equal(data.padded[0, :, 0, 0], (images.mean * 255).round().to(torch.uint8))
    assert torch.equal(data.padded[:, :, 2:-2, 2:-2], images.pixels)
    assert len(data.epoch(torch.Generator().manual_seed(0), 16)[1]) == 16


def test_the_rate_rises_then_falls_to_zero(gpu: dict[str, Any]) -> None:
    rate, warm_up = gpu["ladder"].rate, gpu["ladder"].WARM_UP
    assert 0 < rate(0.0, 0.1) < rate(warm_up / 2, 0.1) < 0.1
    assert rate(warm_up, 0.1) == pytest.approx(0.1)
    assert rate((1 + warm_up) / 2, 0.1) == pytest.approx(0.05)
    assert rate(1.0, 0.1) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("seconds", "epoch_s"), [(100.0, 1.0), (0.1, 1.0), (1e9, 1.0), (60.0, 0.37)])
def test_a_plan_fits_its_time_and_ends_on_the_deployed_arithmetic(
    gpu: dict[str, Any], seconds: float, epoch_s: float
) -> None:
    ladder = gpu["ladder"]
    images = gpu["images"].made_up_images(20, side=8)
    setting = ladder.Setting(
        "resnet8", ladder.SETS["cifar10"], images, images, 16, (0,), Path("unused"), 0.0, 10**6, ladder.MACHINERY
    )
    for rung in [rung for one in ladder.SETS.values() for rung in one.rungs]:
        settling, total = ladder._plan(rung, setting, seconds, epoch_s)
        assert 1 <= total <= rung.most_epochs
        assert (settling == 0) == (rung.bits is None) and settling < max(total, 2)
        if total > 2:
            assert (total + 3 * settling) * epoch_s <= seconds + 3 * epoch_s


def test_the_script_refuses_what_it_does_not_know() -> None:
    import subprocess

    done = subprocess.run(["bash", str(FOLDER.parent / "gpu.sh"), "--bugdet", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and "--bugdet" in done.stderr
