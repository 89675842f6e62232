"""The journal: turns, rounds, states that are kept, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qkd.files import DamagedFileError, write_bytes
from qkd.search import Journal, Score, SearchError, Turn, start_policy
from qkd.search.board import turns_in_all


def journal(folder: Path, **changes: Any) -> Journal:
    settings: dict[str, Any] = {
        "role": "teacher", "seed": 0, "members": 4, "epochs": 7, "interval_epochs": 2, "fingerprint": {"data": "a"}
    }  # fmt: skip
    return Journal(folder / "search", **{**settings, **changes})


def take(one: Journal, turn: Turn, *, is_diverged: bool = False) -> None:
    """Take a turn without training: the better, the higher the index."""
    sha256 = "" if is_diverged else write_bytes(turn.result, f"{turn.number} {turn.member}".encode())
    accuracy = 0.0 if is_diverged else 0.1 * turn.member + 0.01 * turn.number
    one.record(turn.member, Score(accuracy, is_diverged, sha256, 64, 16, 0.5))


def test_a_search_from_its_first_turn_to_its_last(tmp_path: Path) -> None:
    one, seen = journal(tmp_path), []
    while turns := one.turns():
        for turn in turns:
            assert Turn.from_json(json.loads(json.dumps(turn.to_json()))) == turn
            assert turn.schedule.epochs == 7
            assert turn.schedule.at(turn.first_epoch) == one.rounds[-1][turn.member].policy
            assert (turn.source is None) == (turn.number == 0)
            if turn.source is not None:
                assert turn.source[0].read_text() == f"{turn.number - 1} {one.rounds[-1][turn.member].source}"
            seen.append((turn.number, turn.member, turn.first_epoch, turn.epochs))
            take(one, turn)
            kept = {path.name for path in one.folder.glob("*.safetensors")}
            assert len(kept) <= 2 * 4, "disk use is bounded"
    assert one.is_done and one.number == 3
    assert [row[:2] for row in seen] == [(n, m) for n in range(3) for m in range(4)] + [(3, 3)]
    assert [row[2:] for row in seen if row[1] == 3] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    assert one.schedule(3).epochs == 7 and one.schedule(3).at(0) == start_policy()
    one.discard_states()
    assert sorted(path.name for path in one.folder.iterdir()) == ["journal.json"]


def test_it_is_read_back_as_it_was_written_at_every_point(tmp_path: Path) -> None:
    whole = journal(tmp_path / "whole")
    while turns := whole.turns():
        take(whole, turns[0])
    while turns := journal(tmp_path / "pieces").turns():  # reopened for every turn
        take(journal(tmp_path / "pieces"), turns[-1])  # and the turns of a round in another order
    assert journal(tmp_path / "pieces").rounds == whole.rounds == journal(tmp_path / "whole").rounds


def test_a_kill_between_score_and_next_round_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = journal(tmp_path)
    turns = one.turns()
    for turn in turns[:-1]:
        take(one, turn)
    monkeypatch.setattr(Journal, "_settle", lambda _: None)  # what a kill right after the write leaves out
    take(one, turns[-1])
    monkeypatch.undo()
    assert one.turns() == []
    again = journal(tmp_path)
    assert again.number == 1 and len(again.turns()) == 4


def test_a_member_that_diverged_has_no_state_and_copies(tmp_path: Path) -> None:
    one = journal(tmp_path)
    for turn in one.turns():
        take(one, turn, is_diverged=turn.member == 2)
    turn = one.turns()[2]
    assert one.rounds[-1][2].source == 3 and turn.own is None
    assert turn.source is not None and turn.source[0] == one.state(0, 3)
    lost = journal(tmp_path / "lost")
    turns = lost.turns()
    for turn in turns[:-1]:
        take(lost, turn, is_diverged=True)
    with pytest.raises(SearchError, match="every member"):
        take(lost, turns[-1], is_diverged=True)
    with pytest.raises(SearchError, match="every member"):  # and says so again when it is asked again
        journal(tmp_path / "lost")


def test_with_two_rounds_only_every_member_takes_part_in_the_last(tmp_path: Path) -> None:
    one, taken = journal(tmp_path, epochs=4), []
    while turns := one.turns():
        taken.append((turns[0].number, turns[0].member))
        take(one, turns[0])
    assert taken == [(number, member) for number in (0, 1) for member in range(4)]
    assert one.rounds[-1][0].is_copy and one.rounds[-1][0].policy != start_policy()
    assert turns_in_all(one, 4) == 8


def test_what_it_refuses(tmp_path: Path) -> None:
    one = journal(tmp_path)
    take(one, one.turns()[0])
    for change, word in (
        ({"seed": 1}, "seed"), ({"epochs": 8}, "lengths"), ({"fingerprint": {"data": "b"}}, "data"),
        ({"fingerprint": {"data": "a", "teacher": "c"}}, "teacher"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"started with other inputs \({word} changed since\); restore"):
            journal(tmp_path, **change)
    later = journal(tmp_path, fingerprint={"data": "a", "method": "c"})  # which earlier versions did not record
    assert later.turns() == one.turns()
    text = one.file.read_text()
    one.file.write_text(text.replace('"accuracy": 0.0', '"accuracy": 0.9'))
    with pytest.raises(DamagedFileError, match="truncated or altered"):
        journal(tmp_path)
    one.file.write_text(text[: len(text) // 2])
    with pytest.raises(DamagedFileError, match="not JSON"):
        journal(tmp_path)
