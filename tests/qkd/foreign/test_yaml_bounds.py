"""YAML and overrides beyond reason: refused within a second, with the place; what people write still works."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from qkd.agents.policies.schedule_file import ScheduleError, read_schedule_file
from qkd.bench.device_file import read_devices
from qkd.config import RunConfig
from qkd.config.binding import apply_overrides, bind, read_config, shipped_configs
from qkd.failures import MOST_FAULTS, ConfigError
from qkd.files.yaml_text import YamlError, parse_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
GOOD = read_config(shipped_configs()["digits/w2a2"])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LAUGHS, r"line 5, column \d+: holds more than 100,000 values"),
        ("a: &a " + "x" * 5000 + "\nb: [" + "*a, " * 2000 + "1]", "holds more than .* 4,000,000 characters"),
        ("a: &a {b: *a}", r"line 1, column 11: the recursive alias \*a"),
        ("[" * 100_000, "line 1, column 33: nested deeper than 32 levels"),
        ("".join(f"{' ' * n}k:\n" for n in range(100)), "line 32, column 32: nested deeper"),
        (f"a: &a {'[' * 12}1{']' * 12}\nb: &b {'[' * 12}*a{']' * 12}\nc: {'[' * 12}*b{']' * 12}", "line 3, .*nested"),
        ("x" * 1_000_001, "has 1,000,001 characters; at most 1,000,000 are read"),
        ("a: 1\nb: !!bool x", "line 2, column 4: tagged as true or false, but it is 'x'"),
        ("a: !!int 1.5", "tagged as a whole number, but it is '1.5'"),
        ("a: !!float x", "tagged as a number"),
        ("a: !!str [1]", "tagged as text"),
        ("a: !!map x", "tagged as a group"),
        ("a: !!seq x", "tagged as a list"),
        ("a: !!timestamp 2001-01-01", "the tag !!timestamp"),
        ("a: " + "9" * 5000, r"line 1, column 4: a number of 5,000 characters; at most 60 are allowed"),
        ('a: "\\U00110000"', r"line 1, column \d+: not YAML: an escape for a character that does not exist"),
        ('a: "\\ud800"', "halves of surrogate pairs"),
        ("a: \udc80", "not YAML"),
        ("a: \x00", "not YAML"),
    ],
)  # fmt: skip
def test_what_goes_beyond_the_bounds_is_refused_with_its_place(text: str, fault: str) -> None:
    started = time.process_time()
    with pytest.raises(YamlError, match=fault):
        parse_yaml(text)
    assert time.process_time() - started < 1


def test_memory_is_bounded() -> None:
    tracemalloc.start()
    with pytest.raises(YamlError):
        parse_yaml(LAUGHS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_aliases_that_stay_small_are_read() -> None:
    assert parse_yaml("a: &t {lr: 1e-3}\nb: *t\nc: [*t, *t]") == {
        "a": {"lr": 1e-3}, "b": {"lr": 1e-3}, "c": [{"lr": 1e-3}, {"lr": 1e-3}]
    }  # fmt: skip


def test_every_reader_of_yaml_has_the_bounds(tmp_path: Path) -> None:
    (tmp_path / "laughs.yaml").write_text(LAUGHS)
    os.mkfifo(tmp_path / "fifo.yaml")
    for name, word in (("laughs", "aliases"), ("fifo", "named pipe")):
        for read, kind in (
            (read_config, ConfigError),
            (read_devices, ConfigError),
            (read_schedule_file, ScheduleError),
        ):
            with pytest.raises(kind, match=word):
                read(tmp_path / f"{name}.yaml")
    with pytest.raises(ConfigError, match="override `student.terms=.*aliases"):
        apply_overrides(GOOD, [f"student.terms={LAUGHS}"])


def test_twenty_thousand_faults_take_no_time_and_few_lines() -> None:
    data = {**GOOD, **{f"unknown_key_number_{n}": n for n in range(20_000)}}
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        bind(data)
    assert time.process_time() - started < 5
    faults = caught.value.faults
    assert len(faults) == MOST_FAULTS + 1 and "more faults like these" in faults[-1]
    assert faults[0].startswith("config.unknown_key_number_0: unknown key")


def test_endless_keys_and_lists_are_refused() -> None:
    for data, word in (({"x" * 900_000: 1}, "unknown key"), ({"bench": {"on": ["local"] * 5000}}, "has 5,000 entries")):
        started = time.process_time()
        with pytest.raises(ConfigError, match=word) as caught:
            bind({**GOOD, **data})
        assert time.process_time() - started < 2 and max(map(len, caught.value.faults)) < 1000


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("student.agent.crop_padding=1" + "0" * 40, "config.student.agent.crop_padding: "),
        ("threads=100000", "config.threads: must be at most 1024, got 100000"),
        ("search.members=100000", "config.search.members: must be at most 1024"),
        ("teacher.members=100000", "config.teacher.members: must be at most 1024"),
        ("bench.threads=100000", "config.bench.threads: must be at most 1024"),
        ("student.train.lr=1e30", "config.student.train.lr: must be at most 1e+06"),
        ("student.train.lr=.inf", "config.student.train.lr: must be a finite number"),
        ("student.train.lr=.nan", "config.student.train.lr: must be a finite number"),
        ("student.terms.0.weight=1e30", "config.student.terms.0.weight: must be at most 1e+06"),
        ("student.terms.1.options.temperature=.inf", "config.student.terms.1.options"),
        ("data.workers=100000", "config.data.workers: must be at most 256"),
        ("data.batch_size=100000000", "config.data.batch_size: must be at most 1e+06"),
        ("bench.affinity=[99999]", "config.bench.affinity.0: must be less than 8192"),
        ("bench.timeout_s=1e300", "config.bench.timeout_s: must be at most 1e+06"),
        ('data.path="a\\0b"', "config.data.path: holds the control character \\x00"),
        ('student.terms.0.loss="\\e[31m"', "config.student.terms.0.loss: holds the control character \\x1b"),
        ("name=" + "x" * 5000, "config.name: must be at most 200 characters long"),
        ("device=cuda:99999999999", "config.device: must be at most 8 characters long"),
        (".".join(["a"] * 100) + "=1", "must be key.path=value"),
        ("student.terms.99999999999999999999.weight=1", "is not an index"),
    ],
)
def test_numbers_and_texts_beyond_reason_are_refused_by_name(override: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bind(apply_overrides(GOOD, [override]))
    assert fault in str(caught.value)


def test_every_number_of_the_schema_has_an_upper_bound() -> None:
    """The schema as JSON: no integer or number without ``maximum`` or ``exclusiveMaximum``."""
    schema = RunConfig.model_json_schema()
    free: list[str] = []

    def look(node: object, where: str) -> None:
        if isinstance(node, dict):
            is_number = node.get("type") in ("integer", "number") and "enum" not in node and "const" not in node
            if is_number and not {"maximum", "exclusiveMaximum"} & node.keys() and "options" not in where:
                free.append(where)
            for key, inner in node.items():
                look(inner, f"{where}.{key}")
        elif isinstance(node, list):
            for inner in node:
                look(inner, where)

    look(schema, "schema")
    assert free == []
