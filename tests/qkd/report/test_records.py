"""What a report is made from: records that cannot be are refused by file and place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beside
import pytest

from qkd.files import DamagedFileError
from qkd.report import page as page_module
from qkd.report import render_page, render_text, summarize, tradeoff
from qkd.report.page import RunRecord

_files = beside.load(Path(__file__).with_name("run_files.py"))
make_devices: Callable[[Path], Path] = _files.make_devices
make_run: Callable[..., Path] = _files.make_run
record: Callable[[], RunRecord] = _files.record
write: Callable[[Path, Any], None] = _files.write


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "result.json").write_text("{")
    with pytest.raises(ValueError, match="result.json: not JSON"):
        summarize(tmp_path)


@pytest.mark.parametrize("notes", [-1, "x", [1], {"a": 1}])
def test_parity_notes_of_another_type_are_refused_by_place(tmp_path: Path, notes: object) -> None:
    run = make_run(tmp_path / "run")
    path = run / "export" / "parity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "notes": notes}))
    with pytest.raises(DamagedFileError, match=r"parity\.json: notes"):
        summarize(run)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("teacher/result.json", "test_accuracy", 3),
        ("teacher/result.json", "chance_accuracy", -0.1),
        ("student/result.json", "test_images", 0),
        ("student/result.json", "test_images", "x"),
        ("student/result.json", "epochs", 1.5),
        ("export/parity.json", "images", 0),
    ],
)
def test_figures_that_cannot_be_are_refused_by_place(tmp_path: Path, name: str, key: str, value: object) -> None:
    path = make_run(tmp_path / "run") / name
    write(path, {**json.loads(path.read_text()), key: value})
    with pytest.raises(DamagedFileError, match=rf"{name}: {key}: .*got {re.escape(repr(value))}"):
        summarize(tmp_path / "run")


def test_a_student_of_federated_clients_may_be_in_float(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    file = path / "student" / "result.json"
    found = json.loads(file.read_text())
    del found["weight_bits"], found["act_bits"]
    file.write_text(json.dumps(found))
    assert any(row.role == "student float" for row in summarize(path).models)


def test_an_ensemble_without_members_is_refused_by_name(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run") / "teacher" / "result.json"
    whole = json.loads(path.read_text())
    write(path, {**whole, "ensemble": None})
    summarize(tmp_path / "run")
    write(path, {**whole, "ensemble": {"test_accuracy": 0.5}})
    with pytest.raises(DamagedFileError, match="an ensemble needs its members"):
        summarize(tmp_path / "run")


SWAPS: list[Any] = [3, "x", [], {}, None, True, [1], {"a": []}]


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(SWAPS)))])
def test_records_of_another_shape_are_named_with_their_place(
    tmp_path: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value of every record is swapped for one of another type: read all the same, or refused in words."""
    for where, name in ((page_module, "line_chart"), (page_module, "schedule_chart"), (tradeoff, "scatter_chart")):
        monkeypatch.setattr(where, name, drawn_once(getattr(where, name)))
    run = make_devices(make_run(tmp_path / "run"))
    seen = refused = 0
    for file in sorted(run.rglob("*.json")):
        whole = json.loads(file.read_text())
        for path in places(whole):
            write(file, replaced(whole, path, SWAPS[(first + seen) % len(SWAPS)]))
            seen += 1
            try:
                summary = summarize(run)
                render_text(summary)
                render_page(summary, record())
                summary.to_text()
            except DamagedFileError as error:
                refused += 1
                assert str(file) in str(error) and "restore it" in str(error)
        write(file, whole)
    assert seen > 100 and refused > seen // 4


def drawn_once(draw: Callable[..., str]) -> Callable[..., str]:
    """Draw what was drawn before only once: most swaps change no picture."""
    known: dict[str, str] = {}

    def drawn_or_known(*args: Any, **options: Any) -> str:
        key = repr((args, options))
        if key not in known:
            known[key] = draw(*args, **options)
        return known[key]

    return drawn_or_known


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy
