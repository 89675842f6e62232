"""Two hundred random nets: rewritten, trained a few steps, exported, and equal to their files, kernel by kernel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import beside
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn import functional as F  # noqa: N812

import quantizers
from export import ParityReport, check_parity, export_onnx
from quantizers import QuantSpec

random_nets = beside.load(Path(__file__).with_name("random_nets.py"))
pytestmark = pytest.mark.usefixtures("eager")
NETS = 200


def trained_student(spec: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return a student after three steps on random images that carry a color by class, and unseen images."""
    torch.manual_seed(spec.seed)
    model = random_nets.RandomNet(spec)
    labels = torch.arange(8) % 5
    colors = torch.randn(5, spec.channels, 1, 1)
    batches = [colors[labels] + torch.randn(8, spec.channels, *spec.size) for _ in range(5)]
    quant = QuantSpec(
        weight_bits=spec.weight_bits, act_bits=spec.act_bits, first_bits=spec.edge_bits, last_bits=spec.edge_bits,
        sum_bits=spec.sum_bits, per_channel=spec.per_channel,
    )  # fmt: skip
    student = quantizers.prepare(model, quant, example_inputs=batches[0])
    quantizers.calibrate(student, batches[:2])
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    for batch in batches[:3]:
        optimizer.zero_grad()
        F.cross_entropy(student(batch), labels).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    quantizers.settle(student)
    return student.eval(), [batch[: spec.batch] for batch in batches[3:]]


def check(spec: Any, folder: Path) -> ParityReport:
    student, batches = trained_student(spec)
    path = folder / "student.onnx"
    export_onnx(student, batches[0], path)
    report = check_parity(student, path, batches)
    assert report.layers and all("top-1" in note or "zero" in note for note in report.notes), report.notes
    # equal logits may come in either order, so classes are not compared here but the logits behind them
    assert report.off.max_steps is not None and report.off.max_steps < 0.5, report.off
    for layer in report.layers:
        assert layer.differing == 0 and layer.differing_on == 0, layer
    return report


@pytest.mark.slow
def test_random_nets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=NETS, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(spec=random_nets.net_specs())
    def run(spec: Any) -> None:
        report = check(spec, tmp_path)
        seen["nets"] += 1
        seen["codes"] += sum(layer.values for layer in report.layers)
        seen["differing off"] += sum(layer.differing for layer in report.layers)
        seen["differing on"] += sum(layer.differing_on for layer in report.layers)
        seen["images"] += report.images
        seen["other class on"] += report.on.differing
        seen["nets with several classes"] += report.predicted_classes > 1

    run()
    with capsys.disabled():
        print("\nrandom nets:", ", ".join(f"{count:,} {what}" for what, count in seen.items()))
    assert seen["nets"] >= NETS
    assert seen["differing off"] == seen["differing on"] == 0
    assert seen["nets with several classes"] > NETS // 4
