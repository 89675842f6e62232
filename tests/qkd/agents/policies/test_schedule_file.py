"""Schedule files: round trips, whole-or-nothing writes, and every fault with its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkd.agents import (
    PBA_OPERATIONS,
    Op,
    Policy,
    Schedule,
    ScheduleError,
    Segment,
    load_schedule,
    read_schedule_file,
    save_schedule,
)

OPS = st.builds(Op, st.sampled_from(PBA_OPERATIONS), st.floats(0, 1), st.integers(0, 9))
SCHEDULES = st.builds(
    lambda pairs: Schedule(tuple(Segment(epochs, Policy(tuple(ops))) for epochs, ops in pairs)),
    st.lists(st.tuples(st.integers(1, 500), st.lists(OPS, max_size=30)), min_size=1, max_size=5),
)
GOOD = """\
format: qkd-schedule
version: 1
role: student
segments:
- epochs: 57
  ops: []
- epochs: 3
  ops: [[Rotate, 0.3, 5], [Color, 1, 0], [Cutout, 1e-1, 9]]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "schedule.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(folder: Path, text: str) -> str:
    with pytest.raises(ScheduleError) as caught:
        load_schedule(write(folder, text))
    assert str(folder / "schedule.yaml") in str(caught.value)
    return "\n".join(caught.value.faults)


def test_a_file_is_read_by_operation_names(tmp_path: Path) -> None:
    content = read_schedule_file(write(tmp_path, GOOD))
    assert content.role == "student"
    assert content.schedule == Schedule(
        (
            Segment(57, Policy()),
            Segment(3, Policy((Op("Rotate", 0.3, 5), Op("Color", 1.0, 0), Op("Cutout", 0.1, 9)))),
        )
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEDULES)
def test_what_is_saved_is_loaded_again(tmp_path: Path, schedule: Schedule) -> None:
    provenance = {"data": "digits", "bits": [2, 2], "off": "no", "none": None}
    save_schedule(schedule, tmp_path / "s.yaml", role="teacher", provenance=provenance)
    content = read_schedule_file(tmp_path / "s.yaml")
    assert (content.schedule, content.role, content.provenance) == (schedule, "teacher", provenance)


def test_saving_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        save_schedule(Schedule((Segment(1, Policy()),)), path)
    assert path.read_text("utf-8") == GOOD
    assert list(tmp_path.iterdir()) == [path]


def test_another_role_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="role must be one of"):
        save_schedule(Schedule((Segment(1, Policy()),)), tmp_path / "s.yaml", role="tutor")
    with pytest.raises(ValueError, match="plain values"):
        save_schedule(Schedule((Segment(1, Policy()),)), tmp_path / "s.yaml", provenance={"path": object()})
    assert not list(tmp_path.iterdir())


def test_all_faults_are_told_at_once_with_their_place(tmp_path: Path) -> None:
    text = """\
format: qkd-schedule
version: 1
role: tutor
color: red
segments:
- epochs: 0
  ops: [[Rotat, 0.5, 3], [Color, 1.5, 12]]
- ops: [[Color, 0.5]]
- epochs: 3
  opps: []
- 7
- epochs: 4
  ops: nothing
"""
    faults = faults_of(tmp_path, text)
    for expected in (
        "color: unknown key",
        "role: must be one of teacher, student, got 'tutor'",
        "segments[0].epochs: must be a positive number of epochs, got 0",
        "segments[0].ops[0]: unknown operation 'Rotat'; did you mean 'Rotate'?",
        "segments[0].ops[1]: must be a probability from 0 to 1, got 1.5",
        "segments[0].ops[1]: must be an integer magnitude from 0 to 9, got 12",
        "segments[1].epochs: missing",
        "segments[1].ops[0]: needs [name, probability, magnitude], got ['Color', 0.5]",
        "segments[2].opps: unknown key",
        "segments[2].ops: missing",
        "segments[3]: needs the keys epochs and ops, got 7",
        "segments[4].ops: needs a list of [name, probability, magnitude], got 'nothing'",
    ):
        assert expected in faults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "format: must be 'qkd-schedule'"),
        ("[1, 2]", "format: must be 'qkd-schedule', found 'list'"),
        ("format: pbt\nversion: 1\n", "found 'pbt'"),
        ("format: qkd-schedule\n", "version: must be 1, found None"),
        ("format: qkd-schedule\nversion: 2\n", "version: must be 1, found 2"),
        ("format: qkd-schedule\nversion: 1\n", "segments: needs a list of at least one segment"),
        ("format: qkd-schedule\nversion: 1\nsegments: []\n", "segments: needs a list of at least one segment"),
        ("format: qkd-schedule\nversion: 1\nprovenance: me\nsegments: [{epochs: 1, ops: []}]\n", "provenance: must be"),
        ("format: qkd-schedule\nformat: x\n", "repeated key `format`, also on line 1"),
        ("a: [1", "not YAML"),
        ("a: !!python/object:os.system {}", "not plain YAML data"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in faults_of(tmp_path, text)


def test_a_missing_or_binary_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="cannot be read: No such file"):
        load_schedule(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ScheduleError, match="binary.yaml"):
        load_schedule(tmp_path / "binary.yaml")


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    """A cut at the end of a line leaves valid YAML: the total says that segments are missing."""
    parts = tuple(Segment(n, Policy((Op("Rotate", 0.5, n),) * n)) for n in (5, 3, 9))
    save_schedule(Schedule(parts), tmp_path / "whole.yaml", role="student", provenance={"seed": 1})
    whole = (tmp_path / "whole.yaml").read_text(encoding="utf-8")
    assert read_schedule_file(tmp_path / "whole.yaml").schedule == Schedule(parts)
    lines = whole.splitlines(keepends=True)
    for count in range(len(lines)):
        with pytest.raises(ScheduleError):
            load_schedule(write(tmp_path, "".join(lines[:count])))
    assert "segments add up to 8: the file was cut off" in faults_of(tmp_path, whole[: whole.index("- epochs: 9")])


@pytest.mark.parametrize("stated", ["61", "59", "true", "sixty", "60.5", "[60]"])
def test_a_wrong_total_is_refused(tmp_path: Path, stated: str) -> None:
    assert "the segments add up to 60" in faults_of(tmp_path, GOOD.replace("segments:", f"epochs: {stated}\nsegments:"))


def test_the_total_may_be_left_out_or_stated(tmp_path: Path) -> None:
    stated = load_schedule(write(tmp_path, GOOD.replace("segments:", "epochs: 60\nsegments:")))
    assert stated == load_schedule(write(tmp_path, GOOD))
