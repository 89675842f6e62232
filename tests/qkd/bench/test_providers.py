"""``qkd bench --provider``: rows of the low-bit provider in the table, the JSON and a run's record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from export import Sample, export_float, export_onnx, lowbit, write_sample
from qkd.bench.record import drop_stale
from qkd.bench.targets import find_targets
from qkd.cli import main
from qkd.config.binding import load_config
from qkd.testing import TinyNet, synthetic_images
from quantizers import QuantSpec, calibrate, prepare

QUICK = ("--rounds", "3", "--warmup", "0")
LOW = "student, low-bit provider"


@pytest.fixture(scope="module")
def run_folder(eager: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after its export stage, its net wide enough for the low-bit provider."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("runs") / "wide"
    (run / "export").mkdir(parents=True)
    images, net = synthetic_images(32)[0].float() / 127.5 - 1, TinyNet(width=32).eval()
    student = prepare(net, QuantSpec(weight_bits=2, act_bits=2), images[:2])
    calibrate(student, [images])
    export_onnx(student.eval(), images[:2], run / "export" / "student.onnx")
    export_float(net, images[:2], run / "export" / "teacher.onnx")
    facts = {name: {"path": f"{name}.onnx"} for name in ("student", "teacher")}
    (run / "export" / "export.json").write_text(json.dumps(facts))
    with torch.no_grad():
        logits = {"student": student(images).numpy(), "teacher": net(images).numpy()}
    write_sample(run / "export" / "sample.npz", Sample(images.numpy(), logits["student"].argmax(1), logits))
    return run


def bench(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[Any, str]:
    capsys.readouterr()
    assert main(["bench", *map(str, words), *QUICK, "--json"]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out)["devices"][0], captured.err


def offered() -> bool:
    return lowbit.availability().is_offered


def test_by_default_it_stands_beside_the_cpu_provider(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device, err = bench(capsys, run_folder)
    models = device["models"]
    assert list(models) == ["student", *([LOW] if offered() else []), "teacher"] and device["failure"] is None
    assert models["student"]["provider"] == "CPUExecutionProvider" and "provider" not in device
    if offered():
        ours = models[LOW]
        assert (ours["model"], ours["provider"], ours["agreement"]) == ("student", lowbit.PROVIDER, 1.0)
        assert ours["sha256"] == models["student"]["sha256"] and ours["path"] == "student.onnx"
        assert ours["to_float"] == ours["median_ms"] / models["teacher"]["median_ms"] and ours["claimed_nodes"] > 5
    else:
        assert f"low-bit provider: {lowbit.availability().reason}" in err


def test_a_row_of_the_provider_is_stale_with_its_model(run_folder: Path, tmp_path: Path) -> None:
    targets = find_targets([str(run_folder)])
    rows = {LOW: {"model": "student", "sha256": "0" * 64}}
    (tmp_path / "pi.json").write_text(json.dumps({"device": "pi", "models": rows}))
    assert drop_stale(tmp_path, [], targets.paths) == ["pi"]


@pytest.mark.parametrize("words", [["--provider", "lowbit,cpu"], ["--provider", "lowbit", "--provider", "cpu"]])
def test_providers_are_named_with_commas_or_one_by_one(
    run_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    if not offered():
        pytest.skip(lowbit.availability().reason)
    device, _ = bench(capsys, run_folder, *words)
    assert list(device["models"]) == [LOW, "student", "teacher"]


def test_asked_for_where_it_is_not_offered_it_is_an_error_that_says_why(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QKD_LOWBIT", "0")
    device, _ = bench(capsys, run_folder, "--provider", "lowbit", code=2)
    assert device["failure"] == "student: the low-bit provider is not offered here: switched off by QKD_LOWBIT=0"
    assert list(bench(capsys, run_folder)[0]["models"]) == ["student", "teacher"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["auto,cpu"], "auto chooses the providers by itself"),
        (["cpu", "cpu"], "a provider is named twice: cpu, cpu"),
        ([","], "no provider is named"),
    ],
)
def test_names_that_are_refused(
    run_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = [part for word in words for part in ("--provider", word)]
    assert main(["bench", str(run_folder), *given, *QUICK]) == 2
    assert message in capsys.readouterr().err


def test_the_key_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config("digits/smoke").bench.providers == ("auto",)
    assert load_config("digits/smoke", ["bench.providers=cpu, lowbit"]).bench.providers == ("cpu", "lowbit")
    assert load_config("digits/smoke", ["bench.providers=[lowbit]"]).bench.providers == ("lowbit",)
    with pytest.warns(DeprecationWarning, match="`config.bench.provider` is `bench.providers` now"):
        old = load_config("digits/smoke", ["bench.provider=XnnpackExecutionProvider"])
    assert old.bench.providers == ("XnnpackExecutionProvider",)
    assert main(["bench", "digits/smoke", "--provider", "cpu"]) == 2
    assert "give bench.providers=..." in capsys.readouterr().err
