"""The comparison of methods: budgets are equal, tables say what runs came to, failures stay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qkd.config.binding import bind
from qkd.files.yaml_text import parse_yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def methods() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import methods as module
    finally:
        sys.path.pop(0)
    return module


def test_every_method_fits_the_pair_with_one_budget(methods: Any) -> None:
    base = parse_yaml((ROOT / "configs" / "fashion-mnist" / "methods.yaml").read_text())
    names = sorted(path.stem for path in methods.METHODS.glob("*.yaml"))
    assert {methods.PLAIN, methods.KD, *methods.OF_ANOTHER_PAIR} <= set(names)
    for name in names:
        config = bind(methods.merged(base, parse_yaml((methods.METHODS / f"{name}.yaml").read_text())))
        assert config.student.train.epochs == base["student"]["train"]["epochs"], name
        assert (config.teacher.net, config.student_net) == ("resnet20", "resnet8"), name
        assert config.data == bind(base).data, name


@pytest.mark.parametrize(
    ("lengths", "total", "expected"),
    [((11, 1), 4, [3, 1]), ((3, 4, 4, 1), 4, [1, 1, 1, 1]), ((3, 8, 1), 6, [2, 3, 1]), ((5,), 2, [2])],
)
def test_phases_keep_their_proportions(methods: Any, lengths: tuple[int, ...], total: int, expected: list[int]) -> None:
    assert methods.stretched(lengths, total) == expected


def rows() -> list[dict[str, Any]]:
    made = [("soft_targets", 0, 0.8), ("soft_targets", 1, 0.9), ("hint", 0, 0.85), ("hint", 1, 0.93)]
    table = [{"method": name, "bits": 2, "seed": seed, "accuracy": value} for name, seed, value in made]
    return [*table, {"method": "meta", "bits": 2, "seed": 0, "failed": "ValueError: no quiz"}]


def test_the_summary_pairs_seeds_and_keeps_failures(methods: Any) -> None:
    first, second, third = methods.summarize(rows())
    assert (first["method"], first["mean"], first["to_kd"]) == ("hint", 0.89, 0.04)
    assert first["stdev"] == pytest.approx(0.05657, abs=1e-5)
    assert (second["method"], second["to_kd"]) == ("soft_targets", 0)
    assert (third["method"], third["seeds"], third["failures"]) == ("meta", 0, ["ValueError: no quiz"])


def test_seeds_that_were_not_run_are_no_failures(methods: Any) -> None:
    made = [*rows(), {"method": "hint", "bits": 2, "seed": 2, "failed": methods.NOT_RUN}]
    line = next(line for line in methods.summarize(made) if line["method"] == "hint")
    assert methods.accuracy_text(line) == "89.00 ± 5.66 % (1 of the seeds not run)"


def test_the_page_shows_every_line(methods: Any) -> None:
    record = {
        "what": "Accuracy", "pair": "a -> b", "seeds": [0, 1], "test_images": 40,
        "environment": {"cpu": "some", "cores": 2, "torch": "2", "brevitas": "0", "date": "today"},
        "teacher": {"seeds": 2, "mean": 0.95, "stdev": 0.01}, "float_student": {"seeds": 0},
        "table": methods.summarize(rows()),
        "steps": {"hint-w2a2": {"time_ratio": 1.12, "memory_ratio": 1.03}, "mhgd+sum-w2a2": {"time_ratio": 1.07}},
    }  # fmt: skip
    page = methods.markdown(record)
    assert "| hint | 89.00 ± 5.66 % | +4.00 ± 1.41 | 1.12 | 1.03 |" in page
    assert "Teacher: 95.00 ± 1.00 %; the student's net in float: none." in page
    assert "second backward pass, a step takes: mhgd 1.07." in page
    assert "| meta | none (1 failed: ValueError: no quiz) |  |  |  |" in page
