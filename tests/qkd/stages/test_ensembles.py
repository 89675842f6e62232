"""Ensembles, peers and auxiliary teachers through the stages: files, results, resumption, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qkd.data import load_splits, normalize
from qkd.files import read_json, read_safetensors, sha256_of
from qkd.methods.auxiliary.method import load_auxiliary
from qkd.methods.ensemble.average import EnsembleTeacher
from qkd.methods.ensemble.method import load_ensemble, load_member
from qkd.methods.peers.nets import build_peers
from qkd.progress import Silent
from qkd.roles.guide import load_guide
from qkd.roles.nets import load_student, load_teacher
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import run_tiny, tiny_config
from quantizers import Student

pytestmark = pytest.mark.usefixtures("unfused")

SOFT = [{"loss": "cross_entropy"}, {"loss": "soft_target", "options": {"temperature": 2}}]
FLOW = [{"loss": "information_flow", "weight": 10, "decay": 0.7, "taps": [["layer3", "layer3"]],
         "options": {"reduction": "row_mean"}}, {"loss": "cross_entropy"}]  # fmt: skip
ENSEMBLE = {"teacher.members": 3, "teacher.train.epochs": 1, "student.terms": SOFT}
PEERS = {
    "student.init": "float",
    "student.float_train": {"epochs": 1, "lr": 0.05},
    "student.quant": {"weight_bits": 2, "act_bits": 2},
    "student.peers": {
        "nets": [{}, {"weight_bits": 4, "act_bits": 4}, {"net": "wrn_16_1"}],
        "taps": ["layer2", "layer3"],
    },
}


def result(run: RunFolder, name: str) -> dict[str, Any]:
    return json.loads((run.path / name / "result.json").read_text())


def rows(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / name / "metrics.jsonl").read_text().splitlines()]


# --- ensemble teacher


@pytest.fixture(scope="module")
def ensemble(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = tiny_config(data, {**ENSEMBLE, "name": "ensemble"})
    return run_tiny(config, tmp_path_factory.mktemp("runs"), "teacher", "search", "distill")


def test_members_differ_and_the_first_is_the_teacher(ensemble: RunFolder, data: Path, tmp_path: Path) -> None:
    hashes = [sha256_of(ensemble.path / "teacher" / part / "weights.safetensors")
              for part in ("", "member_1", "member_2")]  # fmt: skip
    assert len(set(hashes)) == 3
    alone = run_tiny(tiny_config(data, {**ENSEMBLE, "teacher.members": 1, "name": "alone"}), tmp_path, "teacher")
    assert sha256_of(alone.path / "teacher" / "weights.safetensors") == hashes[0]
    assert not (alone.path / "teacher" / "member_1").exists() and "ensemble" not in result(alone, "teacher")


def test_the_result_has_members_and_ensemble(ensemble: RunFolder) -> None:
    found = result(ensemble, "teacher")
    tests = [member["test_accuracy"] for member in found["members"]]
    assert tests[0] == found["test_accuracy"] and tests[1] == result(ensemble, "teacher/member_1")["test_accuracy"]
    assert found["members_mean"] == pytest.approx(sum(tests) / 3)
    assert found["members_spread"] == pytest.approx(torch.tensor(tests).double().std().item())
    assert found["ensemble"]["space"] == "probability" and 0 <= found["ensemble"]["test_accuracy"] <= 1
    splits = load_splits(ensemble.config.data, seed=0)
    images, labels = splits.test.batch(torch.arange(32), "cpu")
    with torch.no_grad():
        shown = normalize(images, splits.mean, splits.std)
        average = torch.stack([load_member(ensemble, number)(shown).softmax(1) for number in range(3)]).mean(0)
        teacher = load_ensemble(ensemble)
        assert isinstance(teacher, EnsembleTeacher) and not teacher.training
        torch.testing.assert_close(teacher(shown).softmax(1), average)
    accuracy = (average.argmax(1) == labels).double().mean().item()
    assert found["ensemble"]["test_accuracy"] == pytest.approx(accuracy)


def test_the_student_learns_from_the_ensemble(ensemble: RunFolder) -> None:
    inputs = read_json(ensemble.path / "manifests" / "distill.json")["inputs"]
    assert {f"teacher/member_{number}/weights.safetensors" for number in (1, 2)} <= set(inputs)
    assert len(rows(ensemble, "student")) == 2
    path = ensemble.path / "teacher" / "member_2" / "weights.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    try:
        assert ensemble.why_incomplete("teacher") == "teacher/member_2/weights.safetensors has changed"
        assert ensemble.why_incomplete("distill") == "teacher/member_2/weights.safetensors has changed"
        STAGES["teacher"](ensemble, Silent())
    finally:
        assert path.read_bytes() == good
    assert ensemble.is_complete("teacher") and ensemble.is_complete("distill")


@pytest.mark.slow
def test_only_the_first_member_is_exported_and_the_student_as_ever(ensemble: RunFolder) -> None:
    STAGES["export"](ensemble, Silent())
    assert sorted(path.name for path in (ensemble.path / "export").glob("*.onnx")) == ["student.onnx", "teacher.onnx"]
    first, teacher = load_member(ensemble, 0).state_dict(), load_teacher(ensemble).state_dict()
    assert all(torch.equal(first[name], teacher[name]) for name in first)


def test_an_ensemble_has_no_features(data: Path) -> None:
    with pytest.raises(ValueError, match=r"student: information_flow has taps, but teacher\.members is 3"):
        tiny_config(data, {**ENSEMBLE, "student.terms": FLOW})
    with pytest.raises(ValueError, match=r"student\.auxiliary: information_flow has taps"):
        tiny_config(data, {**ENSEMBLE, "student.auxiliary": {"train": {"epochs": 1}}})
    auxiliary = {"train": {"epochs": 1}, "terms": SOFT}
    assert tiny_config(data, {**ENSEMBLE, "student.terms": FLOW, "student.auxiliary": auxiliary}).teacher.members == 3
    study = [{"name": "co_study", "epochs": 2, "teacher_terms": SOFT}]
    with pytest.raises(ValueError, match=r"teacher_terms needs teacher\.members 1"):
        tiny_config(data, {**ENSEMBLE, "student.phases": study})
    with pytest.raises(ValueError, match=r"needs `train` and no `weights`"):
        tiny_config(data, {**ENSEMBLE, "teacher.weights": "given.safetensors"})


def test_an_ensemble_has_no_last_layer(ensemble: RunFolder, data: Path, tmp_path: Path) -> None:
    terms = [{"loss": "class_relation"}]
    run = run_tiny(tiny_config(data, {**ENSEMBLE, "student.terms": terms, "name": "layer"}), tmp_path, "teacher")
    with pytest.raises(ValueError, match="ensemble of 3 nets: it has no features and no last layer"):
        STAGES["distill"](run, Silent())


# --- peers


@pytest.fixture(scope="module")
def peers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    changes = {"name": "peers", "teacher.train.epochs": 1, "student.train.keep_checkpoint": True}
    config = tiny_config(data, {**PEERS, **changes})
    return run_tiny(config, tmp_path_factory.mktemp("runs"), "teacher", "search", "distill")


def test_peers_are_reported_and_thrown_away(peers: RunFolder) -> None:
    found = result(peers, "student")
    widths = [(peer["name"], peer["net"], peer["weight_bits"], peer["act_bits"]) for peer in found["peers"]]
    assert widths == [
        ("peer_0", "resnet8", None, None), ("peer_1", "resnet8", 4, 4), ("peer_2", "wrn_16_1", None, None)
    ]  # fmt: skip
    assert all(0 <= peer["test_accuracy"] <= 1 and 0 <= peer["val_accuracy"] <= 1 for peer in found["peers"])
    assert found["weight_bits"] == 2
    terms, facts = rows(peers, "student")[0]["terms"], rows(peers, "student")[0]["facts"]
    assert set(terms) == {"labels", "features", "ensemble"}
    assert set(facts) == {"peer_0_accuracy", "peer_1_accuracy", "peer_2_accuracy"}
    kept = read_safetensors(peers.path / "student" / "weights.safetensors")
    assert set(kept) == set(load_student(peers).state_dict()), "the student's weights and no others"
    checkpoint = next((peers.path / "student" / "checkpoint").glob("*.safetensors"))
    kinds = {name.split("/")[1] for name in read_safetensors(checkpoint) if name.startswith("partner/")}
    # layer2 of wrn_16_1 has resnet8's shape, and so has all else: no adapter is needed
    assert kinds == {"peer_0", "peer_1", "peer_2"}


def test_peers_start_from_the_students_weights_where_the_net_is_its(peers: RunFolder) -> None:
    splits = load_splits(peers.config.data, seed=0)
    start = peers.path / "student" / "float" / "weights.safetensors"
    made = build_peers(peers.config, splits, start, torch.device("cpu"))
    stored = read_safetensors(start)
    assert all(torch.equal(stored[name], tensor) for name, tensor in made[0].model.state_dict().items())
    low = made[1].model
    assert isinstance(low, Student) and (low.spec.weight_bits, low.spec.act_bits) == (4, 4)
    assert [peer.shapes for peer in made] == [((32, 4, 4), (64, 2, 2))] * 3


def test_peers_survive_an_interruption_bit_for_bit(
    peers: RunFolder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qkd.training.loop as loop

    changes = {**PEERS, "name": "cut", "teacher.train.epochs": 1, "student.train": {
        "epochs": 2, "lr": 0.01, "checkpoint_every_s": 0}}  # fmt: skip
    run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search")
    real, count = loop.Trainer._save, [0]

    def cut(trainer: Any) -> None:
        real(trainer)
        count[0] += trainer.job.role == "student"
        if count[0] == 4:
            count[0] += 1
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "_save", cut)
    with pytest.raises(KeyboardInterrupt):
        STAGES["distill"](run, Silent())
    monkeypatch.undo()
    STAGES["distill"](run, Silent())
    names = ("student/weights.safetensors", "student/float/weights.safetensors")
    assert [sha256_of(run.path / name) for name in names] == [sha256_of(peers.path / name) for name in names]
    assert result(run, "student")["peers"] == result(peers, "student")["peers"]


def test_a_phase_may_leave_peers_out_or_add_terms(data: Path, tmp_path: Path) -> None:
    phases = [
        {"name": "together", "epochs": 1, "terms": [{"loss": "soft_target", "weight": 0.5}]},
        {"name": "alone", "epochs": 1, "peers": False, "freeze_batch_norm": True},
    ]
    changes = {**PEERS, "name": "phases", "teacher.train.epochs": 1, "student.phases": phases}
    run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search", "distill")
    first, second = rows(run, "student")
    assert set(first["terms"]) == {"labels", "features", "ensemble", "soft_target"}
    assert set(second["terms"]) == {"cross_entropy", "soft_target"}
    assert not any("peer" in name for name in second["facts"])


def test_refused_peers(data: Path) -> None:
    with pytest.raises(ValueError, match="give `weight_bits` and `act_bits`, or neither"):
        tiny_config(data, {"student.peers": {"nets": [{"weight_bits": 4}]}})
    with pytest.raises(ValueError, match="at least 1"):
        tiny_config(data, {"student.peers": {"nets": []}})
    with pytest.raises(ValueError, match=r"nets\[1\]\.taps names 2 modules, `taps` names 1"):
        tiny_config(data, {"student.peers": {"nets": [{}, {"taps": ["a", "b"]}], "taps": ["layer1"]}})
    study = [{"name": "co_study", "epochs": 2, "teacher_terms": SOFT}]
    with pytest.raises(ValueError, match="can have teacher_terms or peers, not both; set `peers: false` there"):
        tiny_config(data, {**PEERS, "student.phases": study})
    with pytest.raises(ValueError, match="so `terms` would never be used"):
        tiny_config(data, {**PEERS, "student.terms": SOFT})
    alone = [{"epochs": 1}, {"name": "alone", "epochs": 1, "peers": False}]
    assert len(tiny_config(data, {**PEERS, "student.terms": SOFT, "student.phases": alone}).student.terms) == 2
    with pytest.raises(ValueError, match=r"`feature_weight` is 5.0, but it weights the features of `taps`"):
        tiny_config(data, {"student.peers": {"nets": [{}], "feature_weight": 5.0}})


def test_an_unknown_tap_of_a_peer_is_told(peers: RunFolder, data: Path) -> None:
    section = {"nets": [{"taps": ["layer33"]}], "taps": ["layer3"]}
    config = tiny_config(data, {**PEERS, "student.peers": section})
    with pytest.raises(ValueError, match="the peer_0 has no module 'layer33'; did you mean .*`layer3`"):
        build_peers(config, load_splits(config.data, seed=0), None, torch.device("cpu"))


# --- auxiliary teacher


@pytest.mark.parametrize("quant", [None, {"weight_bits": 8, "act_bits": 8}])
def test_an_auxiliary_takes_the_teachers_place(data: Path, tmp_path: Path, quant: Any) -> None:
    changes = {
        "name": "auxiliary",
        "teacher.net": "wrn_16_1",
        "teacher.train.epochs": 1,
        "student.net": "resnet8",
        "student.init": "random",
        "student.terms": FLOW,
        "student.auxiliary": {"train": {"epochs": 2, "lr": 0.01}, "quant": quant},
    }
    run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search", "distill")
    found = result(run, "student/auxiliary")
    assert (found["role"], found["net"], found["weight_bits"]) == ("auxiliary", "resnet8", quant and 8)
    assert set(rows(run, "student/auxiliary")[0]["terms"]) == {"information_flow"}
    auxiliary = load_auxiliary(run)
    assert isinstance(auxiliary, Student) == (quant is not None) and not auxiliary.training
    before = {name: tensor.clone() for name, tensor in auxiliary.state_dict().items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in load_guide(run).state_dict().items())
    inputs = read_json(run.path / "manifests" / "distill.json")["inputs"]
    assert {"student/auxiliary/weights.safetensors", "teacher/weights.safetensors"} <= set(inputs)
    assert run.is_complete("auxiliary")
    path = run.path / "student" / "auxiliary" / "weights.safetensors"
    good = path.read_bytes()
    path.unlink()
    assert run.why_incomplete("distill") == "student/auxiliary/weights.safetensors is missing"
    STAGES["distill"](run, Silent())
    assert path.read_bytes() == good


def test_what_an_auxiliary_starts_from(data: Path, tmp_path: Path) -> None:
    from qkd.methods.auxiliary.training import _borrowed, auxiliary_config, auxiliary_phases

    def config(auxiliary: Any, **changes: Any) -> Any:
        base = {"teacher.net": "wrn_16_1", "student.net": "resnet8", "student.init": "random"}
        given = {f"student.{name}": value for name, value in changes.items()}
        return tiny_config(data, {**base, **given, "student.auxiliary": {"train": {"epochs": 4}, **auxiliary}})

    def start(auxiliary: Any, **changes: Any) -> str:
        made = config(auxiliary, **changes)
        borrowed = _borrowed(RunFolder(made, tmp_path))
        return "student" if borrowed is not None else auxiliary_config(made).student_start

    own = {"float_train": {"epochs": 1}}
    trained = {"init": "float", **own}
    assert start({}) == "random" and start(own) == "float" and start({"net": "wrn_16_1"}) == "teacher"
    assert start({}, **trained) == "student" and start(own, **trained) == "float"
    assert start({"init": "random"}, **trained) == "random" == start({"net": "lenet5"}, **trained)
    only = auxiliary_phases(config({}).student.auxiliary)
    assert [(phase.epochs, phase.freeze_batch_norm) for phase in only] == [(4, False)]
    low = config({"quant": {"weight_bits": 8, "act_bits": 8}})
    assert auxiliary_phases(low.student.auxiliary) == () and auxiliary_config(low).student.quant.weight_bits == 8


def test_refused_auxiliaries(data: Path) -> None:
    def refused(auxiliary: Any, match: str, **changes: Any) -> None:
        given = {f"student.{name}": value for name, value in changes.items()}
        with pytest.raises(ValueError, match=match):
            tiny_config(data, {"student.auxiliary": {"train": {"epochs": 2}, **auxiliary}, **given})

    refused({"phases": [{"epochs": 3}]}, "add up to 3, but `train.epochs` is 2")
    refused({"phases": [{"epochs": 2, "freeze_batch_norm": True}]}, "freeze_batch_norm need `quant`")
    refused({"phases": [{"epochs": 2, "teacher_terms": SOFT}]}, "teacher_terms are for the student")
    study = [{"name": "co_study", "epochs": 2, "teacher_terms": SOFT}]
    refused({}, r"teacher_terms cannot be combined with student\.auxiliary", phases=study)


@pytest.mark.slow
def test_ensemble_auxiliary_and_peers_together(data: Path, tmp_path: Path) -> None:
    changes = {
        **PEERS,
        "name": "all",
        "teacher.train.epochs": 1,
        "teacher.members": 2,
        "teacher.ensemble": "logit",
        "student.auxiliary": {"train": {"epochs": 1}, "terms": SOFT},
        "student.phases": [{"name": "tutoring", "epochs": 2, "terms": FLOW}],
    }  # fmt: skip
    run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search", "distill")
    assert result(run, "teacher")["ensemble"]["space"] == "logit"
    terms = rows(run, "student")[1]["terms"]
    assert set(terms) == {"labels", "features", "ensemble", "information_flow", "cross_entropy"}


def test_a_critical_period_fades_over_all_phases_that_share_its_terms(data: Path, tmp_path: Path) -> None:
    flow = {"loss": "information_flow", "weight": 8, "decay": 0.5, "taps": [["layer3", "layer3"]]}
    phases = [
        {"name": "self_study", "epochs": 1, "terms": [{"loss": "cross_entropy"}]},
        {"name": "tutoring", "epochs": 2},
        {"name": "settling", "epochs": 1, "freeze_batch_norm": True},
        {"name": "again", "epochs": 1, "terms": [flow]},
    ]
    changes = {
        "name": "critical",
        "teacher.net": "wrn_16_1",
        "teacher.train.epochs": 1,
        "student.net": "resnet8",
        "student.init": "random",
        "student.train": {"epochs": 5, "lr": 0.01},
        "student.phases": phases,
        "student.terms": [flow],
    }
    run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search", "distill")
    factors = [row["train_loss"] / row["terms"]["information_flow"] for row in rows(run, "student")[1:]]
    assert factors == pytest.approx([8, 4, 2, 8])


def test_terms_fade_from_the_first_phase_without_peers(data: Path, tmp_path: Path) -> None:
    flow = {"loss": "information_flow", "weight": 8, "decay": 0.5, "taps": [["layer3", "layer3"]]}
    phases = [{"name": "together", "epochs": 1}, {"name": "alone", "epochs": 2, "peers": False}]
    changes = {
        **PEERS,
        "name": "late",
        "teacher.train.epochs": 1,
        "student.train": {"epochs": 3, "lr": 0.01},
        "student.phases": phases,
        "student.terms": [flow],
    }
    run = run_tiny(tiny_config(data, changes), tmp_path, "teacher", "search", "distill")
    factors = [row["train_loss"] / row["terms"]["information_flow"] for row in rows(run, "student")[1:]]
    assert factors == pytest.approx([8, 4])


@pytest.mark.slow
def test_a_dry_run_tries_auxiliary_peers_and_ensemble(data: Path) -> None:
    from qkd.pipeline.dryrun import dry_run

    changes = {
        **PEERS,
        "teacher.members": 3,
        "teacher.train.epochs": 1,
        "teacher.net": "wrn_16_1",
        "student.net": "resnet8",
        "student.auxiliary": {
            "train": {"epochs": 2}, "terms": SOFT, "quant": {"weight_bits": 8, "act_bits": 8},
            "float_train": {"epochs": 1},
        },
        "student.phases": [{"name": "together", "epochs": 2, "terms": FLOW}],
    }  # fmt: skip
    report = dry_run(tiny_config(data, changes), Silent())
    names = [check.name for check in report.checks]
    assert names == [
        "data", "teacher", "auxiliary", "phase tutoring", "phase settling", "student", "phase together", "export"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_search_with_peers_and_auxiliary_finds_the_same_when_it_is_cut(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkd.search.trial import Trial

    changes = {
        **PEERS,
        "teacher.train.epochs": 1,
        "student.phases": [{"name": "tutoring", "epochs": 2, "terms": FLOW}],
        "student.agent": {"policy": "search", "crop_padding": 1, "flip": False},
        "student.auxiliary": {"train": {"epochs": 1}},
        "search": {"members": 2, "epochs": 2, "interval_epochs": 1, "train_images": 32, "val_images": 16},
        "data.val_fraction": 0.25,
    }
    take, turns, found = Trial.take, [0], []

    def cut(trial: Trial, turn: Any) -> Any:
        turns[0] += 1
        if turns[0] == 2:
            raise KeyboardInterrupt
        return take(trial, turn)

    for name in ("once", "twice"):
        run = run_tiny(tiny_config(data, {**changes, "name": name}), tmp_path, "teacher")
        if name == "twice":
            monkeypatch.setattr(Trial, "take", cut)
            with pytest.raises(KeyboardInterrupt):
                STAGES["search"](run, Silent())
            monkeypatch.undo()
        STAGES["search"](run, Silent())
        found.append((run.path / "search" / "student.schedule.yaml").read_text())
    assert found[0] == found[1]
    assert (tmp_path / "once" / "student" / "auxiliary" / "result.json").is_file()
