"""Logs of published searches as schedules: both formats, each of their traps, and that nothing in them is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qkd.agents import PBA_OPERATIONS, Op, Policy, Schedule, Segment
from qkd.agents.policies.search_log import ORDERS, SearchLogError, import_log

ZEROS = [0] * 60


def integers(**ops: tuple[int, int]) -> list[int]:
    """Return 60 integers in which the first copy of each named operation has (probability, magnitude), py2 order."""
    row = list(ZEROS)
    for name, pair in ops.items():
        place = 2 * PBA_OPERATIONS.index(name)
        row[place : place + 2] = pair
    return row


A, B, C = (integers(Rotate=(3, 4)), integers(Invert=(10, 0), Cutout=(1, 9)), integers(Contrast=(5, 5)))


def write(path: Path, records: Sequence[Any], style: str = "json") -> Path:
    lines = [json.dumps(one) if style == "json" else repr(one) for one in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def as_dict(policy: list[int]) -> dict[str, Any]:
    return {"hp_policy": policy, "bit_w": 2, "no_cutout": True, "name": "it's"}


CHAIN = [["2", "5", 59, 57, ZEROS, A], ["7", "2", 60, 60, A, B], ["0", "7", 173, 171, B, C]]


@pytest.mark.parametrize("style", ["json", "python"])
@pytest.mark.parametrize("form", [list, as_dict])
def test_a_chain_becomes_segments_by_the_donors_epochs(style: str, form: Any, tmp_path: Path) -> None:
    rows = [[*record[:4], form(record[4]), form(record[5])] for record in CHAIN]
    imported = import_log(write(tmp_path / "pbt_policy_0.txt", rows, style), epochs=200, op_order="py2")
    assert imported.schedule == Schedule(
        (
            Segment(57, Policy()),  # the target's 59 would be wrong: its state was thrown away
            Segment(3, Policy((Op("Rotate", 0.3, 4),))),
            Segment(111, Policy((Op("Invert", 1.0, 0), Op("Cutout", 0.1, 9)))),
            Segment(29, Policy((Op("Contrast", 0.5, 5),))),
        )
    )
    assert imported.schedule.epochs == 200
    assert imported.lineage == ("5", "2", "7", "0")
    assert (imported.records, imported.dropped, imported.notes) == (3, 0, ())


def test_a_stale_beginning_is_left_out(tmp_path: Path) -> None:
    stale = [["9", "1", 3, 3, ZEROS, C], ["4", "9", 6, 6, C, B]]  # 4 is not who the next line took over from
    imported = import_log(write(tmp_path / "log.txt", [*stale, *CHAIN]), epochs=200, op_order="py2")
    assert imported.schedule == import_log(write(tmp_path / "b.txt", CHAIN), epochs=200, op_order="py2").schedule
    assert imported.dropped == 2 and "2 stale lines at the beginning" in imported.notes[0]


def test_the_order_of_operations_decides_what_the_integers_mean(tmp_path: Path) -> None:
    log = write(tmp_path / "log.txt", [["0", "1", 3, 3, ZEROS, A]])
    py2, source = (import_log(log, epochs=6, op_order=order).schedule.segments[1] for order in ("py2", "source"))
    assert py2.policy == Policy((Op("Rotate", 0.3, 4),))
    assert source.policy == Policy((Op("AutoContrast", 0.3, 4),))
    assert sorted(ORDERS["source"]) == sorted(ORDERS["py2"]) == sorted(PBA_OPERATIONS)
    with pytest.raises(ValueError, match="must be one of py2, source, got 'py3'"):
        import_log(log, epochs=6, op_order="py3")


def test_both_copies_of_an_operation_are_kept(tmp_path: Path) -> None:
    row = list(ZEROS)
    row[0:2], row[30:32] = (3, 4), (10, 9)
    policy = import_log(write(tmp_path / "l.txt", [["0", "1", 3, 3, ZEROS, row]]), epochs=6, op_order="py2").schedule
    assert policy.segments[1].policy.ops == (Op("Rotate", 0.3, 4), Op("Rotate", 1.0, 9))


def test_a_trial_is_followed_through_a_log_of_all(tmp_path: Path) -> None:
    others = [
        ["3", "4", 57, 57, ZEROS, C],
        ["8", "3", 60, 60, C, B],
        ["1", "8", 63, 63, B, A],
        ["3", "1", 66, 66, A, B],
    ]
    mixed = [others[0], CHAIN[0], others[1], CHAIN[1], others[2], others[3], CHAIN[2]]
    log = write(tmp_path / "pbt_global.txt", mixed)
    alone = import_log(write(tmp_path / "p.txt", CHAIN), epochs=200, op_order="py2")
    assert import_log(log, epochs=200, op_order="py2", trial="0").schedule == alone.schedule
    with pytest.raises(SearchLogError, match="log of all trials.*--trial"):
        import_log(log, epochs=200, op_order="py2")
    with pytest.raises(SearchLogError, match="no record of trial '12'.*0, 1, 2, 3, 7, 8"):
        import_log(log, epochs=200, op_order="py2", trial="12")


def test_best_txt_names_the_log(tmp_path: Path) -> None:
    write(tmp_path / "pbt_policy_7.txt", CHAIN)
    (tmp_path / "best.txt").write_text("7\n")
    for path in (tmp_path, tmp_path / "best.txt"):
        assert import_log(path, epochs=200, op_order="py2").file.name == "pbt_policy_7.txt"
    (tmp_path / "best.txt").write_text("seven")
    with pytest.raises(SearchLogError, match="number of the best trial"):
        import_log(tmp_path, epochs=200, op_order="py2")


def test_epochs_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.txt", CHAIN)
    with pytest.raises(SearchLogError, match="line 3: epochs do not add up: continues at epoch 171 of a search of 150"):
        import_log(log, epochs=150, op_order="py2")
    backward = [CHAIN[0], ["7", "2", 60, 30, A, B]]
    with pytest.raises(SearchLogError, match="line 2: epochs do not add up: continues at epoch 30, after 57"):
        import_log(write(tmp_path / "b.txt", backward), epochs=200, op_order="py2")
    with pytest.raises(ValueError, match="epochs must be positive"):
        import_log(log, epochs=0, op_order="py2")


def test_a_log_cut_in_the_middle_of_a_line_is_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.txt", CHAIN)
    log.write_text(log.read_text()[:-40])
    with pytest.raises(SearchLogError, match=r"line 3: neither JSON nor.*was the file cut off\?"):
        import_log(log, epochs=200, op_order="py2")


@pytest.mark.parametrize(
    "line",
    [
        "__import__('pathlib').Path('{mark}').touch()",
        "['0', '1', 3, 3, [0] * 60, [__import__('pathlib').Path('{mark}').touch()] * 60]",
        "(lambda: open('{mark}', 'w'))()",
        "[x for x in open('{mark}', 'w')]",
        "import os",
        "cos\nsystem\n(S'touch {mark}'\ntR.",  # a pickle of protocol 0
        "[" * 5000,
    ],
)
def test_foreign_python_is_refused_and_never_run(line: str, tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    log = tmp_path / "log.txt"
    log.write_text(json.dumps(CHAIN[0]) + "\n" + line.replace("{mark}", str(mark)) + "\n")
    with pytest.raises(SearchLogError, match="line 2: .*no code was run"):
        import_log(log, epochs=200, op_order="py2")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["schedule.p", "log.txt"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps([(200, ZEROS)]))
    with pytest.raises(SearchLogError, match="pickle"):
        import_log(tmp_path / name, epochs=200, op_order="py2")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["0", "1", 3, 3, ZEROS], r"line 2: needs \[target, .*found 5 entries"),
        ({"a": 1}, "line 2: needs .*found dict"),
        (["0", "1", 3, -1, ZEROS, ZEROS], "clone iteration: must be a whole number of epochs, got -1"),
        (["0", "1", True, 3, ZEROS, ZEROS], "target iteration: must be a whole number"),
        (["0", ["1"], 3, 3, ZEROS, ZEROS], "line 2, clone: must be a trial's tag"),
        (["0", "1", 3, 3, ZEROS, ZEROS[1:]], "line 2, new: needs 60 integers .*found 59 values"),
        (["0", "1", 3, 3, [0.5, *ZEROS[1:]], ZEROS], "line 2, old: needs 60 integers"),
        (["0", "1", 3, 3, ZEROS, [11, *ZEROS[1:]]], "line 2, new, integer 0: probability must be 0..10, got 11"),
        (["0", "1", 3, 3, ZEROS, [0, 10, *ZEROS[2:]]], "line 2, new, integer 1: magnitude must be 0..9, got 10"),
        (["0", "1", 3, 3, {"policy": ZEROS}, ZEROS], "line 2, old: has no hp_policy; keys: policy"),
        (["0", "1", 3, 3, {"hp_policy": "random"}, ZEROS], "line 2, old: needs 60 integers .*found str"),
    ],
)
def test_wrong_records_are_named_with_their_line(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SearchLogError, match=message):
        import_log(write(tmp_path / "log.txt", [CHAIN[0], record, CHAIN[2]]), epochs=200, op_order="py2")


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    log = write(tmp_path / "log.txt", [["0"], CHAIN[0], ["1"]])
    with pytest.raises(SearchLogError) as caught:
        import_log(log, epochs=200, op_order="py2")
    assert len(caught.value.faults) == 2


def test_empty_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (("empty", "has no records"), ("absent", "cannot be read"), ("binary", "is not text")):
        with pytest.raises(SearchLogError, match=message):
            import_log(tmp_path / f"{name}.txt", epochs=200, op_order="py2")


def test_a_donor_whose_policy_is_not_its_own_is_noted(tmp_path: Path) -> None:
    imported = import_log(write(tmp_path / "log.txt", [CHAIN[0], ["7", "2", 60, 60, C, B]]), epochs=200, op_order="py2")
    assert "in lines 2" in imported.notes[0]
