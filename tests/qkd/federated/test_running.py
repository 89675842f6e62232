"""`qkd federate`: the run folder, resuming, the exported student, and what is refused before training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import yaml
from federations import federation_of, tiny_federated

import qkd
from qkd.cli import main
from qkd.config.binding import bind, config_text
from qkd.failures import ConfigError, UsageError
from qkd.federated import Federation
from qkd.federated.head import NoHeadError
from qkd.federated.report import FederatedReport, summed
from qkd.roles.nets import load_student
from qkd.run.folder import RunFolder
from qkd.testing import synthetic_splits, write_npz_set

pytestmark = pytest.mark.usefixtures("unfused")


def federate(config: Any, folder: Path, *words: str) -> int:
    file = folder / "config.yaml.txt"
    file.write_text(config_text(config))
    return main(["federate", str(file), *words, "--runs-dir", str(folder / "runs")])


def test_a_run_is_trained_exported_and_complete(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_federated(data, "fedgen", clients=2, rounds=2, generator_steps=2)
    assert federate(config, tmp_path, "--json") == 0
    found, folder = json.loads(capsys.readouterr().out), tmp_path / "runs" / "tiny"
    assert [row["round"] for row in found["rounds"]] == [0, 1, 2]
    assert found["result"]["weight_bits"] == 4 and 0 <= found["result"]["test_accuracy"] <= 1
    assert found["parity"] == "student.onnx equals the student: 32 test images compared"
    clients = json.loads((folder / "federated" / "clients.json").read_text())
    assert sum(map(sum, clients["images"])) == 48 and len(clients["images"]) == 2
    for name in ("accuracy_by_round.svg", "accuracy_by_bytes.svg"):
        assert (folder / "federated" / name).read_text().startswith("<svg xmlns=")
    assert (folder / "federated" / "rounds.md").read_text().count("\n") == 2 + 3
    assert not (folder / "federated" / "checkpoint").exists()
    assert {"export.json", "cost.json", "layers.json", "sample.npz"} <= {
        path.name for path in (folder / "export").iterdir()
    }
    assert {path.stem for path in (folder / "manifests").iterdir()} == {"federate", "export"}
    before = (folder / "student" / "weights.safetensors").read_bytes()
    assert federate(config, tmp_path) == 0
    shown = capsys.readouterr()
    assert shown.err.count("already complete") == 2 and "final student: test accuracy" in shown.out
    assert (folder / "student" / "weights.safetensors").read_bytes() == before
    # for an older runtime, like any other run; what needs a teacher says that there is none
    assert main(["export", str(folder), "--for", "onnxruntime==1.17"]) == 0
    assert "final student: test accuracy" in capsys.readouterr().out
    assert (folder / "export" / "student.onnxruntime-1.17.onnx").is_file()
    for command in ("diagnose", "match"):
        assert main([command, str(folder)]) == 2
        assert "a federated run has no teacher" in capsys.readouterr().err


def test_the_exported_file_computes_what_the_student_computes(data: Path, tmp_path: Path) -> None:
    config = tiny_federated(data, clients=2, rounds=1, upload="codes")
    assert federate(config, tmp_path) == 0
    folder = tmp_path / "runs" / "tiny"
    with RunFolder.reopen(folder) as run:
        student = load_student(run)
    images = torch.randn(4, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(folder / "export" / "student.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.equal(torch.from_numpy(logits).argmax(1), student(images).argmax(1))


def test_another_export_keeps_a_file_of_the_same_student(data: Path, tmp_path: Path) -> None:
    config, folder = tiny_federated(data, clients=2, rounds=1), tmp_path / "runs" / "tiny" / "export"
    assert federate(config, tmp_path, "export.preprocess=inside") == 0
    assert (folder / "student.uint8.onnx").is_file() and (folder / "parity.uint8.json").is_file()
    assert federate(config, tmp_path) == 0
    assert {path.name for path in folder.glob("*.onnx")} == {"student.onnx", "student.uint8.onnx"}
    assert {path.name for path in folder.glob("parity*.json")} == {"parity.json", "parity.uint8.json"}


@pytest.mark.slow
def test_a_low_bit_run_starts_from_a_float_one(data: Path, tmp_path: Path) -> None:
    """As quantized training usually does: first a federated float net, then a student of it."""
    assert federate(tiny_federated(data, name="float", clients=2, rounds=1, precision="float"), tmp_path) == 0
    runs = tmp_path / "runs"
    assert (runs / "float" / "export" / "student.onnx").is_file()
    weights = runs / "float" / "student" / "weights.safetensors"
    config = tiny_federated(data, clients=2, student={"weights": str(weights)})
    start = federation_of(config).float_net().state_dict()
    from safetensors.torch import load_file

    assert all(torch.equal(start[name], tensor) for name, tensor in load_file(weights).items())


def test_the_record_adds_up_bytes() -> None:
    rows = summed([{"bytes_down": 3, "bytes_up": 1}, {"bytes_down": 3, "bytes_up": 2}])
    assert [(row["total_bytes_down"], row["total_bytes_up"]) for row in rows] == [(3, 1), (6, 3)]


def test_the_table_shows_the_last_round() -> None:
    rows = [
        {"round": number, "clients": [0, 1], "weights": {"1": 1.0}, "dropped": {"0": "off"}, "test_accuracy": 0.5,
         "bytes_down": 8, "bytes_up": 4}
        for number in range(1, 28)
    ]  # fmt: skip
    settings = {"strategy": "fedavg", "clients": 2, "alpha": 0.1, "precision": "float", "upload": "float"}
    text = FederatedReport("tiny", settings, summed(rows), {"test_accuracy": 0.5}, "").to_text()
    rounds = [line.split()[0] for line in text.splitlines()[2:-2]]
    assert len(rounds) <= 12 and rounds[-1] == "27"
    assert "216 B" in text and text.endswith("clients left out because they failed: 27")


# refused before training


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ("fedgen", {"alpha": 0}, "config.federated.alpha: must be positive, got 0"),
        ("fedgen", {"alpha": -1.0}, "config.federated.alpha: must be positive, got -1.0"),
        ("fedgem", {}, "config.federated.strategy: .*fedgen"),
        ("fedavg", {"clients": 0}, "config.federated.clients"),
        ("fedavg", {"clients_per_round": 5}, "`clients_per_round` must be at most `clients`, got 5 of 4"),
        ("fedavg", {"proximal": 0.5}, "strategy `fedavg` does not read 'proximal'"),
        ("fedprox", {"latent_weight": 1.0}, "strategy `fedprox` does not read 'latent_weight'"),
        ("fedavg", {"upload": "codes", "precision": "float"}, "float weights have no codes"),
        ("fedavg", {"upload": "codes", "student": {"quant": {"weight_bits": 4, "act_bits": 4,
                                                             "weight_quantizer": "dorefa"}}}, "needs weight_quantizer"),
        ("fedavg", {"student": {"init": "float"}}, "starts from `weights` or at random, got `float`"),
        ("fedavg", {"student": {"view": "clean", "phases": [{"epochs": 30}]}}, "does not read view, phases"),
        ("fedgen", {"section": {"batch_size": 1}}, "data.batch_size: must be at least 2 with strategy fedgen"),
        ("fedavg", {"section": {"batch_statistics": 4}}, "too few validation images to fill its batches"),
        ("fedavg", {"student": {"net": None}}, "config.student.net: missing; a federated run has no teacher"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(strategy: str, changes: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_federated(data, strategy, **changes)


def test_a_teacher_is_refused(data: Path) -> None:
    values = yaml.safe_load(config_text(tiny_federated(data)))
    values["teacher"] = {"net": "lenet5", "train": {}}
    with pytest.raises(ConfigError, match="teacher: a federated run has none: leave it out"):
        bind(values)


def test_a_search_is_refused(data: Path) -> None:
    values = yaml.safe_load(config_text(tiny_federated(data)))
    values["search"] = {"members": 3}
    with pytest.raises(ConfigError, match="search: a federated run has no search; leave it out"):
        bind(values)


def test_images_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_federated(write_npz_set(tmp_path / "data", classes=1))
    assert federate(config, tmp_path) == 2
    assert "is of one class" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "federated").exists()
    splits = synthetic_splits(classes=4)
    with pytest.raises(ValueError, match="clients need at least two classes, but the data has 1"):
        Federation(config, replace(splits, classes=("all",)), torch.device("cpu"))


def test_more_clients_than_images(data: Path) -> None:
    with pytest.raises(ValueError, match="40 clients with at least 2 images each need 80 images, but there are 48"):
        federation_of(tiny_federated(data, clients=40))


def test_fedgen_needs_a_last_linear_layer(data: Path, tmp_path: Path) -> None:
    net = tmp_path / "mine.py"
    net.write_text(
        "from torch import nn\n"
        "def build(*, classes, channels, image_size):\n"
        "    return nn.Sequential(nn.Conv2d(channels, classes, image_size), nn.Flatten())\n"
    )
    config = tiny_federated(data, "fedgen", student={"net": f"{net}:build"})
    with pytest.raises(NoHeadError, match="use a net that ends with one, or fedavg, fedprox or feddistill"):
        federation_of(config)
    federation_of(tiny_federated(data, "fedavg", student={"net": f"{net}:build"}))


def test_each_command_says_which_the_config_is_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "federated.yaml"
    file.write_text(config_text(tiny_federated(data)))
    for words in (["run"], ["run", "--dry-run"], ["teacher"], ["export"]):
        assert main([*words, str(file), "--runs-dir", str(tmp_path)]) == 2
        assert "has a section `federated`: use `qkd federate`" in capsys.readouterr().err
    with pytest.raises(UsageError, match="use `qkd federate`"):
        qkd.run(tiny_federated(data), runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert main(["federate", "digits/smoke", "--runs-dir", str(tmp_path)]) == 2
    assert "the config has no section `federated`: use `qkd run`" in capsys.readouterr().err


def test_configs_of_other_runs_do_not_change(data: Path) -> None:
    from qkd.testing import tiny_config

    assert "federated" not in tiny_config(data).model_dump(mode="json")
    federated = tiny_federated(data)
    stored = yaml.safe_load(config_text(federated))
    assert bind(stored) == federated
    assert "train" not in stored["student"], "what clients do not read is not stored, so its defaults may change"


def test_a_run_may_change_its_engine(data: Path, tmp_path: Path) -> None:
    """Both engines give the same bits, so one may finish what the other began."""
    config = tiny_federated(data)
    RunFolder.open(config, tmp_path).close()
    RunFolder.open(tiny_federated(data, engine="flower", workers=1), tmp_path).close()
    with pytest.raises(ValueError, match="federated.rounds: 3 there, 4 here"):
        RunFolder.open(tiny_federated(data, rounds=4), tmp_path)
