"""Thousands of mutated inputs: each is read, or refused in words with exit code 2, at once and in little memory."""

from __future__ import annotations

import json
import random
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import beside
import pytest
import torch

from export import cost_of_file, write_view
from export.conversion.repack import fit_storage
from qkd.agents.policies.schedule_file import read_schedule_file, save_schedule
from qkd.agents.policies.search_log import INTEGERS, import_log
from qkd.bench.device_file import resolve_devices
from qkd.bench.targets import is_float, run_files
from qkd.checking import file_faults, name_faults
from qkd.config.binding import apply_overrides, bind, read_config, shipped_configs
from qkd.failures import BAD_INPUT, DONE, classify
from qkd.report import summarize
from qkd.report.records import read_metrics
from qkd.run.folder import RunFolder
from qkd.search.journal import Journal
from qkd.search.population import Score
from qkd.testing import tiny_config
from qkd.training.checkpoint import Checkpoint, CheckpointStore
from quantizers.integer import IntegerView

MOST_S = 5.0
MOST_GROWTH_BYTES = 1 << 30
NASTY = [
    b"!!bool x",
    b"9" * 5000,
    b'"\\U00110000"',
    b'"\\ud800"',
    b"\xff",
    b"\x00",
    b"\x1b[31m",
    b"&a [*a]",
    b"*a",
    b"[" * 200,
    b"{" * 200,
    b"1e999",
    b".nan",
    b"-.inf",
    b"NaN",
    b"-1",
    b"0",
    b"10000000000",
    b"1" + b"0" * 40,
    b"null",
    b"true",
    b"[]",
    b"{}",
    b"''",
    b"? ",
    b"<<: ",
    b"!!python/object:os.system x",
    b"!!binary aa",
    b"!!timestamp 1",
    b"%TAG ! x",
    b"---\n",
    b"\n...\n",
    b"|\n  x",
    b">-",
    b"\t",
    b"#",
    b": ",
    b"- ",
    b"\xed\xa0\x80",
    b"x" * 70000,
    b"/dev/zero",
    b"../..",
    b"1_000",
    b"0x10",
    b'"',
    b"'",
    b"@",
    b"`",
    b"&",
    b"cuda:999999999999",
    b"2001-01-01",
    b"\xe2\x80\xae",
    b"\xef\xbb\xbf",
    b"1j",
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    1e308,
    "",
    "x",
    "\ud800",
    "../../x",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    "9" * 400,
    -(2**63),
]


@dataclass(frozen=True)
class Target:
    """A reader of files: what is good, and what reads it."""

    name: str
    good: bytes
    read: Callable[[Path], object]
    suffix: str = ".yaml"


def mutated(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(7)
        end = min(len(data), at + rng.choice((1, 2, 8, 40)))
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end] * rng.choice((2, 30))
        elif kind == 3:
            data[at:at] = rng.choice(NASTY)
        elif kind == 4:
            del data[at:]
        else:  # a value, whole, for another
            words = list(re.finditer(rb"[\w.+-]+|\"[^\"\n]*\"", bytes(data[:200_000])))
            if words:
                word = rng.choice(words)
                data[word.start() : word.end()] = rng.choice([*NASTY, rng.choice(words)[0]])
    return bytes(data)


def swapped(good: bytes, rng: random.Random) -> bytes:
    """Return JSON with one value for another of another type, wherever it stands."""
    value = json.loads(good)
    at = value
    while isinstance(at, dict | list) and at:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))  # type: ignore[arg-type]
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.3:
            if isinstance(at, dict) and rng.random() < 0.2:
                del at[key]
            else:
                at[key] = rng.choice(VALUES)
            break
        at = at[key]
    return json.dumps(value).encode("utf-8", "surrogatepass")


def outcome(target: Target, data: bytes, place: Path) -> str:
    """Return what is wrong with how a target ends on data; empty if nothing is."""
    file = place / f"input{target.suffix}"
    file.write_bytes(data)
    started, code, words = time.monotonic(), DONE, ""
    try:
        target.read(file)
    except Exception as error:  # whatever it is: the command line would show it as this
        failure = classify(error)
        code, words = failure.exit_code, failure.message
        if not failure.is_expected:
            words = f"unworded: {words}"
    seconds = time.monotonic() - started
    if code not in (DONE, BAD_INPUT) or words.startswith("unworded"):
        return f"{target.name}: exit code {code}: {words[:300]}"
    return f"{target.name}: took {seconds:.1f} s" if seconds > MOST_S else ""


def fuzz(targets: list[Target], place: Path, rounds: int, seed: int) -> list[str]:
    rng, found = random.Random(seed), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(rounds):
        target = targets[number % len(targets)]
        is_json = target.suffix == ".json"
        data = swapped(target.good, rng) if is_json and rng.random() < 0.6 else mutated(target.good, rng)
        if wrong := outcome(target, data, place):
            found.append(f"{number}: {wrong} <- {data[:200]!r}")
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert growth < MOST_GROWTH_BYTES
    return found


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    place = tmp_path_factory.mktemp("good")
    found = [*yaml_targets(place), *run_targets(place)]
    view: IntegerView = beside.load(Path(__file__).parents[2] / "export" / "conftest.py").residual_view()
    model = write_view(view, [(1, 3, 15, 15)], place / "good.onnx", pack="packed").path.read_bytes()
    found += [
        Target("cost of onnx", model, cost_of_file, ".onnx"),
        Target("onnx to fit", model, lambda file: (is_float(file), fit_storage(file, ["int8"])), ".onnx"),
    ]
    return found


def yaml_targets(place: Path) -> list[Target]:
    from qkd.agents import Op, Policy, Schedule, Segment

    def config(file: Path) -> object:
        return bind(read_config(file), checks=(name_faults, file_faults))

    def override(file: Path) -> object:
        text = file.read_bytes().decode("utf-8", "surrogateescape")
        return bind(apply_overrides(read_config(shipped_configs()["digits/w2a2"]), [text]))

    schedule = Schedule((Segment(3, Policy((Op("Rotate", 0.5, 3), Op("Cutout", 1.0, 9)))), Segment(2, Policy(()))))
    save_schedule(schedule, place / "s.yaml", role="teacher", provenance={"members": 4, "best": [0.5, 0.6]})
    policy = [5, 3] * (INTEGERS // 2)
    log = "".join(json.dumps([str(n + 1), str(n), 3 * n + 3, 3 * n + 3, policy, policy]) + "\n" for n in range(3))
    devices = b"devices:\n  pi: {address: 'ssh://pi@board:22', threads: 4, affinity: [0, 1], ssh_options: [-F, x]}\n"
    return [
        Target("config", shipped_configs()["digits/w2a2"].read_bytes(), config),
        Target("override", b"student.terms.0.weight=0.5", override),
        Target("devices", devices, lambda file: resolve_devices(["pi"], file)),
        Target("schedule", (place / "s.yaml").read_bytes(), read_schedule_file),
        Target("search log", log.encode(), lambda file: import_log(file, epochs=200, op_order="py2"), ".txt"),
        Target("config of methods", shipped_configs()["digits/methods/peers"].read_bytes(), config),
    ]


def run_targets(place: Path) -> list[Target]:
    """Return what reads the files of a run folder; each gets its input where the file of that name stands."""
    config = tiny_config(place / "data")
    run = RunFolder.open(config, place / "runs")
    run.folder("teacher")
    (run.path / "teacher" / "w").write_text("w")
    run.complete("teacher", [run.path / "teacher" / "w"])
    given = {"role": "teacher", "seed": 0, "members": 2, "epochs": 4, "interval_epochs": 2, "fingerprint": {"a": "b"}}
    journal = Journal(run.folder("search/teacher"), **given)  # type: ignore[arg-type]
    journal.record(0, Score(0.5, False, "0" * 64, 1, 1, 1.0))
    store = CheckpointStore(run.path / "teacher" / "checkpoint", lambda _: None)
    store.save(1, Checkpoint({"a": torch.zeros(2)}, {"epoch": 0, "fingerprint": {}, "settings": {"seed": 0}}))
    totals = dict.fromkeys(
        ("parameters", "macs", "bops", "weight_bytes", "parameter_bytes", "peak_stored_bytes", "peak_packed_bytes"), 5
    )
    side = {"top1_agreement": 1.0, "differing": 0}
    parity = {"passed": True, "images": 3, "off": side, "on": side, "runtime_version": "1", "layers": []}
    records: dict[str, Any] = {
        "teacher/result.json": {"net": "x", "test_accuracy": 0.5, "members": [{"test_accuracy": 0.5}],
                                "ensemble": {"test_accuracy": 0.5}},
        "student/result.json": {"net": "x", "weight_bits": 2, "act_bits": 2, "test_accuracy": 0.5},
        "export/export.json": {"student": {"path": "student.onnx", "size_bytes": 5, "fall_backs": []}},
        "export/parity.json": parity,
        "export/cost.json": {"student": totals, "float_twin": totals},
        "bench/local.json": {"device": "local", "machine": {"cpu": "x", "onnxruntime": "1"}, "threads": 1, "rounds": 2,
                             "batch_size": 1, "warmup": 0, "models": {"student": {"median_ms": 1.0, "notes": []}}},
    }  # fmt: skip
    for name, value in records.items():
        (run.folder(Path(name).parent.as_posix()) / Path(name).name).write_text(json.dumps(value))
    metrics = b'{"epoch": 1, "terms": {"a": 0.5}, "train_loss": 0.5}\n{"epoch": 2, "terms": {}}\n'

    def at(name: str, read: Callable[[], object]) -> Target:
        file = run.path / name
        whole = file.read_bytes()

        def swap_in(given: Path) -> None:
            file.write_bytes(given.read_bytes())
            try:
                read()
            finally:
                file.write_bytes(whole)

        return Target(name, whole, swap_in, file.suffix)

    return [
        at("manifests/teacher.json", lambda: run.why_incomplete("teacher")),
        at("environment.json", run.environment_changes),
        at("config.yaml", lambda: run._write_or_compare_config()),
        at("search/teacher/journal.json", lambda: Journal(run.path / "search" / "teacher", **given)),  # type: ignore[arg-type]
        at("teacher/checkpoint/step-000000001.json", store.load),
        *(at(name, lambda: [summarize(run.path).to_text(), run_files(run.path)]) for name in records),
        Target("metrics", metrics, read_metrics, ".jsonl"),
    ]


def test_the_good_inputs_are_good(targets: list[Target], tmp_path: Path) -> None:
    for target in targets:
        (tmp_path / f"input{target.suffix}").write_bytes(target.good)
        target.read(tmp_path / f"input{target.suffix}")


def test_a_hundred_mutations_end_in_words(targets: list[Target], tmp_path: Path) -> None:
    assert fuzz(targets, tmp_path, 100, seed=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_two_thousand_mutations_end_in_words(targets: list[Target], tmp_path: Path, seed: int) -> None:
    assert fuzz(targets, tmp_path, 500, seed=1000 + seed) == []
