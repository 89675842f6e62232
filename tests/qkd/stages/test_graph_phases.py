"""MHGD and KD-SVD in the distill stage: attention first, clipped gradients, resuming, and what the run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from export import export_onnx
from qkd.checking import name_faults
from qkd.data import load_splits, normalize
from qkd.files import read_safetensors, sha256_of
from qkd.nets import build_net
from qkd.progress import Silent
from qkd.roles.learner import stretched_phases
from qkd.roles.nets import load_student
from qkd.roles.phases import distillation
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import run_tiny, tiny_config
from qkd.training import Batch
from qkd.training.loop import Trainer
from quantizers import QuantSpec, Student, calibrate, prepare

pytestmark = pytest.mark.usefixtures("unfused")

STAGE_TAPS = [[f"layer{number}"] * 2 for number in (1, 2, 3)]
TERMS = [
    {"loss": "cross_entropy"},
    {"loss": "multi_head_graph", "taps": STAGE_TAPS, "options": {"singular_weight": 1}},
    {"loss": "singular_vector", "taps": STAGE_TAPS},
    {"loss": "logit_relation"},
]
PHASES = [
    {"name": "attention", "epochs": 2, "trains": "modules", "terms": [{"loss": "graph_attention", "taps": STAGE_TAPS}]},
    {"name": "tutoring", "epochs": 2, "combine": "clipped"},
    {"name": "settling", "epochs": 1, "combine": "clipped", "freeze_batch_norm": True},
]
CHANGES = {
    "seed": 2,  # one whose first epochs learn by more than float rounding, which differs from processor to processor
    "teacher.net": "wrn_16_2",  # twice as wide as the student: every stage needs an adapter
    "teacher.train.epochs": 1,
    "student.net": "resnet8",
    "student.init": "random",
    "student.train.epochs": 5,
    "student.train.checkpoint_every_s": 0,
    "student.terms": TERMS,
    "student.phases": PHASES,
}


def config(data: Path, **changes: Any) -> Any:
    return tiny_config(data, CHANGES | changes)


def rows(run: RunFolder) -> list[dict[str, Any]]:
    lines = (run.path / "student" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_learns_and_leaves_no_trace_and_a_killed_one_goes_on_bit_for_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    settings = config(data, **{"student.quant.weight_bits": bits, "student.quant.act_bits": bits})
    whole = run_tiny(settings, tmp_path / "whole", "teacher", "search", "distill")
    table = rows(whole)
    attention = [row["terms"]["graph_attention"] for row in table[:2]]
    assert attention[1] < attention[0]
    assert set(table[2]["terms"]) == {"cross_entropy", "multi_head_graph", "singular_vector", "logit_relation"}
    assert table[-1]["terms"]["cross_entropy"] < table[2]["terms"]["cross_entropy"]
    names = read_safetensors(whole.path / "student" / "weights.safetensors")
    assert not [name for name in names if "attention" in name or "adapter" in name or "estimator" in name]
    export_onnx(load_student(whole), torch.zeros(2, 1, 8, 8), tmp_path / "student.onnx", flavor="ort")
    graph = onnx.load(str(tmp_path / "student.onnx")).graph
    assert len([node for node in graph.node if "Conv" in node.op_type]) == 9  # the net's own, shortcuts included

    step, count = Trainer._step, [0]

    def kill(self: Trainer, *arguments: Any) -> Any:
        count[0] += 1
        if self.job.role == "student" and count[0] in (at_first, at_second):
            raise Killed
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", kill)
    parts = RunFolder.open(settings, tmp_path / "parts")
    STAGES["teacher"](parts, Silent())
    STAGES["search"](parts, Silent())
    at_first, at_second = count[0] + 5, count[0] + 12  # in the second epoch of attention, and while tutoring
    for _ in range(2):
        with pytest.raises(Killed):
            STAGES["distill"](parts, Silent())
    STAGES["distill"](parts, Silent())
    assert rows(parts) == table
    hashes = [sha256_of(run.path / "student" / "weights.safetensors") for run in (whole, parts)]
    assert hashes[0] == hashes[1]


def built(data: Path, settings: Any) -> tuple[Any, Student, Any, list[Batch]]:
    """Return a distillation, its nets, and the batches of an epoch."""
    splits = load_splits(settings.data, seed=0)
    sizes = {"classes": 4, "channels": 1, "image_size": 8}
    torch.manual_seed(0)
    teacher, net = build_net("wrn_16_2", **sizes).eval(), build_net("resnet8", **sizes)
    raw, labels = splits.train.batch(torch.arange(32), "cpu")
    images = normalize(raw, splits.mean, splits.std)
    student = prepare(net, QuantSpec(weight_bits=2, act_bits=2), example_inputs=images[:2])
    calibrate(student, [images])
    made = distillation(settings, settings.student.phases, student, teacher, None, net=net, splits=splits)
    return made, student, teacher, [Batch(images, labels, raw, epoch, 0) for epoch in range(5)]


def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def test_while_attention_learns_the_student_stands_still(data: Path) -> None:
    made, student, teacher, batches = built(data, config(data))
    (partner,) = made.partners
    before = {name: tensor.clone() for net in (student, teacher) for name, tensor in net.state_dict().items()}
    phase = made.phases[0]
    student.train()
    phase.enter()
    with phase.hold():
        result = phase.step(batches[0])
    phase.backward(batches[0], result, lambda loss: loss)
    assert gradients(student) == [] and gradients(teacher) == [] and gradients(partner.module)
    after = {name: tensor for net in (student, teacher) for name, tensor in net.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_are_clipped_by_the_tasks_norm_and_the_epoch(data: Path) -> None:
    made, student, _, batches = built(data, config(data))
    (partner,) = made.partners
    attention, tutoring, settling = made.phases
    partner.module.train()
    student.train()
    attention.enter()
    with attention.hold():
        attention.step(batches[0])
    shares = ((tutoring, 2, 0.5), (tutoring, 3, 0.731), (settling, 4, 0.881))  # the logistic function of 0, 1, 2
    for phase, epoch, share in shares:
        batch = batches[epoch]
        student.train()
        phase.enter()
        parts = []
        for which in ("task", "knowledge", None):
            student.zero_grad()
            partner.module.zero_grad()
            torch.manual_seed(0)
            with phase.hold():
                result = phase.step(batch)
            if which is None:
                phase.backward(batch, result, lambda loss: loss)
            else:
                getattr(result, which).backward()
            parts.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
        task, knowledge, found = parts
        clipped = 0
        assert set(found) == set(task)
        for name, gradient in found.items():
            limit = share * task[name].norm()
            if name in knowledge and knowledge[name].norm() > limit:
                clipped += 1
                assert (gradient - task[name]).norm().item() == pytest.approx(limit.item(), rel=2e-3, abs=1e-7)
            elif name in knowledge:
                torch.testing.assert_close(gradient, task[name] + knowledge[name])
        assert clipped > 5
        adapters = [g for name, g in partner.module.named_parameters() if "adapters" in name or "maps" in name]
        assert adapters and all(parameter.grad is not None for parameter in adapters)


def test_clipping_counts_its_epochs_from_the_first_phase_that_clips(data: Path) -> None:
    """Not from the first one with the student's terms, from which their decay counts."""
    terms = [{"loss": "cross_entropy"}, {"loss": "soft_target", "weight": 1e4}]
    phases = [{"epochs": 3}, {"epochs": 2, "combine": "clipped"}]
    made, student, _, batches = built(data, config(data, **{"student.terms": terms, "student.phases": phases}))
    clipped, batch = made.phases[1], batches[4]  # the second epoch that clips
    weight = student.get_parameter(next(name for name, p in student.named_parameters() if p.dim() == 4))
    student.train()
    clipped.enter()
    with clipped.hold():
        result = clipped.step(batch)
        (task,) = torch.autograd.grad(result.task, weight, retain_graph=True)
        clipped.backward(batch, result, lambda loss: loss)
    assert weight.grad is not None
    assert ((weight.grad - task).norm() / task.norm()).item() == pytest.approx(0.731, rel=1e-3)


def test_attention_that_nothing_trains_is_told_at_once(data: Path) -> None:
    settings = config(data, **{"student.train.epochs": 3, "student.phases": PHASES[1:]})
    with pytest.raises(ValueError, match=r"phases\[0\].terms: nothing trains the attention of multi_head_graph"):
        built(data, settings)
    raw = {"student": {"terms": TERMS, "phases": PHASES[1:]}}
    found = {where: what for where, what in name_faults(raw) if "attention" in what}
    assert list(found) == [("student", "phases", 0, "terms"), ("student", "phases", 1, "terms")]
    assert list(name_faults({"student": {"terms": TERMS, "phases": PHASES}})) == []


def test_terms_without_phases_and_an_auxiliarys_are_looked_at_as_well() -> None:
    graph = [{"loss": "cross_entropy"}, {"loss": "multi_head_graph", "taps": [["a", "a"], ["b", "b"]]}]
    ((where, what),) = name_faults({"student": {"terms": graph}})
    assert where == ("student", "terms") and "nothing trains the attention" in what
    ((where, what),) = name_faults({"student": {"auxiliary": {"terms": graph}}})
    assert where == ("student", "auxiliary", "terms") and "nothing trains the attention" in what
    phases = [{"epochs": 1, "terms": [{"loss": "soft_target"}], "combine": "clipped"}]
    ((where, what),) = name_faults({"student": {"auxiliary": {"phases": phases}}})
    assert where == ("student", "auxiliary", "phases", 0, "combine") and "works without the teacher" in what
    peers = {"student": {"peers": {"nets": [{}]}, "phases": [{"epochs": 1, "combine": "clipped"}]}}
    ((where, what),) = name_faults(peers)
    assert where == ("student", "phases", 0, "combine") and "set `peers: false`" in what


def test_modules_that_no_tap_needs_are_told(data: Path) -> None:
    own = [{"name": "warm", "epochs": 1, "trains": "modules", "terms": [{"loss": "hint", "taps": [["fc", "fc"]]}]}]
    rest = [{"epochs": 4, "terms": [{"loss": "cross_entropy"}]}]
    with pytest.raises(ValueError, match="phase warm: trains `modules`, but no term needs one at these taps"):
        built(data, config(data, **{"student.phases": own + rest}))


def test_one_tap_relates_nothing(data: Path) -> None:
    terms = [{"loss": "singular_vector", "taps": STAGE_TAPS[:1]}]
    ((where, what),) = name_faults({"student": {"terms": terms}})
    assert where == ("student", "terms", 0, "taps") and "name at least 2, got 1" in what


def test_a_short_search_keeps_the_attentions_phase(data: Path) -> None:
    made = config(data, **{"student.train.epochs": 40, "student.phases": [
        PHASES[0], {"epochs": 38, "combine": "clipped"}
    ]})  # fmt: skip
    assert [(phase.name, phase.epochs) for phase in stretched_phases(made, 4)] == [("attention", 1), ("tutoring", 3)]
    many = [{**PHASES[0], "epochs": 1} for _ in range(5)]
    made = config(data, **{"student.train.epochs": 6, "student.phases": [*many, {"epochs": 1}]})
    with pytest.raises(ValueError, match="search.epochs: 4 is too few for the student's 6 phases"):
        stretched_phases(made, 4)
